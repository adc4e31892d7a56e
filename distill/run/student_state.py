"""The student in training: its model behind the scorer, optimizer and learning-rate schedule, fresh or resumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.core.progress import say
from dpkd.distill.objectives.student_forward import StudentScorer, check_head, check_sharing
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.adapters import add_adapters, load_adapters
from dpkd.distill.run.checkpoints import Checkpoint, StudentFiles, load_optimizer
from dpkd.distill.run.ranks import is_sharded, on_all_ranks
from dpkd.distill.run.setup import Run


@dataclass(frozen=True)
class StudentState:
    """What training changes. `scorer` wraps `model` as accelerate prepared it; every rank calls each method."""

    accelerator: Accelerator
    model: PreTrainedModel
    scorer: torch.nn.Module
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LRScheduler
    files: StudentFiles
    max_grad_norm: float

    def clip_gradients(self) -> float | None:
        """Clip the global gradient norm; its value before, over all ranks (None where DeepSpeed keeps it)."""
        norm = self.accelerator.clip_grad_norm_(self.scorer.parameters(), self.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return None if norm is None else float(norm)

    def update(self) -> float:
        """Take the optimizer's step; the learning rate that it used."""
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return learning_rate

    def weights(self) -> dict[str, Tensor]:
        """The trainable weights by the model's own names, on the CPU of rank zero; empty on other ranks."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            state = self.accelerator.get_state_dict(self.scorer) or {}
            named = {name.removeprefix("model."): value for name, value in state.items()}
            return named if self.accelerator.is_main_process else {}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights: dict[str, Any] = get_model_state_dict(self.model, options=options)
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in weights:  # make tied weights one tensor again: transformers then writes them once
                weights[name] = weights[first.setdefault(id(parameter), name)]
        return weights

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments and step counts as `PARAMETER.NAME`, on the CPU of rank zero; empty on other ranks.

        Call it after `weights`: after a validation, a sharded model has unsharded parameters until they are read.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        return {
            f"{parameter}.{name}": value.contiguous()
            for parameter, values in state.get("state", {}).items()
            for name, value in values.items()
        }


def load_student(run: Run, accelerator: Accelerator, checkpoint: Checkpoint | None) -> StudentState:
    """The student of `run`, or of `checkpoint`; `UserError` for an architecture that cannot be trained here."""
    config = run.config
    resumes_weights = checkpoint is not None and config.lora_rank is None
    source = locate_model(str(checkpoint.directory), "checkpoint") if checkpoint and resumes_weights else run.student
    model = source.load("float32")
    keeps_dropout = config.objective in ("sft", "seqkd") if config.dropout is None else config.dropout
    if not is_sharded(accelerator):
        model = model.to(accelerator.device)
    on_all_ranks(accelerator, lambda: check_head(model, config.student))
    if not keeps_dropout:
        on_all_ranks(accelerator, lambda: turn_off_dropout(model, config.student))
    if config.share_prompt:
        on_all_ranks(accelerator, lambda: check_sharing(model, config.student))
    adapters = None
    if config.lora_rank is not None:
        adapters = add_adapters(model, config)
        if checkpoint is not None:
            load_adapters(adapters, checkpoint.directory)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        model.get_decoder().compile(dynamic=True)
    scorer: torch.nn.Module = StudentScorer(
        model, num_tokens=len(run.student.tokenizer), logits_chunk=config.logits_chunk
    )
    scorer.__dict__["_no_split_modules"] = model._no_split_modules  # layers that accelerate shards one by one
    done = 0 if checkpoint is None else checkpoint.step
    optimizer = make_optimizer(model, config)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, run.steps, config), last_epoch=done - 1)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    if checkpoint is not None:
        load_optimizer(checkpoint, model, optimizer.optimizer)
        if accelerator.is_main_process:
            say(f"resuming from step {done} of {run.steps}")
    files = StudentFiles(model, run.student, adapters, merged=config.lora_save == "merged")
    return StudentState(accelerator, model, scorer, optimizer, scheduler, files, config.max_grad_norm)


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Factor of the peak learning rate at `step` (from 0): linear warm-up that ends at 1, then a cosine towards 0."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup  # the first step learns too
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@torch.no_grad()
def turn_off_dropout(model: torch.nn.Module, name: str) -> None:
    """Set every dropout probability of the modules to 0; the config, which is saved with the student, keeps its own.

    Raises `UserError` if the model is still random in training mode: some families read the config as they run.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or "jitter" in key):
                setattr(module, key, 0.0)
    was_training, ids = model.training, torch.arange(1, 9, device=next(model.parameters()).device)[None]
    one, other = (model.train()(input_ids=ids).logits for _ in range(2))
    model.train(was_training)
    if not torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max())):
        raise UserError(
            "the student's dropout stays on in training, and is noise to objectives that compare log-probs",
            where=name,
            advice="Set the dropout probabilities in its config.json to 0, or give --dropout",
        )


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: matrices decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate  # the schedule multiplies it, also when it starts in the middle
    return optimizer
