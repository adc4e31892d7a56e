"""The row that training reads, and what every source of rows offers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dpkd.teacher_cache.store.rows import CachedRow

#: (group, index in the group) of a row in its source
RowIndex = tuple[int, int]


@dataclass(frozen=True)
class TrainingRow:
    """A response to learn from; for a preference also a response of the student to the same prompt.

    `cache` is the number of its cache, of a run that learns from several.
    """

    chosen: CachedRow
    rejected: CachedRow | None = None
    cache: int | None = None


class RowSource(Protocol):
    """Rows in groups, such as the shards of a cache. Reading rows group by group is cheap."""

    @property
    def group_sizes(self) -> list[int]:
        """Rows in each group."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and response."""
        ...

    def row(self, group: int, index: int) -> TrainingRow:
        """Row `index` of a group."""
        ...

    def lengths_by_group(self) -> list[np.ndarray]:
        """Tokens of every row, prompt and response; of a pair, tokens of its longer sequence."""
        ...


def indices_of(rows: RowSource) -> Iterator[RowIndex]:
    """The indices of all rows, group by group."""
    return ((group, index) for group, size in enumerate(rows.group_sizes) for index in range(size))
