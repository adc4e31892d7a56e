"""What `dpkd train` learns from, and what it minimises. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import Address, LocalPath, Location, Settings, TemplateArguments, several_texts
from dpkd.distill.options.caches import CacheChoice, normalised_caches, parse_caches
from dpkd.distill.options.objectives import ObjectiveName, PresetName


class DataOptions(Settings):
    """Where rows come from, the student and the output."""

    title: ClassVar[str] = "Data"

    cache: Location | tuple[Location, ...] | None = Field(
        None,
        description="directory or URL of the teacher cache; repeatable as PATH=WEIGHT or NAME:PATH=WEIGHT, to learn "
        "from several teachers with one tokenizer; without weights, each cache counts with as many rows as it has",
    )
    cache_weights: Literal["rows", "tokens"] = Field(
        "rows", description="with several caches: their weights are shares of the rows, or of the response tokens"
    )
    student: str = Field(description="student to start from: a checkpoint directory or a hub name")
    out: LocalPath = Field(description="directory of the run; the trained student is saved here")
    data: str | None = Field(
        None, description="with --objective sft, instead of --cache: instruction data with reference responses"
    )
    template: TemplateName = Field("alpaca", description="prompt template for --data; a cache has its own")
    template_arg: TemplateArguments = Field(
        {}, description="with --data: variable of the chat template, such as enable_thinking=false; repeatable"
    )
    turns: Literal["last", "all"] = Field(
        "last", description="with --data: turns of the assistant to learn from in rows of `messages`: the last, or all"
    )
    max_prompt_tokens: int = Field(256, ge=1, description="with --data: skip rows with a longer prompt, in tokens")
    max_new_tokens: int = Field(256, ge=1, description="with --data: cut responses to this length, in tokens")
    responses: Literal["all", "teacher", "reference"] | None = Field(
        None,
        description="which rows of the cache to train on: teacher responses, reference responses, or all; none: the "
        "teacher's for pairs, for --mix and for seqkd, else all",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="use only so many of the cache's entries at each position, the likeliest, in the loss and in "
        "the logged KL; none: all",
    )
    top_mass: float | None = Field(
        None, gt=0, lt=1, description="use only the fewest entries that reach this probability; none: all"
    )
    verify: Literal["start", "read"] = Field(
        "start", description="verify the cache's checksums before the first step, or as shards are read"
    )
    follow: bool = Field(False, description="train while cache-teacher is still writing the cache, in order of shards")
    follow_timeout_s: float = Field(
        600, gt=0, description="with --follow: longest wait while no job writes to the cache, in seconds"
    )

    _one_or_several = field_validator("cache", mode="before")(normalised_caches)

    @property
    def caches(self) -> tuple[CacheChoice, ...]:
        """The caches to learn from, by name: the order in which they are given changes nothing."""
        return parse_caches(self.cache)

    @model_validator(mode="after")
    def _are_read(self) -> Self:
        of_data = ("template", "template_arg", "turns", "max_prompt_tokens", "max_new_tokens")
        if self.follow and self.cache is None:
            raise ValueError("--follow needs --cache")
        if self.data is None and (changed := self.changed(*of_data)):
            raise ValueError(f"{', '.join(changed)} goes with --data: a cache has its own prompts and responses")
        if not self.follow and self.changed("follow_timeout_s"):
            raise ValueError("--follow-timeout-s goes with --follow")
        return self


class ObjectiveOptions(Settings):
    """The loss: its terms, their weights and constants."""

    title: ClassVar[str] = "Objective"

    objective: ObjectiveName = Field(
        "dpkd", description="what to minimise: a preference, a divergence or a baseline (docs/objectives.md)"
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="preferences: compare tokens at each position, or whole responses (Eq. 9 of the paper)"
    )
    preset: PresetName | None = Field(
        None,
        description="options that belong together: what our study recommends, those of the released code, or of the "
        "paper; it overrides a --config file, and options that you give override it",
    )
    beta: float = Field(1.0, gt=0, description="beta of the preference")
    sft_weight: float | None = Field(
        None, ge=0, description="weight of the cross-entropy on the responses; none: the objective's own"
    )
    kd_weight: float | None = Field(
        None,
        ge=0,
        description="weight of the divergence from the teacher; none: the objective's own, and 1 with --level sequence",
    )
    lm_weight: float | None = Field(
        None, ge=0, description="weight of the language-model loss on --lm-data; none: 1 with --lm-data"
    )
    dpkd_weight: float | None = Field(
        None, ge=0, description="weight of the preference loss; none: 1 if the objective is a preference"
    )
    minillm_weight: float | None = Field(
        None, ge=0, description="weight of the MiniLLM loss; none: 1 if the objective is minillm"
    )
    lm_data: str | None = Field(
        None, description="corpus for the language-model loss: JSONL with `text`, plain text, or a datasets name"
    )
    lm_length: int = Field(512, ge=2, description="length of the blocks that --lm-data is packed into, in tokens")
    length_normalize: bool = Field(
        True, description="sequence level: divide log-probs by the number of tokens, EOS included (Eq. 9; off: Eq. 8)"
    )
    token_pairs: Literal["all", "drawn", "argmax"] = Field(
        "all",
        description="token level: compare all pairs of cached tokens in expectation (all), one draw from the teacher "
        "with one from the student (drawn), or their most likely tokens (argmax: the released code, which needs "
        "another term to hold the student)",
    )
    label_smoothing: float | None = Field(
        None,
        ge=0,
        le=0.5,
        description="probability that a preference is the wrong way round; 0.5 has the teacher as its optimum for any "
        "pairs; none: 0.5 for dpkd on a round, else 0",
    )
    offset: bool = Field(
        False,
        description="sequence level, on a round built with --score-cached: add log p/q0 of both responses to the "
        "margin, where q0 drew the round; this makes the teacher the optimum",
    )
    teacher_floor: bool = Field(
        False, description="sequence level: push a rejected response down only while the teacher finds it less likely"
    )
    gamma: float = Field(0.5, ge=0, description="simpo: target reward margin")
    dpop_lambda: float = Field(
        50.0, ge=0, description="dpop: weight of the penalty for a preferred response less likely than the teacher's"
    )
    tail: Literal["bucket", "renormalise", "uniform"] = Field(
        "bucket",
        description="divergences: how to treat tokens that the cache does not keep: as one outcome (bucket), not at "
        "all (renormalise), or with equal shares of the tail mass (uniform)",
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="jsd: weight of the teacher in the mixture")
    akl_mu: float = Field(0.5, gt=0, le=1, description="akl: cumulative probability of the head")
    skew_alpha: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="skewed divergences, distillm2, and dpkd over all pairs: weight of the other distribution in the "
        "mixture that is compared; none: 0.1, and 0 for dpkd",
    )
    skew_anchor_chosen: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="distillm2: gap (skew_gap_chosen of the log) from which a teacher's response has --skew-alpha as "
        "its skew; smaller gaps have smaller skews; none: --skew-alpha for all",
    )
    skew_anchor_rejected: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="distillm2: the same for the student's responses (skew_gap_rejected); none: --skew-alpha for all",
    )
    skew_schedule: bool = Field(
        True, description="distillm2: move weight from teacher to student responses over the first half of the run"
    )
    kd_temperature: float = Field(
        1.0,
        gt=0,
        description="divergences: temperature of both sides among the kept entries (the tail keeps its mass); 1: none",
    )
    minillm_clip: float = Field(
        0.2, gt=0, description="minillm: how far a token's probability may move from that of its draw, as a share"
    )
    ab_alpha: float = Field(0.2, gt=0, description="alpha-beta: power of the teacher's probabilities")
    ab_beta: float = Field(0.7, gt=0, description="alpha-beta: power of the student's probabilities")


class StudentSampleOptions(Settings):
    """The student's own responses, which sequence-level objectives compare with the teacher's."""

    title: ClassVar[str] = "Student samples"

    student_samples: Literal["forced", "cached", "live"] | None = Field(
        None,
        description="the student's responses: the teacher's own (forced, token level only), those of a round (cached), "
        "or drawn during training and scored by a teacher server (live); none: cached with --round, else forced",
    )
    round: str | None = Field(None, description="round of the cache with the student's responses")
    mix: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the rows that are the student's own responses (of --round, or live); the others are the "
        "teacher's cached responses; none: all",
    )
    pairing: Literal["index", "all", "best-vs-worst"] = Field(
        "index",
        description="how to pair an example's responses: first with first and so on, every one with every one, or the "
        "teacher's best with the student's worst (by the teacher's log-prob per token)",
    )
    teacher_url: tuple[Address, ...] = Field(
        (), description="live: server of the cache's teacher (dpkd serve-teacher), http://HOST:PORT; repeatable"
    )
    sampler: Literal["transformers", "vllm"] = Field("transformers", description="live: engine that draws responses")
    num_student_samples: int = Field(
        1,
        ge=1,
        description="live: responses per prompt; with --pairing index, or without pairs, at most as many as the cache "
        "has samples of it",
    )
    sample_temperature: float = Field(1.0, ge=0, description="live: sampling temperature; 0 is greedy")
    sample_top_p: float = Field(1.0, gt=0, le=1, description="live: top-p (nucleus) of sampling")
    sample_max_new_tokens: int | None = Field(
        None, ge=1, description="live: longest response, in tokens; none: the limit of the cache"
    )
    sample_every: int = Field(1, ge=1, description="live: number of steps to draw responses for at once")
    staleness: int = Field(
        1,
        ge=0,
        le=1,
        description="live: 1 draws the next responses during a step, 0 draws them from the newest weights",
    )
    teacher_tolerance: float = Field(
        0.05, gt=0, description="live: largest mean difference between the server's log-probs and the cache's, in nats"
    )

    _several_urls = field_validator("teacher_url", mode="before")(several_texts)

    @model_validator(mode="after")
    def _samples_have_a_source(self) -> Self:
        samples = self.student_samples
        if samples == "cached" and self.round is None:
            raise ValueError("--student-samples cached needs --round NAME, the student's responses in the cache")
        if samples in ("forced", "live") and self.round is not None:
            raise ValueError(f"--student-samples {samples} takes no --round")
        if samples == "live" and not self.teacher_url:
            raise ValueError("--student-samples live needs --teacher-url http://HOST:PORT (see dpkd serve-teacher)")
        if self.mix is not None and samples != "live" and self.round is None:
            raise ValueError("--mix needs the student's responses: give --round NAME or --student-samples live")
        of_live = (
            *("teacher_url", "teacher_tolerance", "sampler", "num_student_samples", "sample_every", "staleness"),
            *("sample_temperature", "sample_top_p", "sample_max_new_tokens"),
        )
        if samples != "live" and (changed := self.changed(*of_live)):
            raise ValueError(f"{', '.join(changed)} goes with --student-samples live")
        return self
