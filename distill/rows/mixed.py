"""The teacher's and the student's responses to the same prompts, for runs that learn from both (`--mix`)."""

from __future__ import annotations

import numpy as np

from dpkd.distill.rows.row import RowIndex, RowSource, TrainingRow


class MixedRows:
    """Each row of `pairs` twice: the teacher's response, and the student's response to the same prompt.

    `pairs` has G groups; row (g, i) is the teacher's response of pair (g, i), and row (G + g, i) the student's. Rows
    without a student's response are those whose response is sampled live: then both are the cache's row. An epoch reads
    every prompt once, so `group_sizes` counts prompts.
    """

    def __init__(self, pairs: RowSource) -> None:
        self._pairs = pairs

    @property
    def group_sizes(self) -> list[int]:
        return self._pairs.group_sizes

    @property
    def longest(self) -> int:
        return self._pairs.longest

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
