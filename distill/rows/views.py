"""Rows of other sources: some of them, those of several, or each with the student's response to the same prompt."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpkd.distill.rows.row import RowIndex, RowSource, TrainingRow


class SubsetRows:
    """Some rows of `source` as a `RowSource`, in its groups; groups without any of them are dropped."""

    def __init__(self, source: RowSource, indices_by_group: Sequence[np.ndarray]) -> None:
        self._source = source
        kept = enumerate(indices_by_group)
        self._groups = [(group, indices.astype(np.int32)) for group, indices in kept if len(indices)]
        self.group_sizes = [len(indices) for _, indices in self._groups]
        self.longest = source.longest  # an upper bound

    def row(self, group: int, index: int) -> TrainingRow:
        source_group, indices = self._groups[group]
        return self._source.row(source_group, int(indices[index]))

    def lengths_by_group(self) -> list[np.ndarray]:
        lengths = self._source.lengths_by_group()
        return [lengths[group][indices] for group, indices in self._groups]


class JoinedRows:
    """The groups of several sources, one source after the other. Each row says which cache it is of.

    `parts` are numbers of caches with their rows.
    """

    def __init__(self, parts: Sequence[tuple[int, RowSource]]) -> None:
        self._parts = list(parts)
        self.group_sizes = [size for _, rows in parts for size in rows.group_sizes]
        self.longest = max(rows.longest for _, rows in parts)
        self._starts = list(itertools.accumulate((len(rows.group_sizes) for _, rows in parts), initial=0))

    def row(self, group: int, index: int) -> TrainingRow:
        part = bisect.bisect_right(self._starts, group) - 1
        number, rows = self._parts[part]
        return replace(rows.row(group - self._starts[part], index), cache=number)

    def lengths_by_group(self) -> list[np.ndarray]:
        return [lengths for _, rows in self._parts for lengths in rows.lengths_by_group()]


class MixedRows:
    """Each row of `pairs` twice: the teacher's response, and the student's response to the same prompt (`--mix`).

    `pairs` has G groups; row (g, i) is the teacher's response of pair (g, i), and row (G + g, i) the student's. Rows
    without a student's response are those whose response is sampled live: then both are the cache's row. An epoch reads
    every prompt once, so `group_sizes` counts prompts.
    """

    def __init__(self, pairs: RowSource) -> None:
        self._pairs = pairs
        self.group_sizes, self.longest = pairs.group_sizes, pairs.longest

    def lengths_by_group(self) -> list[np.ndarray]:
        """Tokens of the longer of a prompt's two rows."""
        return self._pairs.lengths_by_group()

    def row(self, group: int, index: int) -> TrainingRow:
        num_groups = len(self.group_sizes)
        pair = self._pairs.row(group % num_groups, index)
        chosen = pair.chosen if group < num_groups or pair.rejected is None else pair.rejected
        return TrainingRow(chosen, cache=pair.cache)

    def students(self, row_index: RowIndex) -> RowIndex:
        """Where the student's response to the prompt of a teacher's row is."""
        return row_index[0] + len(self.group_sizes), row_index[1]

    def is_students(self, row_index: RowIndex) -> bool:
        """Whether a row is the student's response."""
        return row_index[0] >= len(self.group_sizes)
