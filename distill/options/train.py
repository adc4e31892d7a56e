"""Options of `dpkd train`, and the rules across their groups. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, get_args

from pydantic import model_validator

from dpkd.distill.options.learning import DataOptions, ObjectiveOptions, StudentSampleOptions
from dpkd.distill.options.objectives import OBJECTIVE_TERMS, PREFERENCES, PRESETS, TOKEN_PREFERENCES, TermName
from dpkd.distill.options.running import (
    CheckpointOptions,
    DeviceOptions,
    LoraOptions,
    OptimisationOptions,
    ValidationOptions,
)


class TrainConfig(
    DataOptions,
    ObjectiveOptions,
    StudentSampleOptions,
    OptimisationOptions,
    ValidationOptions,
    CheckpointOptions,
    LoraOptions,
    DeviceOptions,
):
    """What to learn from, what to learn, and how."""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("cache", "data"),)
    example: ClassVar[str] = "dpkd train --cache cache --student student --out run"

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        return _preset_of(values) | values if isinstance(values, dict) else values

    @classmethod
    def layered(cls, *layers: Mapping[str, Any]) -> dict[str, Any]:
        """As `Settings.layered`; a preset counts as options of the layer that names it, and ends an earlier one."""
        merged: dict[str, Any] = {}
        for layer in layers:
            if "preset" in layer:
                earlier = _preset_of(merged)
                merged = {key: value for key, value in merged.items() if key not in earlier or value != earlier[key]}
                merged |= _preset_of(layer)
            merged |= layer
        return merged

    def implied(self) -> Mapping[str, Any]:
        return {**super().implied(), **PRESETS.get(self.preset or "", {})}

    @model_validator(mode="after")
    def _groups_fit_together(self) -> Self:
        problem = (
            self._problem_of_the_data()
            or self._problem_of_the_samples()
            or self._problem_of_the_terms()
            or self._problem_of_the_unread()
        )
        if problem is not None:
            raise ValueError(problem)
        return self

    def _problem_of_the_data(self) -> str | None:
        if self.data is not None and (self.objective != "sft" or self.cache is not None):
            return "--data replaces --cache and needs --objective sft"
        if self.data is not None and (self.top_k or self.top_mass):
            return "--top-k and --top-mass cut the distributions of a --cache, and --data has none"
        if self.data is not None and self.responses is not None:
            return "--responses chooses rows of a --cache: --data has references alone"
        if (problem := self._problem_of_the_caches()) is not None:
            return problem
        if self.follow and self.round is not None:
            return "--follow takes no --round: a round needs a finished cache"
        if self.follow and self.batch_tokens is not None:
            return "--batch-tokens needs a finished --cache: it sorts all rows by length first"
        if self.cache is None or self.follow:
            for key in ("validation_examples", "validate_every", "best_metric", "patience", "on_alarm"):
                if getattr(self, key) not in (None, 0, "last", "warn"):
                    return f"{self.flag(key)} needs a finished --cache"
        if self.student_samples == "live" and (self.follow or self.cache is None):
            return "--student-samples live needs a finished --cache"
        return None

    def _problem_of_the_caches(self) -> str | None:
        if self.cache_weights == "tokens" and (len(self.caches) < 2 or self.caches[0].weight is None):
            return "--cache-weights tokens needs several caches with weights: --cache PATH=WEIGHT for each"
        if len(self.caches) < 2:
            return None
        if self.follow:
            return "--follow takes one --cache: the rows of several are drawn by weight, from finished caches"
        if self.student_samples == "live":
            return "--student-samples live takes one --cache: a server has one teacher; give --round NAME for several"
        return None

    def _problem_of_the_samples(self) -> str | None:
        objective, samples, paired = self.objective, self.student_samples, self.needs_pairs
        if self.level == "sequence" and objective not in PREFERENCES:
            return f"--level sequence needs a preference as --objective ({', '.join(PREFERENCES)})"
        if self.compares_tokens and objective not in TOKEN_PREFERENCES:
            return f"--objective {objective} compares whole responses: give --level sequence"
        if objective in ("sft", "seqkd") and (samples is not None or self.round is not None):
            return f"--objective {objective} takes no --student-samples and no --round"
        if objective == "seqkd" and self.responses in ("all", "reference"):
            return "--objective seqkd learns from the teacher's responses: leave --responses out"
        pairs = "--objective distillm2" if self.contrasts else "--level sequence"
        if paired and samples == "forced":
            return f"{pairs} takes --student-samples cached (with --round NAME) or live"
        if objective == "minillm" and samples != "live" and self.round is None:
            return "--objective minillm takes --round NAME, responses of the student in the cache, or live ones"
        if paired and samples != "live" and self.round is None:
            return f"{pairs} needs --round NAME, the student's responses in the cache"
        on_samples = not paired and (samples == "live" or self.round is not None)
        if on_samples and "sft" in self.weights:
            return (
                "the rows are the student's own responses, and cross-entropy on them teaches nothing: leave "
                "--sft-weight out, or --student-samples and --round"
            )
        if paired and not self.contrasts and samples != "live" and self.best_metric in ("loss", "reward_margin"):
            return (
                f"--best-metric {self.best_metric} is best where a fixed round is overshot; give kld or rouge_l instead"
            )
        if self.mix is not None and paired:
            return f"--mix chooses one response a row, and {pairs} compares two: leave one of them out"
        if self.mix is not None and objective == "minillm":
            return "--objective minillm learns from the student's own responses alone: leave --mix out"
        if self.share_prompt and not paired:
            return "--share-prompt needs --level sequence or --objective distillm2: only pairs share a prompt"
        if objective == "minillm" and samples == "live" and (self.sample_temperature, self.sample_top_p) != (1, 1):
            return (
                "--objective minillm learns from the student's own distribution: leave --sample-temperature and "
                "--sample-top-p at 1"
            )
        if self.sampler == "vllm" and self.lora_rank is not None:
            return (
                "--sampler vllm needs whole weights, but --lora-rank trains adapters only: give --sampler transformers"
            )
        if self.sampler == "vllm" and self.staleness != 0:
            return (
                "--sampler vllm shares the trainer's random numbers, so training must wait for it: give --staleness 0"
            )
        return None

    def _problem_of_the_terms(self) -> str | None:
        own = OBJECTIVE_TERMS[self.objective]
        for term in ("dpkd", "minillm"):
            if getattr(self, f"{term}_weight") is not None and term not in own:
                return f"--{term}-weight does not go with --objective {self.objective}"
        main = [*own][-1]  # of kd, the distributions: without them it is sft
        if getattr(self, f"{main}_weight") == 0:
            return f"--{main}-weight 0 leaves nothing of --objective {self.objective}; choose another objective"
        if self.lm_weight and self.lm_data is None:
            return "the language-model loss needs --lm-data (or --lm-weight 0)"
        if self.kd_weight and self.data is not None:
            return "--kd-weight needs a --cache with distributions"
        if not self.weights:
            return "all weights are 0, so there is nothing to learn"
        if self.compares_tokens and self.token_pairs == "all" and self.objective != "dpkd":
            return f"--objective {self.objective} compares single tokens: give --token-pairs drawn or argmax"
        if self.offset and (problem := self._problem_of_the_offset()) is not None:
            return problem
        if self.contrasts and self.tail == "uniform":
            return (
                "--objective distillm2 keeps whole responses' distributions, too large with --tail uniform: give bucket"
            )
        if self.kd_temperature != 1 and ("kd" not in self.weights or self.contrasts):
            return "--kd-temperature needs a divergence or kd as --objective, or a --kd-weight"
        if self.kd_temperature != 1 and self.tail == "uniform":
            return "--kd-temperature takes --tail bucket or renormalise: the tail's single tokens are unknown"
        return None

    def _problem_of_the_unread(self) -> str | None:
        """An option that was given another value than its default, and that the loss would not read."""
        objective, by_token = self.objective, self.compares_tokens
        of_responses = objective in PREFERENCES and not by_token
        pairs = self.token_pairs if by_token else None
        skewed = objective.startswith("skewed") or self.contrasts or pairs == "all"
        for keys, is_read, reader in (
            (
                ("beta",),
                by_token or of_responses,
                "a preference as --objective (jsd has --jsd-beta, alpha-beta --ab-beta)",
            ),
            (("gamma",), objective == "simpo", "--objective simpo"),
            (("dpop_lambda",), objective == "dpop", "--objective dpop"),
            (("jsd_beta",), objective == "jsd", "--objective jsd"),
            (("akl_mu",), objective == "akl", "--objective akl"),
            (("ab_alpha", "ab_beta"), objective == "alpha-beta", "--objective alpha-beta"),
            (("minillm_clip",), objective == "minillm", "--objective minillm"),
            (("skew_anchor_chosen", "skew_anchor_rejected", "skew_schedule"), self.contrasts, "--objective distillm2"),
            (("skew_alpha",), skewed, "a skewed divergence, distillm2, or dpkd with --token-pairs all"),
            (("token_pairs",), by_token, "a preference with --level token"),
            (("label_smoothing",), (by_token or of_responses) and objective != "ipo", "a preference other than ipo"),
            (
                ("length_normalize",),
                (of_responses and objective != "simpo") or objective == "minillm",
                "--level sequence (other than simpo, which always divides) or --objective minillm",
            ),
            (("teacher_floor",), of_responses and objective in ("dpkd", "dpop"), "dpkd or dpop with --level sequence"),
            (("pairing",), self.needs_pairs, "--level sequence or --objective distillm2"),
            (
                ("tail",),
                "kd" in self.weights or pairs in ("all", "drawn"),
                "a divergence or kd as --objective, a --kd-weight, or --token-pairs all or drawn",
            ),
            (("lm_length",), self.lm_data is not None, "--lm-data"),
        ):
            given = [key for key in keys if not _is_zero(getattr(self, key))]
            if not is_read and (changed := self.changed(*given)):
                return f"{', '.join(changed)} goes with {reader}: nothing else reads it"
        return None

    def _problem_of_the_offset(self) -> str | None:
        if not (self.needs_pairs and self.objective == "dpkd" and self.round is not None):
            return "--offset needs --objective dpkd with --level sequence and --round NAME (live pairs need none)"
        if self.length_normalize:
            return "--offset needs --no-length-normalize: a reward divided by |y| is too small beside it to learn from"
        if self.label_smoothing or self.teacher_floor:
            return "--offset has the teacher as its optimum only without --label-smoothing and --teacher-floor"
        if self.pairing != "index" or self.responses in ("all", "reference"):
            return (
                "--offset compares the teacher's own responses as they were drawn: leave --pairing and --responses out"
            )
        return None

    @property
    def compares_tokens(self) -> bool:
        """Whether the loss is a preference between tokens at each position."""
        return self.objective in PREFERENCES and self.level == "token"

    @property
    def needs_pairs(self) -> bool:
        """Whether the loss compares two responses."""
        return self.contrasts or (self.objective in PREFERENCES and self.level == "sequence")

    @property
    def contrasts(self) -> bool:
        """Whether the loss reads the teacher's distributions on both responses of a pair."""
        return self.objective == "distillm2"

    @property
    def needs_sampling_logprobs(self) -> bool:
        """Whether the loss reads how likely the student's tokens were when they were drawn."""
        return self.objective == "minillm" or self.offset

    @property
    def samples_a_row(self) -> int:
        """How many live responses each row of the cache is trained with; 1 without any."""
        return self.num_student_samples if self.student_samples == "live" and self.pairing == "all" else 1

    @property
    def smoothing(self) -> float:
        """`label_smoothing`, or its default for the objective."""
        if self.label_smoothing is not None or self.offset:
            return self.label_smoothing or 0.0
        # on the pairs of a fixed round only the balanced loss has the teacher as its optimum
        return 0.5 if self.needs_pairs and self.objective == "dpkd" and self.student_samples != "live" else 0.0

    @property
    def skew(self) -> float:
        """`skew_alpha`, or its default for the objective."""
        if self.skew_alpha is None:
            return 0.0 if self.objective in PREFERENCES else 0.1
        return self.skew_alpha

    @property
    def origin(self) -> str | None:
        """Origin of the rows of the cache to train on; None for all."""
        teachers = self.needs_pairs or self.mix is not None or self.objective == "seqkd"
        origin = self.responses or ("teacher" if teachers else "all")
        return None if origin == "all" else origin

    @property
    def needs_distributions(self) -> bool:
        """Whether a term reads the cached distributions."""
        return self.compares_tokens or bool({"kd", "minillm"} & set(self.weights))

    @property
    def weights(self) -> dict[TermName, float]:
        """Weight of every term that is not 0, in a fixed order."""
        names: tuple[TermName, ...] = get_args(TermName)
        own: dict[TermName, float] = OBJECTIVE_TERMS[self.objective] | ({"lm": 1.0} if self.lm_data is not None else {})
        if self.needs_pairs:  # pairs alone let KL rise (docs/objectives.md): the cached distributions hold the student
            own |= {"kd": 1.0}
        given = {name: getattr(self, f"{name}_weight") for name in names}
        merged = {name: own.get(name, 0.0) if given[name] is None else given[name] for name in names}
        return {name: float(weight) for name, weight in merged.items() if weight}


def _preset_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the preset of `values` stands for; none without one (a wrong name is refused later)."""
    preset = values.get("preset")
    return PRESETS.get(preset, {}) if isinstance(preset, str) else {}


def _is_zero(value: Any) -> bool:
    """Whether a constant is 0: it changes nothing where it is not read, and presets say it."""
    return isinstance(value, float) and value == 0
