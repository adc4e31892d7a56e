"""The training run: set up, then save? step, log. Teacher and trainer never share a process."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from transformers import get_cosine_schedule_with_warmup

from dpkd.distill.batches import RowOrder, StepPart, TrainingRow, collate, prefetched
from dpkd.distill.checkpoints import finish_run, latest_checkpoint, load_optimizer, save_checkpoint
from dpkd.distill.config import TrainConfig
from dpkd.distill.following import FollowedRows
from dpkd.distill.interrupts import Interrupts
from dpkd.distill.metrics import means, whole
from dpkd.distill.objective import Objective, StepSums
from dpkd.distill.runs import Run, open_run, plan_steps, take_up
from dpkd.distill.scoring import StudentScorer, check_head
from dpkd.distill.validation import VALIDATION_LOG, Validation
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.files import write_atomic
from dpkd.teacher_cache.models import locate_model
from dpkd.teacher_cache.progress import Progress, say

if TYPE_CHECKING:
    from dpkd.distill.live import LiveRows


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
    with contextlib.ExitStack() as stack:
        if config.student_samples == "live":
            stack.callback(loop.open_live(model).close)
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
        self._objective = Objective(run.config, run.vocab_size, run.student.vocab_size)
        self._live: LiveRows | None = None
        self._validation: Validation | None = None
        if run.validation is not None:
            self._validation = Validation(
                run.validation,
                self._objective,
                accelerator,
                run.config.batch_size,
                distributions=run.has_distributions,
            )

    def run(self, first: int) -> None:
        """From step `first` to the last; an interrupt ends it with a checkpoint, one step later at most."""
        metrics_path, validation_path = self._config.out / "metrics.jsonl", self._config.out / VALIDATION_LOG
        if self._accelerator.is_main_process:
            _keep_lines(metrics_path, first)
            _keep_lines(validation_path, first)
        self._scorer.train()
        rows = self._run.rows
        with (
            metrics_path.open("a", encoding="utf-8") as log,
            Progress("train", self._steps, "steps", first) as progress,
            Interrupts() as interrupts,
            contextlib.closing(
                prefetched(
                    self._parts,
                    range(first, self._steps),
                    give_up=lambda: interrupts.asked,
                    on_close=self._cancel,
                )
            ) as batches,
        ):
            for step in range(first, self._steps):
                started_s = time.perf_counter()
                try:
                    if self._live is not None:
                        self._live.before_step(step)
                    parts = next(batches, None)
                except UserError:
                    self._save_if_any(first, step)  # the cache ended or broke; what is learnt is kept
                    raise
                if parts is None:
                    self._save_if_any(first, step)
                    raise KeyboardInterrupt
                waited_s = time.perf_counter() - started_s
                line = self._step(step, parts)
                step_s = time.perf_counter() - started_s
                line |= {"tokens_per_s": line["tokens"] / step_s, "step_time_s": step_s, "data_wait_s": waited_s}
                if self._accelerator.is_main_process:
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                progress.advance(loss=f"{line['loss']:.4f}", tokens_per_s=f"{line['tokens_per_s']:.0f}")
                done = step + 1
                due = self._config.save_every is not None and done % self._config.save_every == 0
                if self._validation is not None and self._validates(done):
                    self._validate(validation_path, done)
                if interrupts.asked or (due and done < self._steps):
                    self._save(done)
                if interrupts.asked:
                    raise KeyboardInterrupt
            if isinstance(rows, FollowedRows) and not rows.is_finished():
                self._save(self._steps)
                rows.wait_for(None, give_up=lambda: interrupts.asked)

    def open_live(self, model: torch.nn.Module) -> LiveRows:
        """Have the student's responses drawn while it trains; raises `UserError` for a server that will not do."""
        from dpkd.distill.live import LiveRows

        assert self._run.cache is not None
        self._live = LiveRows(
            self._config,
            self._run.cache,
            self._run.rows,
            self._run.student,
            model,
            self._accelerator.device,
            self._order,
            self._steps,
            lambda step: [place for part in self._places(step) for place in part],
            rank=self._accelerator.process_index,
            is_main=self._accelerator.is_main_process,
        )
        return self._live

    def _cancel(self) -> None:
        """End a wait for rows, whoever they come from."""
        if isinstance(self._run.rows, FollowedRows):
            self._run.rows.cancel()
        if self._live is not None:
            self._live.cancel()

    def _places(self, step: int) -> list[list[tuple[int, int]]]:
        """(group, row) of this rank's forward passes of `step`."""
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        return self._order.passes_of(step)[rank::ranks]

    def _parts(self, step: int) -> list[StepPart]:
        """What this rank's forward passes of `step` read."""
        parts = []
        for place, places in enumerate(self._places(step)):
            rows = collate(self._rows(step, places), with_distributions=self._run.has_distributions)
            corpus = None
            if self._run.corpus is not None:
                size, ranks = self._config.batch_size, self._accelerator.num_processes
                block = step * self._config.gradient_accumulation_steps + place
                start = (block * ranks + self._accelerator.process_index) * size
                corpus = self._run.corpus.batch(start, size)
            parts.append(StepPart(rows, corpus))
        return parts

    def _rows(self, step: int, places: list[tuple[int, int]]) -> list[TrainingRow]:
        if self._live is not None:
            return self._live.rows(step, places)
        return [self._run.rows.row(group, index) for group, index in places]

    def _step(self, step: int, parts: list[StepPart]) -> dict[str, Any]:
        accelerator = self._accelerator
        # everything random in a step follows from the seed and the step, so that resuming needs no generator state
        torch.manual_seed(hash((self._config.seed, step, accelerator.process_index)) % 2**63)
        counts = whole(accelerator, [self._objective.term_counts(part) for part in parts])
        sums: list[StepSums] = []
        for part in parts:
            with accelerator.accumulate(self._scorer):
                found = self._objective(self._scorer, part.to(accelerator.device))
                total = self._objective.total(found, counts)
                self._refuse_nan(float(total.detach()), "loss", step, parts)
                # accelerate averages over accumulation and ranks; the counts already divide by the whole step
                accelerator.backward(total * self._config.gradient_accumulation_steps * accelerator.num_processes)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(self._scorer.parameters(), self._config.max_grad_norm))
                    self._refuse_nan(norm, "gradient norm", step, parts)
                learning_rate = float(self._scheduler.get_last_lr()[0])
                self._optimizer.step()
                self._optimizer.zero_grad()
            sums.append(found)
        self._scheduler.step()
        return {
            "step": step + 1,
            "epoch": self._order.epoch_of(step),
            **means(accelerator, sums, counts, self._objective.weights),
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "tokens": whole(accelerator, [{"tokens": part.num_positions} for part in parts])["tokens"],
        }

    def _validates(self, done: int) -> bool:
        return done % self._config.validate_every == 0 or done == self._steps

    def _validate(self, path: Path, done: int) -> None:
        assert self._validation is not None
        line = {"step": done, **self._validation(self._scorer)}
        if self._accelerator.is_main_process:
            with path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            say(f"step {done}: " + ", ".join(_shown(line)))

    def _refuse_nan(self, value: float, what: str, step: int, parts: list[StepPart]) -> None:
        if math.isfinite(value):
            return
        rows = [example_id for part in parts for example_id in dict.fromkeys(part.rows.example_ids)]
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
        if self._live is not None:
            self._live.settle(step)
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


def _shown(line: dict[str, Any]) -> list[str]:
    """The figures of a validation that a person looks at while a run goes on."""
    names = ("loss", "kld", "rkld", "reward_margin")
    return [f"validation {name} {line[name]:.4f}" for name in names if line.get(name) is not None]


def _keep_lines(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run makes again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
