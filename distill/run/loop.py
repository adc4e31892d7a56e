"""The loop of a training run: step, log, validate? save?"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from dpkd.core.errors import UserError
from dpkd.core.progress import Progress, say
from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.batches.prefetch import prefetched
from dpkd.distill.objectives.objective import Objective, StepSums
from dpkd.distill.objectives.reduction import means, whole
from dpkd.distill.rows.following import FollowedRows
from dpkd.distill.run.best import NormSpikes
from dpkd.distill.run.feed import Feed
from dpkd.distill.run.interrupts import Interrupts
from dpkd.distill.run.keeping import Keeper
from dpkd.distill.run.logs import METRICS_LOG, keep_lines, peak_memory_bytes
from dpkd.distill.run.ranks import on_all_ranks, raise_first
from dpkd.distill.run.setup import Run
from dpkd.distill.run.trackers import track
from dpkd.distill.run.validation import VALIDATION_LOG


class Loop:
    """Steps of one run: `feed` says what they read, `keeper` measures and saves what comes of them."""

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        scorer: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        objective: Objective,
        feed: Feed,
        keeper: Keeper,
        steps: int,
    ) -> None:
        self._run, self._config, self._accelerator, self._steps = run, run.config, accelerator, steps
        self._scorer, self._optimizer, self._scheduler, self._objective = scorer, optimizer, scheduler, objective
        self._feed, self._keeper = feed, keeper
        self._spikes = NormSpikes()

    def run(self, first: int) -> int:
        """From step `first` to the last, or until no validation was better for long enough; the steps that are done.

        An interrupt ends it with a checkpoint, one step later at most.
        """
        metrics_path = self._config.out / METRICS_LOG
        is_main = self._accelerator.is_main_process
        if is_main:
            keep_lines(metrics_path, first)
            keep_lines(self._config.out / VALIDATION_LOG, first)
        self._scorer.train()
        with (
            metrics_path.open("a", encoding="utf-8") if is_main else contextlib.nullcontext() as log,
            Progress("train", self._steps, "steps", first) if is_main else contextlib.nullcontext() as progress,
            Interrupts(quiet=not is_main) as interrupts,
            contextlib.closing(
                prefetched(
                    self._feed.parts,
                    range(first, self._steps),
                    should_stop=lambda: interrupts.should_stop,
                    on_close=self._feed.cancel,
                )
            ) as batches,
        ):
            for step in range(first, self._steps):
                if reason := self._keeper.end_of_patience():
                    if is_main:
                        say(reason)
                    return step
                started_s = time.perf_counter()
                parts, error = self._take(batches, step)
                signs = whole(self._accelerator, [{"asked": int(interrupts.should_stop), "none": int(parts is None)}])
                if parts is None or any(signs.values()):  # of any rank: all stop before the same step
                    if step > first:  # what is learnt is kept, also where the cache ended or broke
                        self._save(step)
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
                    self._show(line, progress)
                done = step + 1
                self._keeper.validate(done, last=done == self._steps)
                due = self._config.save_every is not None and done % self._config.save_every == 0
                if due and done < self._steps:
                    self._save(done)
            self._wait_for_the_rest(interrupts)
        return self._steps

    def _take(self, batches: Iterator[list[MicroBatch]], step: int) -> tuple[list[MicroBatch] | None, UserError | None]:
        """The next step's parts; None when a wait for rows was interrupted or ended in an error."""
        try:
            self._feed.before_step(step)
            return next(batches, None), None
        except UserError as error:
            return None, error

    def _show(self, line: dict[str, Any], progress: Progress) -> None:
        if spike := self._spikes.note(line["grad_norm"]):
            say(f"step {line['step']}: {spike}")
        shown = {"loss": f"{line['loss']:.4f}"}
        if line.get("reward_margin") is not None:
            shown["margin"] = f"{line['reward_margin']:.3f}"
        shown["tokens_per_s"] = f"{line['tokens_per_s']:.0f}"
        shown["memory"] = f"{line['peak_memory_bytes'] / 1e9:.2f} GB"
        progress.advance(1, **shown)

    def _save(self, step: int) -> None:
        self._feed.settle(step)
        self._keeper.save(step)

    def _wait_for_the_rest(self, interrupts: Interrupts) -> None:
        """A followed cache may still be written when the last step is done: its end says whether all was sound."""
        rows = self._run.rows
        if not isinstance(rows, FollowedRows):
            return
        if whole(self._accelerator, [{"ranks": int(not rows.is_finished())}])["ranks"]:
            self._save(self._steps)
            on_all_ranks(self._accelerator, lambda: rows.wait_for(None, should_stop=lambda: interrupts.should_stop))

    def _step(self, step: int, parts: list[MicroBatch]) -> dict[str, Any]:
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
            "epoch": self._feed.epoch_of(step),
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

    def _not_a_number(self, value: float | None, what: str, step: int, parts: list[MicroBatch]) -> UserError | None:
        if value is None or math.isfinite(value):
            return None
        rows = [example_id for part in parts for example_id in dict.fromkeys(part.rows.example_ids)]
        return UserError(
            f"the {what} of step {step + 1} is not a number; the update is not made",
            found=value,
            where=f"rows {', '.join(rows[:8])}{' …' if len(rows) > 8 else ''} of {self._config.out}",
            advice="Lower --learning-rate, or look at these rows; the last checkpoint is kept",
        )
