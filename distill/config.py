"""Options of `dpkd train` and `dpkd init-student`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dpkd.teacher_cache.settings import Location, Settings
from dpkd.teacher_cache.templates import TemplateName


class InitStudentConfig(Settings):
    """How to make a student from a teacher."""

    teacher: str = Field(description="teacher: a checkpoint directory or a hub name")
    out: Path = Field(description="directory of the student")
    layers: int = Field(ge=1, description="layers to keep, spread evenly from the first to the last")


class TrainConfig(Settings):
    """What to learn from, what to learn, and how."""

    set_only: ClassVar[frozenset[str]] = frozenset(
        {
            "student_token",
            "length_normalize",
            "dpkd_weight",
            "sft_weight",
            "gradient_accumulation_steps",
            "warmup_ratio",
            "weight_decay",
            "max_grad_norm",
            "adam_beta1",
            "adam_beta2",
            "save_every",
            "keep",
            "dtype",
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
    objective: Literal["dpkd", "sft"] = Field("dpkd", description="dpkd, or cross-entropy on the responses as baseline")
    level: Literal["token", "sequence"] = Field(
        "token", description="token: the released code's loss on each position; sequence: Eq. 9 of the paper"
    )
    student_samples: Literal["forced", "cached"] | None = Field(
        None,
        description="where the student's side comes from: forced on the teacher's prefix (token level), "
        "or cached in a round (sequence level)",
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
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate, after warm-up, before the cosine")
    seed: int = Field(0, ge=0, description="seed of order, dropout and the student's tokens")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to train on")
    template: TemplateName = Field("alpaca", description="prompt template of --data; a cache carries its own")
    max_prompt_tokens: int = Field(
        256, ge=1, description="with --data: rows with a longer prompt are left out, in tokens"
    )
    max_new_tokens: int = Field(256, ge=1, description="with --data: responses are cut at this length, in tokens")

    student_token: Literal["argmax", "sample"] = Field(
        "argmax", description="token level: the student's token is its arg-max (the released code) or drawn from it"
    )
    length_normalize: bool = Field(
        True, description="sequence level: divide by tokens, EOS counted (Eq. 9), or not (Eq. 8)"
    )
    dpkd_weight: float = Field(1.0, ge=0, description="weight of the preference loss")
    sft_weight: float = Field(0.0, ge=0, description="weight of an added cross-entropy on the (chosen) responses")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes to an optimiser step")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay of weights (not of biases and norms)")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, global norm")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta 1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta 2")
    save_every: int | None = Field(100, ge=1, description="steps between checkpoints; none keeps only the last")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 runs the forward pass under autocast"
    )
    verify: Literal["start", "read"] = Field(
        "start", description="when the cache's checksums are checked: all before the first step, or as shards are read"
    )
    follow_timeout_s: float = Field(
        600, gt=0, description="with follow: longest wait, in seconds, while no job writes the cache"
    )
    logits_chunk: int = Field(1024, ge=1, description="positions whose logits exist at one time")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give --steps or --epochs, not both")
        if self.data is not None and (self.objective != "sft" or self.cache is not None):
            raise ValueError("--data takes the place of --cache and goes with --objective sft alone")
        if self.data is None and self.cache is None:
            raise ValueError("--cache is needed (or --data with --objective sft)")
        if self.follow and (self.cache is None or self.round is not None):
            raise ValueError("--follow takes a --cache, and no --round: a round needs a finished cache")
        if self.objective == "dpkd":
            if self.level == "token" and self.student_samples == "cached":
                raise ValueError("--level token takes --student-samples forced; a round goes with --level sequence")
            if self.level == "sequence" and self.student_samples == "forced":
                raise ValueError("--level sequence takes --student-samples cached with --round NAME")
            if self.level == "sequence" and self.round is None:
                raise ValueError("--level sequence needs --round NAME, the student's responses in the cache")
            if self.level == "token" and self.round is not None:
                raise ValueError("--round goes with --level sequence")
            if self.dpkd_weight == 0:
                raise ValueError("dpkd_weight 0 leaves no preference loss; use --objective sft")
        return self
