"""The rows of several caches as one source, and what is held out of them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpkd.distill.rows.row import RowSource, TrainingRow
from dpkd.distill.rows.sources import CacheSplit


class JoinedRows:
    """The groups of several sources, one source after the other. Each row says which cache it is of.

    `parts` are numbers of caches with their rows.
    """

    def __init__(self, parts: Sequence[tuple[int, RowSource]]) -> None:
        self._parts = list(parts)
        self.group_sizes = [size for _, rows in parts for size in rows.group_sizes]
        self._starts = list(itertools.accumulate((len(rows.group_sizes) for _, rows in parts), initial=0))

    @property
    def longest(self) -> int:
        return max(rows.longest for _, rows in self._parts)

    def row(self, group: int, index: int) -> TrainingRow:
        part = bisect.bisect_right(self._starts, group) - 1
        number, rows = self._parts[part]
        return replace(rows.row(group - self._starts[part], index), cache=number)

    def lengths_by_group(self) -> list[np.ndarray]:
        return [lengths for _, rows in self._parts for lengths in rows.lengths_by_group()]


def join_splits(splits: Sequence[CacheSplit], names: Sequence[str]) -> CacheSplit:
    """The training rows of several caches, and the validation rows of those that have some."""
    validating = [(number, split.validation) for number, split in enumerate(splits) if split.validation is not None]
    return CacheSplit(
        JoinedRows([(number, split.training) for number, split in enumerate(splits)]),
        JoinedRows([(number, rows) for number, rows in validating]) if validating else None,
        sum(split.held_out for split in splits),
        sum(split.examples for split in splits),
        "; ".join(f"{name}: {split.reason}" for name, split in zip(names, splits, strict=True)),
    )
