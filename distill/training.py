"""The training run: set-up and end; the steps between are `loop`'s. Teacher and trainer never share a process."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import get_cosine_schedule_with_warmup

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.core.progress import say
from dpkd.distill.batches.shared_prompts import check_sharing
from dpkd.distill.objectives.objective import Objective
from dpkd.distill.objectives.student_forward import StudentScorer, check_head
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.following import FollowedRows
from dpkd.distill.run.adapters import add_adapters, check_adapters, load_adapters
from dpkd.distill.run.best import EvaluateFn
from dpkd.distill.run.checkpoints import (
    StudentFiles,
    finish_run,
    gather_weights,
    latest_checkpoint,
    load_optimizer,
)
from dpkd.distill.run.feed import Feed
from dpkd.distill.run.keeping import Keeper
from dpkd.distill.run.loop import Loop
from dpkd.distill.run.ranks import is_sharded, leave_group, on_all_ranks, on_rank_zero, open_accelerator
from dpkd.distill.run.setup import open_run, plan_steps, take_up
from dpkd.distill.run.trackers import choose_tracker, start_tracker


def train(config: TrainConfig, evaluate_fn: EvaluateFn | None = None) -> Path:
    """Train as `config` says, or go on from the last checkpoint; the run directory, the student at its root.

    `evaluate_fn` measures the best_metric rouge_l, of which this room knows nothing. Raises `UserError` for what cannot
    be used (before anything is written) and when the loss stops being a number.
    """
    was_grouped = torch.distributed.is_initialized()
    run_dir = _train(config, evaluate_fn)
    if not was_grouped:
        leave_group()
    return run_dir


def _train(config: TrainConfig, evaluate_fn: EvaluateFn | None) -> Path:
    """All of `train` but the end of the process group, which nothing in here may outlive."""
    tracker = choose_tracker(config.tracker)
    accelerator = open_accelerator(config, tracker)
    tell = say if accelerator.is_main_process else _say_nothing
    run = on_all_ranks(accelerator, lambda: open_run(config))
    run_dir = config.out
    steps, order = on_all_ranks(accelerator, lambda: plan_steps(run, accelerator.num_processes))
    on_all_ranks(accelerator, lambda: _check_sharding(accelerator, config))
    if config.best_metric == "rouge_l" and evaluate_fn is None:
        raise UserError("best_metric rouge_l needs the function that measures it", advice="Use `dpkd train`")
    on_all_ranks(accelerator, lambda: check_adapters(run.student, config))
    if on_rank_zero(accelerator, lambda: take_up(run_dir, run, accelerator.num_processes)):
        tell(f"the run {run_dir} is complete")
        return run_dir
    checkpoint = on_rank_zero(accelerator, lambda: latest_checkpoint(run_dir, config.resume_from))
    if isinstance(run.rows, FollowedRows):
        run.rows.start(run_dir, leader=accelerator.is_main_process)
    has_weights = checkpoint is not None and config.lora_rank is None
    source = locate_model(str(checkpoint.directory), "checkpoint") if checkpoint and has_weights else run.student
    model = source.load("float32")
    if not is_sharded(accelerator):
        model = model.to(accelerator.device)
    on_all_ranks(accelerator, lambda: check_head(model, config.student))
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
    student = StudentFiles(model, run.student, adapters, merged=config.lora_save == "merged")
    scorer = StudentScorer(model, num_tokens=len(run.student.tokenizer), logits_chunk=config.logits_chunk)
    scorer.__dict__["_no_split_modules"] = model._no_split_modules  # layers that accelerate shards one by one
    optimizer = torch.optim.AdamW(
        decayed_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )
    first = 0 if checkpoint is None else checkpoint.step
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate  # what the schedule multiplies when it starts in the middle
    warmup_steps = math.ceil(config.warmup_ratio * steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps, last_epoch=first - 1)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    if checkpoint is not None:
        load_optimizer(checkpoint, model, optimizer.optimizer)
        tell(f"going on from step {first} of {steps}")
    on_all_ranks(accelerator, lambda: start_tracker(accelerator, tracker, config, first))
    objective = Objective(config, run.vocab_size, run.student.vocab_size)
    feed = Feed(run, accelerator, order, steps)
    keeper = Keeper(run, accelerator, student, scorer, optimizer, objective, evaluate_fn)
    if checkpoint is not None:
        keeper.put_back(checkpoint.state)
    with contextlib.ExitStack() as stack:
        if config.student_samples == "live":
            stack.callback(feed.open_live(model).close)
        done = Loop(run, accelerator, scorer, optimizer, scheduler, objective, feed, keeper, steps).run(first)
    weights = gather_weights(accelerator, scorer, model)
    facts, card = run.facts | {"steps": done}, keeper.card(done)
    on_rank_zero(accelerator, lambda: finish_run(run_dir, student, weights, facts, card))
    for shown in accelerator.trackers:
        shown.finish()
    tell(f"the run {run_dir} is complete: {done} steps")
    return run_dir


def _say_nothing(text: str) -> None:
    """What ranks other than the main one say."""


def _check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    if is_sharded(accelerator) and config.student_samples == "live":
        raise UserError(
            "--student-samples live needs the whole student on each device",
            found=f"{accelerator.distributed_type.value} sharding",
            advice="Leave sharding out, or train on a round of the cache (--student-samples cached)",
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and config.save_every is not None:
        raise UserError(
            "DeepSpeed keeps its optimiser in its own form, of which no checkpoints are made",
            found=f"save_every {config.save_every}",
            expected="save_every none",
            advice="Give --set save_every=none, or shard with --set sharding=fsdp2, which has checkpoints",
        )


def decayed_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
