"""Which rows a step reads: a function of (seed, step, batch sizes), the same for any number of ranks."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dpkd.core.identity import derive_seed
from dpkd.distill.batches.shares import CacheShares, GroupsOf
from dpkd.distill.rows.following import FollowedRows
from dpkd.distill.rows.row import RowIndex
from dpkd.distill.rows.views import MixedRows
from dpkd.teacher_cache.store.order import epoch_order, window_ends


class RowOrder(Protocol):
    """Which rows a step reads."""

    #: rows of an epoch
    num_rows: int
    #: on average
    rows_per_step: float

    def position_of(self, step: int) -> int:
        """How many rows the steps before `step` read; with batches by tokens, give or take a few."""
        ...

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of the first row of `step`."""
        ...

    def micro_batches_of(self, step: int) -> list[list[RowIndex]]:
        """The rows of `step` by micro-batch, over accumulation and ranks: rank r of R takes numbers r, r + R, ..."""
        ...


class BatchOrder(RowOrder):
    """Epochs follow each other without a gap; each is a permutation of all rows. Resuming needs the step alone.

    With `shares`, the rows are those of several caches, and an epoch holds each of them about as often as its weight.
    """

    def __init__(
        self,
        group_sizes: Sequence[int],
        seed: int,
        global_batch_size: int,
        batch_size: int | None = None,
        shares: CacheShares | None = None,
    ) -> None:
        self._group_sizes, self._seed, self._global_batch_size = list(group_sizes), seed, global_batch_size
        self._batch_size, self._shares = batch_size or global_batch_size, shares
        self.num_rows = sum(group_sizes) if shares is None else shares.num_rows
        self.rows_per_step = float(global_batch_size)
        self._cached = (-1, np.zeros((0, 2), np.int64))  # one attribute, so that two threads can read it

    def position_of(self, step: int) -> int:
        return step * self._global_batch_size

    def epoch_of(self, step: int) -> int:
        return step * self._global_batch_size // self.num_rows

    def rows_of(self, step: int) -> list[RowIndex]:
        """All rows of `step` (from 0), over accumulation and ranks."""
        start = step * self._global_batch_size
        return [self._row(number) for number in range(start, start + self._global_batch_size)]

    def micro_batches_of(self, step: int) -> list[list[RowIndex]]:
        rows = self.rows_of(step)
        return [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]

    def _row(self, number: int) -> RowIndex:
        """Row `number` of the stream of epochs."""
        epoch, index = divmod(number, self.num_rows)
        cached_epoch, order = self._cached
        if epoch != cached_epoch:
            order = rows_of_epoch(self._group_sizes, self._seed, epoch, self._shares)
            self._cached = epoch, order
        group, row = order[index]
        return int(group), int(row)


class FollowOrder(BatchOrder):
    """As `BatchOrder`, but the first epoch takes shards in the order in which the cache's job committed them.

    Rows are permuted inside each shard. Asking for a row of a later shard waits until that shard is committed.
    """

    def __init__(self, rows: FollowedRows, seed: int, global_batch_size: int, batch_size: int | None = None) -> None:
        super().__init__((), seed, global_batch_size, batch_size)
        self.num_rows = rows.num_planned
        self._rows = rows
        self._permuted = (-1, np.zeros(0, np.int64))

    def epoch_of(self, step: int) -> int:
        """See `RowOrder.epoch_of`; for a step whose rows have been read."""
        first, num_seen = step * self._global_batch_size, self._rows.offsets[-1]
        return 0 if first < num_seen else first // num_seen

    def _row(self, number: int) -> RowIndex:
        offsets = self._rows.offsets
        if number < offsets[-1] or self._rows.wait_for(number + 1):
            group = bisect.bisect_right(offsets, number) - 1
            if group != self._permuted[0]:
                random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, group])))
                self._permuted = group, random.permutation(self._rows.group_sizes[group])
            return group, int(self._permuted[1][number - offsets[group]])
        # the cache is finished: all its shards are known, and rows that failed are not among the planned ones
        self._group_sizes, self.num_rows = self._rows.group_sizes, offsets[-1]
        return super()._row(number)


def rows_of_epoch(group_sizes: Sequence[int], seed: int, epoch: int, shares: CacheShares | None) -> np.ndarray:
    """The rows of an epoch as [N, 2] pairs (group, row inside the group): every row once, or as `shares` says."""
    return epoch_order(group_sizes, seed, epoch) if shares is None else shares.epoch(epoch)


def window_ends_of_epoch(
    group_sizes: Sequence[int], seed: int, epoch: int, shares: CacheShares | None, groups_of: GroupsOf
) -> np.ndarray:
    """Rows of `rows_of_epoch` up to each end of a window of groups, of whichever cache, and up to the epoch's end.

    Between two ends, the rows of a cache are of as many of its groups as `groups_of` says of it, at most.
    """
    if shares is not None:
        return shares.window_ends(epoch, groups_of)
    return window_ends(group_sizes, seed, epoch, groups_of(group_sizes))


class MixedOrder(RowOrder):
    """`order` of the prompts, where `share` of the rows of each step are the student's responses."""

    def __init__(self, order: RowOrder, rows: MixedRows, share: float, seed: int) -> None:
        self._order, self._rows, self._share, self._seed = order, rows, share, seed
        self.num_rows, self.rows_per_step = order.num_rows, order.rows_per_step

    def position_of(self, step: int) -> int:
        return self._order.position_of(step)

    def epoch_of(self, step: int) -> int:
        return self._order.epoch_of(step)

    def micro_batches_of(self, step: int) -> list[list[RowIndex]]:
        micro_batches = self._order.micro_batches_of(step)
        draw = iter(student_rows(sum(map(len, micro_batches)), self._share, self._seed, step))
        return [[self._rows.students(row) if next(draw) else row for row in rows] for rows in micro_batches]


def student_rows(num_rows: int, share: float, seed: int, step: int) -> list[bool]:
    """Which of the `num_rows` rows of a step are the student's: a pure function, by systematic sampling.

    One uniform number a step decides. Each row is the student's with probability `share`, and any k rows in a row hold
    `share` * k of them, give or take one, so that all micro-batches are mixed alike.
    """
    # differs from the paper: GKD (arXiv 2306.13649v3, Algorithm 1) draws once for a whole batch. The expectation is the
    # same; here the share of a step does not vary (docs/decisions/0020-a-mix-is-sampled-systematically.md).
    start = np.random.Generator(np.random.PCG64(derive_seed(seed, "mix", step))).random()
    before = [math.floor(start + share * number) for number in range(num_rows + 1)]
    return [after > count for count, after in itertools.pairwise(before)]
