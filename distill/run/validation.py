"""Validation on held-out rows of the cache, with the teacher's cached distributions: no teacher is needed."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.batches.collate import collate
from dpkd.distill.objectives.objective import Objective, Score, StepSums
from dpkd.distill.objectives.reduction import means, whole
from dpkd.distill.rows.row import RowSource

VALIDATION_LOG = "validation.jsonl"


class Validation:
    """The objective's terms and metrics over all rows of `rows`, in eval mode.

    A term that the rows cannot give is left out, and `loss` is then None: held-out rows have no student's response
    where those are drawn live, and no text of the corpus. Random choices (a drawn token) are the same at every call.
    """

    def __init__(
        self, rows: RowSource, objective: Objective, accelerator: Accelerator, batch_size: int, *, distributions: bool
    ) -> None:
        self._rows, self._objective, self._accelerator = rows, objective, accelerator
        self._batch_size, self._distributions = batch_size, distributions

    @torch.no_grad()
    def __call__(self, scorer: torch.nn.Module) -> dict[str, Any]:
        """Means over all rows."""
        places = [(group, index) for group, size in enumerate(self._rows.group_sizes) for index in range(size)]
        size, ranks, rank = self._batch_size, self._accelerator.num_processes, self._accelerator.process_index
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        state = torch.get_rng_state()
        scorer.eval()
        counts: list[dict[str, int]] = []
        sums: list[StepSums] = []
        for start in range(0, len(batches), ranks):
            # every rank takes part in every turn: one without a batch of its own takes the last, with weight 0
            number = min(start + rank, len(batches) - 1)
            batch = batches[number]
            torch.manual_seed(number)
            part = MicroBatch(
                collate([self._rows.row(*place) for place in batch], with_distributions=self._distributions)
            )
            found = self._objective(_as_score(scorer), part.to(self._accelerator.device))
            count = self._objective.term_counts(part)
            if number != start + rank:
                found.terms = {name: value * 0 for name, value in found.terms.items()}
                found.metrics = {name: (value * 0, 0) for name, (value, _) in found.metrics.items()}
                count = dict.fromkeys(count, 0)
            counts.append(count)
            sums.append(found)
        scorer.train()
        torch.set_rng_state(state)
        counted = whole(self._accelerator, counts)
        return means(self._accelerator, sums, counted, self._objective.weights)


def _as_score(scorer: torch.nn.Module) -> Score:
    return scorer
