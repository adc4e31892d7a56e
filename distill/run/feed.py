"""What the steps of a run read on one rank: rows of the order, the student's live responses, text of the corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.batches.collate import collate, collate_corpus
from dpkd.distill.batches.order import RowOrder
from dpkd.distill.batches.shared_prompts import share_prompts
from dpkd.distill.rows.following import FollowedRows
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.run.setup import Run

if TYPE_CHECKING:
    from dpkd.distill.live.rows import LiveRows


class Feed:
    """The parts of each step, a pure function of the step but for responses that are drawn live."""

    def __init__(self, run: Run, accelerator: Accelerator, order: RowOrder, steps: int) -> None:
        self._run, self._config, self._accelerator = run, run.config, accelerator
        self._order, self._steps = order, steps
        self._live: LiveRows | None = None

    def open_live(self, model: torch.nn.Module) -> LiveRows:
        """Have the student's responses drawn while it trains; raises `UserError` for a server that will not do."""
        from dpkd.distill.live.rows import LiveRows

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

    def before_step(self, step: int) -> None:
        """Draw what `step` reads, where responses are drawn live; raises `UserError` when the teacher is lost."""
        if self._live is not None:
            self._live.before_step(step)

    def settle(self, step: int) -> None:
        """Have the live responses on disk that a run taken up at `step` reads."""
        if self._live is not None:
            self._live.settle(step)

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of the first row of `step`."""
        return self._order.epoch_of(step)

    def cancel(self) -> None:
        """End a wait for rows, whoever they come from."""
        if isinstance(self._run.rows, FollowedRows):
            self._run.rows.cancel()
        if self._live is not None:
            self._live.cancel()

    def parts(self, step: int) -> list[MicroBatch]:
        """What this rank's forward passes of `step` read."""
        parts = []
        for place, places in enumerate(self._places(step)):
            found = self._rows(step, places)
            rows = collate(found, with_distributions=self._run.has_distributions)
            corpus = None
            if self._run.corpus is not None:
                size, ranks = self._config.batch_size, self._accelerator.num_processes
                block = step * self._config.gradient_accumulation_steps + place
                start = (block * ranks + self._accelerator.process_index) * size
                corpus = collate_corpus(self._run.corpus.blocks(start, size), start)
            parts.append(MicroBatch(rows, corpus, share_prompts(found) if self._config.share_prompt else None))
        return parts

    def _places(self, step: int) -> list[list[tuple[int, int]]]:
        """(group, row) of this rank's forward passes of `step`."""
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        return self._order.micro_batches_of(step)[rank::ranks]

    def _rows(self, step: int, places: list[tuple[int, int]]) -> list[TrainingRow]:
        if self._live is not None:
            return self._live.rows(step, places)
        return [self._run.rows.row(group, index) for group, index in places]
