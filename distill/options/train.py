"""Options of `dpkd train`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import Location, Settings, split_commas
from dpkd.distill.options.objectives import (
    OBJECTIVE_TERMS,
    PREFERENCES,
    PRESETS,
    ObjectiveName,
    TermName,
)
from dpkd.distill.options.rules import check_train_options


class TrainConfig(Settings):
    """What to learn from, what to learn, and how."""

    set_only: ClassVar[frozenset[str]] = frozenset(
        {
            "student_token",
            "teacher_token",
            "length_normalize",
            "label_smoothing",
            "gamma",
            "dpop_lambda",
            "tail",
            "jsd_beta",
            "akl_mu",
            "skew_alpha",
            "dpkd_weight",
            "sft_weight",
            "kd_weight",
            "lm_weight",
            "minillm_weight",
            "lm_length",
            "pairing",
            "num_student_samples",
            "sample_temperature",
            "sample_top_p",
            "sample_max_new_tokens",
            "sample_every",
            "staleness",
            "teacher_tolerance",
            "validate_every",
            "gradient_accumulation_steps",
            "warmup_ratio",
            "weight_decay",
            "max_grad_norm",
            "adam_beta1",
            "adam_beta2",
            "save_every",
            "keep_checkpoints",
            "best_metric",
            "patience",
            "resume_from",
            "dtype",
            "sharding",
            "gradient_checkpointing",
            "share_prompt",
            "compile",
            "lora_alpha",
            "lora_target_modules",
            "lora_save",
            "logits_chunk",
            "verify",
            "follow_timeout_s",
        }
    )

    cache: Location | None = Field(None, description="directory of the teacher cache, or its URL")
    data: str | None = Field(
        None, description="sft only, in place of a cache: instruction data with reference responses"
    )
    student: str = Field(description="student to start from: a checkpoint directory or a hub name")
    out: Path = Field(description="directory of the run; the trained student stands at its root")
    preset: Literal["released-code", "paper"] | None = Field(
        None, description="a published mix of the options below; options that are given go before it"
    )
    objective: ObjectiveName = Field(
        "dpkd", description="what is minimised: a preference, a divergence, or a baseline (docs/objectives.md)"
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="token: the released code's loss on each position; sequence: Eq. 9 of the paper"
    )
    student_samples: Literal["forced", "cached", "live"] | None = Field(
        None,
        description="where the student's side comes from: forced on the teacher's prefix (token level), "
        "cached in a round, or drawn live and scored by the teacher's server",
    )
    teacher_url: tuple[str, ...] = Field(
        (), description="live: a vLLM server with the cache's teacher, http://HOST:PORT (may be repeated)"
    )
    sampler: Literal["transformers", "vllm"] = Field(
        "transformers", description="live: what draws the student's responses"
    )
    lm_data: str | None = Field(
        None, description="corpus of the language-model term: JSONL with `text`, plain text, or a datasets name"
    )
    validation_examples: int = Field(
        0, ge=0, description="examples of the cache that are held out of training and validated on"
    )
    round: str | None = Field(None, description="round of the cache that holds the student's responses")
    responses: Literal["all", "teacher", "reference"] = Field(
        "all", description="rows of the cache to train on, by origin"
    )
    follow: bool = Field(
        False, description="train from a cache that a running cache-teacher still writes, in the order of its shards"
    )
    beta: float = Field(0.1, gt=0, description="beta of the preference")
    steps: int | None = Field(None, ge=1, description="optimiser steps (or give epochs)")
    epochs: float | None = Field(
        None, gt=0, description="passes over the rows (or give steps); 1 when neither is given"
    )
    batch_size: int = Field(8, ge=1, description="rows of one forward pass on each device")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of one forward pass, padding counted, in place of batch_size: rows of like length together",
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate, after warm-up, before the cosine")
    seed: int = Field(0, ge=0, description="seed of order, dropout and the student's tokens")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to train on")
    template: TemplateName = Field("alpaca", description="prompt template of --data; a cache carries its own")
    max_prompt_tokens: int = Field(
        256, ge=1, description="with --data: rows with a longer prompt are left out, in tokens"
    )
    max_new_tokens: int = Field(256, ge=1, description="with --data: responses are cut at this length, in tokens")

    teacher_token: Literal["argmax", "response", "sample"] = Field(
        "argmax",
        description="token level: the teacher's token is its arg-max (the released code), the response's own, "
        "or drawn from the cached entries",
    )
    student_token: Literal["argmax", "sample"] = Field(
        "argmax", description="token level: the student's token is its arg-max (the released code) or drawn from it"
    )
    length_normalize: bool = Field(
        True, description="sequence level: divide by tokens, EOS counted (Eq. 9), or not (Eq. 8)"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of preferences taken the other way round")
    gamma: float = Field(0.5, ge=0, description="simpo: target margin of the reward")
    dpop_lambda: float = Field(
        50.0, ge=0, description="dpop: weight of the penalty on a chosen response below the teacher"
    )
    tail: Literal["bucket", "renormalise", "uniform"] = Field(
        "bucket",
        description="divergences: the tokens that the cache does not keep are one outcome (bucket), are left out "
        "(renormalise), or share the tail mass evenly (uniform)",
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="jsd: share of the teacher in the mixture")
    akl_mu: float = Field(0.5, gt=0, le=1, description="akl: cumulative probability of the head")
    skew_alpha: float = Field(0.1, ge=0, lt=1, description="skewed divergences: share of the other distribution")
    dpkd_weight: float | None = Field(None, ge=0, description="weight of the preference loss; none: 1 where it is")
    sft_weight: float | None = Field(
        None, ge=0, description="weight of the cross-entropy on the (chosen) responses; none: the objective's own"
    )
    kd_weight: float | None = Field(
        None, ge=0, description="weight of the divergence to the cached distribution; none: the objective's own"
    )
    lm_weight: float | None = Field(None, ge=0, description="weight of the language-model term; none: 1 with lm_data")
    minillm_weight: float | None = Field(None, ge=0, description="weight of minillm's loss; none: 1 where it is")
    lm_length: int = Field(512, ge=2, description="tokens to which the corpus of lm_data is packed")
    pairing: Literal["index", "all", "best-vs-worst"] = Field(
        "index",
        description="which of an example's responses make pairs: sample by sample, every one with every one, or the "
        "teacher's best with the student's worst by teacher log-prob a token",
    )
    num_student_samples: int = Field(1, ge=1, description="live: responses drawn to a prompt")
    sample_temperature: float = Field(1.0, ge=0, description="live: temperature of the draw; 0 is greedy")
    sample_top_p: float = Field(1.0, gt=0, le=1, description="live: nucleus of the draw")
    sample_max_new_tokens: int | None = Field(
        None, ge=1, description="live: longest response, in tokens; none: the cache's own limit"
    )
    sample_every: int = Field(1, ge=1, description="live: steps whose responses are drawn together, with one state")
    staleness: int = Field(
        1,
        ge=0,
        le=1,
        description="live: 1 draws the next responses while this step trains; 0 draws with the newest weights",
    )
    teacher_tolerance: float = Field(
        0.05,
        gt=0,
        description="live: largest mean difference to cached log-probs at which the server is refused, in nats",
    )
    validate_every: int = Field(50, ge=1, description="steps between validations (and after the last step)")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes to an optimiser step")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay of weights (not of biases and norms)")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, global norm")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta 1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta 2")
    save_every: int | None = Field(100, ge=1, description="steps between checkpoints; none keeps only the last")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints to keep")
    best_metric: Literal["loss", "reward_margin", "kld", "rouge_l"] | None = Field(
        None, description="validation metric by which the best student is kept, in OUT/best; none keeps none"
    )
    patience: int | None = Field(
        None, ge=1, description="validations without a better best_metric after which training ends; none: never"
    )
    resume_from: Literal["latest", "previous"] = Field(
        "latest",
        description="checkpoint to resume from; previous renames corrupt checkpoints to *.damaged and takes the "
        "newest sound one",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 runs the forward pass under autocast"
    )
    sharding: Literal["fsdp2"] | None = Field(
        None,
        description="with several processes: fsdp2 gives each a part of weights and optimiser; none: each holds the "
        "whole, unless accelerate's own config says otherwise",
    )
    verify: Literal["start", "read"] = Field(
        "start", description="when the cache's checksums are checked: all before the first step, or as shards are read"
    )
    follow_timeout_s: float = Field(
        600, gt=0, description="with follow: longest wait, in seconds, while no job writes the cache"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep fewer activations and compute them again on the way back: less memory, more time"
    )
    share_prompt: bool = Field(
        False,
        description="sequence level: the student reads the prompt of a pair once for both responses; not for students "
        "with sliding windows",
    )
    compile: bool = Field(False, description="compile the student's layers with torch.compile; a start takes longer")
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="train low-rank adapters of this rank and leave the weights as they are; none: all weights",
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="adapters are scaled by lora_alpha / lora_rank; none: twice the rank"
    )
    lora_target_modules: tuple[str, ...] = Field(
        (),
        description="names of the linear layers that get adapters, as q_proj,v_proj; none given: all but the head",
    )
    lora_save: Literal["merged", "adapter"] = Field(
        "merged", description="what is written at the end: merged weights, or the adapters alone in peft's form"
    )
    tracker: Literal["auto", "tensorboard", "wandb", "mlflow", "none"] = Field(
        "auto", description="where figures are shown beside metrics.jsonl; auto is TensorBoard where it is installed"
    )
    logits_chunk: int = Field(1024, ge=1, description="positions whose logits exist at one time")

    @field_validator("lora_target_modules", "teacher_url", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [part for part in split_commas(value) if part] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        return PRESETS.get(preset, {}) | values if isinstance(preset, str) else values

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        check_train_options(self)
        return self

    @property
    def needs_pairs(self) -> bool:
        """Whether the loss compares two responses."""
        return self.objective in PREFERENCES and self.level == "sequence"

    @property
    def needs_distributions(self) -> bool:
        """Whether a term reads the cached distributions."""
        by_token = self.objective in PREFERENCES and self.level == "token"
        return by_token or bool({"kd", "minillm"} & set(self.weights))

    @property
    def weights(self) -> dict[TermName, float]:
        """Weight of every term that is not 0, in a fixed order."""
        names: tuple[TermName, ...] = get_args(TermName)
        own: dict[TermName, float] = OBJECTIVE_TERMS[self.objective] | ({"lm": 1.0} if self.lm_data is not None else {})
        given = {name: getattr(self, f"{name}_weight") for name in names}
        merged = {name: own.get(name, 0.0) if given[name] is None else given[name] for name in names}
        return {name: float(weight) for name, weight in merged.items() if weight}
