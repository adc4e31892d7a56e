"""The loop of a training run: step, log, validate? save?"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from dpkd.distill.batches import RowOrder, StepPart, TrainingRow, collate, prefetched
from dpkd.distill.best import BEST_DIR, Best, EvaluateFn, NormSpikes, held_out_prompts
from dpkd.distill.checkpoints import (
    StudentFiles,
    save_checkpoint,
    save_student,
)
from dpkd.distill.following import FollowedRows
from dpkd.distill.gathering import gather_optimizer, gather_weights
from dpkd.distill.interrupts import Interrupts
from dpkd.distill.metrics import means, whole
from dpkd.distill.model_card import model_card
from dpkd.distill.objective import Objective, StepSums
from dpkd.distill.ranks import on_main, raise_first, together
from dpkd.distill.run_logs import METRICS_LOG, keep_lines, last_line, peak_memory_bytes, shown
from dpkd.distill.runs import Run
from dpkd.distill.trackers import track
from dpkd.distill.validation import VALIDATION_LOG, Validation
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.progress import Progress, say

if TYPE_CHECKING:
    from dpkd.distill.live import LiveRows


class Loop:
    """The state of the loop, and one method a phase."""

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        student: StudentFiles,
        scorer: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        order: RowOrder,
        steps: int,
        evaluate_fn: EvaluateFn | None,
    ) -> None:
        self._run, self._config, self._accelerator = run, run.config, accelerator
        self._student, self._scorer, self._optimizer, self._scheduler = student, scorer, optimizer, scheduler
        self._order, self._steps = order, steps
        self._objective = Objective(run.config, run.vocab_size, run.student.vocab_size)
        self._saved: int | None = None
        self._evaluate_fn = evaluate_fn
        self._best = None if run.config.best_metric is None else Best(run.config.best_metric)
        self._spikes = NormSpikes()
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

    def put_back(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint says beside weights and optimiser."""
        if self._best is not None and state["best"] is not None:
            self._best = Best(**state["best"])

    def run(self, first: int) -> int:
        """From step `first` to the last, or until no validation was better for long enough; the steps that are done.

        An interrupt ends it with a checkpoint, one step later at most.
        """
        metrics_path, validation_path = self._config.out / METRICS_LOG, self._config.out / VALIDATION_LOG
        is_main = self._accelerator.is_main_process
        if is_main:
            keep_lines(metrics_path, first)
            keep_lines(validation_path, first)
        self._scorer.train()
        rows = self._run.rows
        with (
            metrics_path.open("a", encoding="utf-8") if is_main else contextlib.nullcontext() as log,
            Progress("train", self._steps, "steps", first) if is_main else contextlib.nullcontext() as progress,
            Interrupts(quiet=not is_main) as interrupts,
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
                if self._best is not None and self._best.is_over(self._config.patience):
                    self._tell(f"no better {self._best.metric} since step {self._best.step}: training ends")
                    return step
                started_s = time.perf_counter()
                parts, error = self._take(batches, step)
                signs = whole(self._accelerator, [{"asked": int(interrupts.asked), "none": int(parts is None)}])
                if parts is None or any(signs.values()):  # of any rank: all stop before the same step
                    self._save_if_any(first, step)  # what is learnt is kept, also where the cache ended or broke
                    raise_first(self._accelerator, error)
                    raise KeyboardInterrupt
                waited_s = time.perf_counter() - started_s
                line = self._step(step, parts)
                step_s = time.perf_counter() - started_s
                line |= {"tokens_per_s": line["tokens"] / step_s, "step_time_s": step_s, "data_wait_s": waited_s}
                line["peak_memory_bytes"] = peak_memory_bytes(self._accelerator.device)
                track(self._accelerator, line, "train")
                if log is not None and progress is not None:
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    spike = self._spikes.note(line["grad_norm"])
                    if spike is not None:
                        say(f"step {line['step']}: {spike}")
                    progress.advance(
                        loss=f"{line['loss']:.4f}",
                        tokens_per_s=f"{line['tokens_per_s']:.0f}",
                        memory=f"{line['peak_memory_bytes'] / 1e9:.2f} GB",
                    )
                done = step + 1
                due = self._config.save_every is not None and done % self._config.save_every == 0
                if self._validation is not None and self._validates(done):
                    self._validate(validation_path, done)
                if due and done < self._steps:
                    self._save(done)
            if isinstance(rows, FollowedRows):
                unfinished = whole(self._accelerator, [{"ranks": int(not rows.is_finished())}])
                if unfinished["ranks"]:
                    self._save(self._steps)
                    together(self._accelerator, lambda: rows.wait_for(None, give_up=lambda: interrupts.asked))
        return self._steps

    def _tell(self, text: str) -> None:
        if self._accelerator.is_main_process:
            say(text)

    def _take(self, batches: Iterator[list[StepPart]], step: int) -> tuple[list[StepPart] | None, UserError | None]:
        """The next step's parts; None when a wait for rows was interrupted or ended in an error."""
        try:
            if self._live is not None:
                self._live.before_step(step)
            return next(batches, None), None
        except UserError as error:
            return None, error

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
        error: UserError | None = None
        for part in parts:
            with accelerator.accumulate(self._scorer):
                found = self._objective(self._scorer, part.to(accelerator.device))
                total = self._objective.total(found, counts)
                error = error or self._not_a_number(float(total.detach()), "loss", step, parts)
                # accelerate averages over accumulation and ranks; the counts already divide by the whole step
                accelerator.backward(total * self._config.gradient_accumulation_steps * accelerator.num_processes)
                if accelerator.sync_gradients:
                    norm = self._clip()
                    error = error or self._not_a_number(norm, "gradient norm", step, parts)
                    if whole(accelerator, [{"errors": int(error is not None)}])["errors"]:
                        raise_first(accelerator, error)
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

    def _clip(self) -> float | None:
        """Clip the gradients; their norm before, over all ranks (None where DeepSpeed does not say)."""
        norm = self._accelerator.clip_grad_norm_(self._scorer.parameters(), self._config.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return None if norm is None else float(norm)

    def _validates(self, done: int) -> bool:
        return done % self._config.validate_every == 0 or done == self._steps

    def _validate(self, path: Path, done: int) -> None:
        assert self._validation is not None
        line = {"step": done, **self._validation(self._scorer)}
        if self._config.best_metric == "rouge_l":
            line["rouge_l"] = self._rouge_l(done)
        if self._accelerator.is_main_process:
            with path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            track(self._accelerator, line, "validation")
            say(f"step {done}: " + ", ".join(shown(line)))
        # the same numbers on every rank, and so the same answer
        if self._best is not None and self._best.note(line):
            self._write_student(self._config.out / BEST_DIR, done, self.card(done))

    def _rouge_l(self, done: int) -> float:
        """Rouge-L of the student's answers to the held-out prompts, by the function that was handed in."""
        assert self._evaluate_fn is not None
        assert self._run.validation is not None
        evaluate_fn, prompts = self._evaluate_fn, held_out_prompts(self._run.validation, self._run.student)
        directory = self._config.out / ".candidate"
        self._write_student(directory, done, None)
        score = on_main(self._accelerator, lambda: evaluate_fn(directory, prompts))
        on_main(self._accelerator, lambda: shutil.rmtree(directory))
        return float(score)

    def _write_student(self, directory: Path, step: int, card: str | None) -> None:
        weights = gather_weights(self._accelerator, self._scorer, self._student.model)
        facts = self._run.facts | {"steps": step}
        on_main(self._accelerator, lambda: save_student(directory, self._student, weights, facts, card))

    def card(self, step: int) -> str:
        """The model card of the student as it stands, of the lines that are written; empty off the main rank."""
        if not self._accelerator.is_main_process:
            return ""
        return model_card(
            self._run, step, *(last_line(self._config.out / name) for name in (METRICS_LOG, VALIDATION_LOG))
        )

    def _not_a_number(self, value: float | None, what: str, step: int, parts: list[StepPart]) -> UserError | None:
        if value is None or math.isfinite(value):
            return None
        rows = [example_id for part in parts for example_id in dict.fromkeys(part.rows.example_ids)]
        return UserError(
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
        accelerator, run = self._accelerator, self._run
        if step == self._saved or accelerator.distributed_type == DistributedType.DEEPSPEED:
            return
        self._saved = step
        weights = gather_weights(accelerator, self._scorer, self._student.model, self._student.is_kept)
        moments = gather_optimizer(accelerator, self._optimizer.optimizer)
        facts, keep = run.facts | {"steps": step}, self._config.keep
        state = {"best": None if self._best is None else asdict(self._best)}
        on_main(
            accelerator,
            lambda: save_checkpoint(self._config.out, step, self._student, weights, moments, facts, keep, state),
        )
