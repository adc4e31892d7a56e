"""The training run: set up, then save? step, log. Teacher and trainer never share a process."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from transformers import get_cosine_schedule_with_warmup

from dpkd.distill.batches import Batch, RowOrder, collate, prefetched
from dpkd.distill.checkpoints import finish_run, latest_checkpoint, load_optimizer, save_checkpoint
from dpkd.distill.config import TrainConfig
from dpkd.distill.following import FollowedRows
from dpkd.distill.interrupts import Interrupts
from dpkd.distill.objective import Objective, StepSums
from dpkd.distill.runs import Run, open_run, plan_steps, take_up
from dpkd.distill.scoring import StudentScorer, check_head
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.files import write_atomic
from dpkd.teacher_cache.models import locate_model
from dpkd.teacher_cache.progress import Progress, say

#: metrics that every line carries; null where the objective does not define them
METRICS = ("reward_chosen", "reward_rejected", "reward_margin", "preference_accuracy", "teacher_miss_rate")


def train(config: TrainConfig) -> Path:
    """Train as `config` says, or go on from the last checkpoint; the run directory, the student at its root.

    Raises `UserError` for what cannot be used (before anything is written) and when the loss stops being a number.
    """
    run = open_run(config)
    run_dir = config.out
    accelerator = _accelerator(config)
    steps, order = plan_steps(run, accelerator.num_processes)
    if take_up(run_dir, run):
        say(f"the run {run_dir} is complete")
        return run_dir
    checkpoint = latest_checkpoint(run_dir)
    if isinstance(run.rows, FollowedRows):
        run.rows.start(run_dir, leader=accelerator.is_main_process)
    source = run.student if checkpoint is None else locate_model(str(checkpoint.directory), "checkpoint")
    model = source.load("float32").to(accelerator.device)
    check_head(model, config.student)
    scorer = StudentScorer(model, num_tokens=len(run.student.tokenizer), logits_chunk=config.logits_chunk)
    optimizer = torch.optim.AdamW(
        decayed_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )
    first = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None:
        load_optimizer(checkpoint, optimizer)
        say(f"going on from step {first} of {steps}")
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate  # what the schedule multiplies when it starts in the middle
    warmup_steps = math.ceil(config.warmup_ratio * steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps, last_epoch=first - 1)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    loop = _Loop(run, accelerator, scorer, optimizer, scheduler, order, steps)
    loop.run(first)
    if accelerator.is_main_process:
        finish_run(run_dir, accelerator.unwrap_model(scorer).model, run.student, run.facts | {"steps": steps})
        say(f"the run {run_dir} is complete: {steps} steps")
    return run_dir


class _Loop:
    """The state of the loop, and one method a phase."""

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        scorer: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        order: RowOrder,
        steps: int,
    ) -> None:
        self._run, self._config, self._accelerator = run, run.config, accelerator
        self._scorer, self._optimizer, self._scheduler = scorer, optimizer, scheduler
        self._order, self._steps = order, steps
        self._objective = Objective(run.config, run.vocab_size)

    def run(self, first: int) -> None:
        """From step `first` to the last; an interrupt ends it with a checkpoint, one step later at most."""
        metrics_path = self._config.out / "metrics.jsonl"
        if self._accelerator.is_main_process:
            _keep_lines(metrics_path, first)
        self._scorer.train()
        rows = self._run.rows
        with (
            metrics_path.open("a", encoding="utf-8") as log,
            Progress("train", self._steps, "steps", first) as progress,
            Interrupts() as interrupts,
            contextlib.closing(
                prefetched(
                    self._batches,
                    range(first, self._steps),
                    give_up=lambda: interrupts.asked,
                    on_close=rows.cancel if isinstance(rows, FollowedRows) else lambda: None,
                )
            ) as batches,
        ):
            for step in range(first, self._steps):
                started_s = time.perf_counter()
                try:
                    micro_batches = next(batches, None)
                except UserError:
                    self._save_if_any(first, step)  # the cache ended or broke; what is learnt is kept
                    raise
                if micro_batches is None:
                    self._save_if_any(first, step)
                    raise KeyboardInterrupt
                waited_s = time.perf_counter() - started_s
                line = self._step(step, micro_batches)
                step_s = time.perf_counter() - started_s
                line |= {"tokens_per_s": line["tokens"] / step_s, "step_time_s": step_s, "data_wait_s": waited_s}
                if self._accelerator.is_main_process:
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                progress.advance(loss=f"{line['loss']:.4f}", tokens_per_s=f"{line['tokens_per_s']:.0f}")
                done = step + 1
                due = self._config.save_every is not None and done % self._config.save_every == 0
                if interrupts.asked or (due and done < self._steps):
                    self._save(done)
                if interrupts.asked:
                    raise KeyboardInterrupt
            if isinstance(rows, FollowedRows) and not rows.is_finished():
                self._save(self._steps)
                rows.wait_for(None, give_up=lambda: interrupts.asked)

    def _batches(self, step: int) -> list[Batch]:
        """This rank's forward passes of `step`."""
        places = self._order.rows_of(step)
        size, ranks, rank = self._config.batch_size, self._accelerator.num_processes, self._accelerator.process_index
        mine = [
            places[start + rank * size : start + (rank + 1) * size] for start in range(0, len(places), size * ranks)
        ]
        return [
            collate(
                [self._run.rows.row(group, index) for group, index in part],
                with_distributions=self._objective.needs_distributions,
            )
            for part in mine
        ]

    def _step(self, step: int, micro_batches: list[Batch]) -> dict[str, Any]:
        accelerator = self._accelerator
        # everything random in a step follows from the seed and the step, so that resuming needs no generator state
        torch.manual_seed(hash((self._config.seed, step, accelerator.process_index)) % 2**63)
        counts = self._whole([self._objective.term_counts(batch) for batch in micro_batches])
        sums: list[StepSums] = []
        loss = 0.0
        for batch in micro_batches:
            with accelerator.accumulate(self._scorer):
                part = self._objective(self._scorer, batch.to(accelerator.device))
                total = self._objective.total(part, counts)
                self._refuse_nan(float(total.detach()), "loss", step, micro_batches)
                loss += float(total.detach())
                # accelerate averages over accumulation and ranks; the counts already divide by the whole step
                accelerator.backward(total * self._config.gradient_accumulation_steps * accelerator.num_processes)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(self._scorer.parameters(), self._config.max_grad_norm))
                    self._refuse_nan(norm, "gradient norm", step, micro_batches)
                learning_rate = float(self._scheduler.get_last_lr()[0])
                self._optimizer.step()
                self._optimizer.zero_grad()
            sums.append(part)
        self._scheduler.step()
        return {
            "step": step + 1,
            "epoch": self._order.epoch_of(step),
            **self._means(loss, sums, counts),
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "tokens": self._whole([{"tokens": batch.num_positions} for batch in micro_batches])["tokens"],
        }

    def _means(self, loss: float, sums: list[StepSums], counts: dict[str, int]) -> dict[str, float | None]:
        """The step's loss, terms and metrics over all forward passes and ranks."""
        totals = {"loss": loss}
        for name in counts:
            totals[f"loss_{name}"] = sum(float(part.terms[name].detach()) for part in sums) / counts[name]
        metric_counts = self._whole([{name: count for name, (_, count) in part.metrics.items()} for part in sums])
        for name, count in metric_counts.items():
            totals[name] = sum(float(part.metrics[name][0]) for part in sums) / count
        reduced = self._whole([totals])
        return {**dict.fromkeys(METRICS), **reduced}

    def _whole(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Sums by key over this rank's forward passes and over all ranks."""
        summed = {key: sum(part[key] for part in parts) for key in parts[0]}
        if self._accelerator.num_processes == 1:
            return summed
        values = torch.tensor(list(summed.values()), dtype=torch.float64, device=self._accelerator.device)
        whole = self._accelerator.reduce(values, reduction="sum").tolist()
        return dict(zip(summed, whole, strict=True))

    def _refuse_nan(self, value: float, what: str, step: int, micro_batches: list[Batch]) -> None:
        if math.isfinite(value):
            return
        rows = [example_id for batch in micro_batches for example_id in dict.fromkeys(batch.example_ids)]
        raise UserError(
            f"the {what} of step {step + 1} is not a number; the update is not made",
            found=value,
            where=f"rows {', '.join(rows[:8])}{' …' if len(rows) > 8 else ''} of {self._config.out}",
            advice="Lower --learning-rate, or look at these rows; the last checkpoint is kept",
        )

    def _save_if_any(self, first: int, step: int) -> None:
        if step > first:
            self._save(step)

    def _save(self, step: int) -> None:
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            model = self._accelerator.unwrap_model(self._scorer).model
            save_checkpoint(
                self._config.out,
                step,
                model,
                self._optimizer.optimizer,
                self._run.student,
                self._run.facts | {"steps": step},
                self._config.keep,
            )


def decayed_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("CUDA is asked for and not there", found="no CUDA device", advice="Choose --device cpu")
    if PartialState().num_processes == 1:
        # accelerate remembers the first run's device and precision; a notebook may start another
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )


def _keep_lines(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run makes again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
