"""How `dpkd train` runs: optimisation, validation, checkpoints, adapters, devices. Imports nothing heavy."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpkd.core.settings import DeviceName, Settings, several_texts

#: examples that are held out by default: this share, within these bounds, and of a small cache a quarter
_SHARE_HELD_OUT, _FEWEST_HELD_OUT, _MOST_HELD_OUT = 0.02, 16, 64


class OptimisationOptions(Settings):
    """Length, batches and AdamW."""

    title: ClassVar[str] = "Optimisation"

    steps: int | None = Field(None, ge=1, description="optimiser steps; none: as --epochs says")
    epochs: float | None = Field(None, gt=0, description="passes over the rows; none: 1, or as --steps says")
    batch_size: int = Field(8, ge=1, description="rows per forward pass and device")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes per optimiser step")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens per forward pass, padding included (a live response counts with its limit); batches then "
        "hold rows of similar length; none: --batch-size rows",
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate, after warm-up; cosine decay to 0")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps with linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW (not on biases and norms)")
    max_grad_norm: float = Field(1.0, gt=0, description="clip gradients to this global norm")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="beta 1 of AdamW")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="beta 2 of AdamW")
    dropout: bool | None = Field(
        None,
        description="keep the student's dropout on while it trains; none: on for sft and seqkd, off for objectives "
        "that compare log-probs, in which it is noise",
    )
    seed: int = Field(0, ge=0, description="seed of the data order, dropout and the student's tokens")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give --steps or --epochs, not both")
        return self


class ValidationOptions(Settings):
    """Held-out examples, the best student and early stopping."""

    title: ClassVar[str] = "Validation"

    validation_examples: int | None = Field(
        None,
        ge=0,
        description="examples of the cache to hold out of training and validate on; none: 2%, from 16 to 64, but at "
        "most a quarter; 0: no validation",
    )
    validate_every: int | None = Field(
        None,
        ge=1,
        description="steps between validations; the first comes before training, the last after it; none: as often as "
        "5% of the time allows, at most 20 times",
    )
    best_metric: Literal["kld", "loss", "reward_margin", "rouge_l", "last"] | None = Field(
        None,
        description="the run's result is the student that is best by this metric, or the last one; none: kld, loss for "
        "sft, and the last one where neither is measured",
    )
    patience: int | None = Field(
        None, ge=1, description="stop after this many validations without a better --best-metric; none: never"
    )

    on_alarm: Literal["warn", "stop"] = Field(
        "warn",
        description="when a validation gives an alarm (KL above its start, entropy running away, ends unlearned, "
        "both sides of the pairs unlearned, a used-up round, an idle preference): warn once, or stop the run, exit "
        "code 3",
    )

    @model_validator(mode="after")
    def _metrics_are_measured(self) -> Self:
        if self.validate_every is not None and self.validation_examples == 0:
            raise ValueError("--validate-every needs --validation-examples of 1 or more")
        keeps_best = self.best_metric not in (None, "last")
        if keeps_best and self.validation_examples == 0:
            raise ValueError(f"--best-metric {self.best_metric} needs --validation-examples of 1 or more")
        if self.patience is not None and (self.best_metric == "last" or self.validation_examples == 0):
            raise ValueError("--patience needs validation, and a --best-metric other than last")
        if self.on_alarm == "stop" and self.validation_examples == 0:
            raise ValueError("--on-alarm stop needs --validation-examples of 1 or more")
        return self

    def num_held_out(self, num_examples: int) -> int:
        """How many of a cache's examples are held out; 0 where it has too few to spare any by default."""
        if self.validation_examples is not None:
            return self.validation_examples
        if num_examples < _FEWEST_HELD_OUT:
            return 0
        share = round(_SHARE_HELD_OUT * num_examples)
        return min(max(share, _FEWEST_HELD_OUT), _MOST_HELD_OUT, num_examples // 4)


class CheckpointOptions(Settings):
    """What a run saves and logs."""

    title: ClassVar[str] = "Checkpoints and logs"

    save_every: int | None = Field(100, ge=1, description="steps between checkpoints; none: only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints to keep")
    resume_from: Literal["latest", "previous"] = Field(
        "latest",
        description="checkpoint to resume from; previous renames corrupt checkpoints to *.damaged and takes the one "
        "before them",
    )
    tracker: Literal["auto", "tensorboard", "wandb", "mlflow", "none"] = Field(
        "auto", description="tracker to log to, besides metrics.jsonl; auto: TensorBoard if it is installed"
    )


class LoraOptions(Settings):
    """Low-rank adapters instead of full training."""

    title: ClassVar[str] = "LoRA"

    lora_rank: int | None = Field(None, ge=1, description="train LoRA adapters of this rank; none: train all weights")
    lora_alpha: float | None = Field(
        None, gt=0, description="scale adapters by lora_alpha / lora_rank; none: twice the rank"
    )
    lora_target_modules: tuple[str, ...] = Field(
        (), description="linear layers that get adapters, such as q_proj,v_proj; none: all but the LM head; repeatable"
    )
    lora_save: Literal["merged", "adapter"] = Field(
        "merged", description="save the merged weights, or only the adapters (in the format of peft)"
    )

    _several_modules = field_validator("lora_target_modules", mode="before")(several_texts)

    @model_validator(mode="after")
    def _lora_has_a_rank(self) -> Self:
        if self.lora_rank is None and (changed := self.changed("lora_alpha", "lora_target_modules", "lora_save")):
            raise ValueError(f"{', '.join(changed)} needs --lora-rank")
        return self


class DeviceOptions(Settings):
    """Device, precision, and what trades time for memory."""

    title: ClassVar[str] = "Memory and devices"

    device: DeviceName = Field("auto", description="device to train on; auto: CUDA if it is available")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="precision of the forward pass; bfloat16 uses autocast, and TF32 for the LM head on a CUDA device",
    )
    sharding: Literal["fsdp2"] | None = Field(
        None,
        description="with several processes: fsdp2 shards weights and optimiser state; none: replicate them, unless "
        "accelerate's own config says otherwise",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    share_prompt: bool = Field(
        False, description="sequence level: run a pair's prompt through the student once; not with sliding windows"
    )
    compile: bool = Field(False, description="compile the student's layers with torch.compile; slower to start")
    logits_chunk: int = Field(1024, ge=1, description="compute logits for this many positions at a time")
