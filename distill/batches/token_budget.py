"""Micro-batches of similar lengths and bounded size: rows are sorted by length in windows and cut by a token budget.

Every row is read once an epoch. A micro-batch of short rows holds many of them and one of long rows few, so that a
step's mean over positions weighs every token about equally. Batches of a fixed number of sorted rows would not do that.

Windows end where the data order's windows of groups (shards) end. Windows of a fixed number of rows would each touch
the shards of two of those, which a reader does not keep for pairs: it would decode every shard many times an epoch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from dpkd.core.errors import UserError
from dpkd.distill.batches.order import RowOrder, rows_of_epoch, window_ends_of_epoch
from dpkd.distill.batches.shares import CacheShares
from dpkd.distill.rows.row import RowIndex
from dpkd.teacher_cache.store.order import WINDOW_GROUPS

#: about so many rows are sorted together: enough for little padding, few enough to keep the order random
WINDOW_ROWS = 1024
#: raised with each change of the rows of a micro-batch: a run that was begun in another order cannot be resumed
TOKEN_ORDER = 2


class TokenBatchOrder(RowOrder):
    """A `RowOrder` whose micro-batches have at most `budget` tokens, padding included, in random order.

    A pure function of (seed, step, lengths, budget, micro-batches a step): resuming needs the step alone, and the
    micro-batches are the same for any number of ranks that share them.

    Args:
        lengths_by_group: tokens of every row, prompt and response; of a pair, tokens of its longer sequence.
        sequences: sequences of a row: 1, or 2 for pairs, for each live sample of a row.
        micro_batches_per_step: over accumulation and ranks.
        shards_per_row: decoded to read a row: 2 for rows of a cache with those of its round.
        shares: which rows an epoch holds, where they are of several caches.
    """

    def __init__(
        self,
        lengths_by_group: Sequence[np.ndarray],
        seed: int,
        *,
        budget: int,
        sequences: int,
        micro_batches_per_step: int,
        shards_per_row: int = 1,
        shares: CacheShares | None = None,
    ) -> None:
        self._lengths, self._seed, self._budget = list(lengths_by_group), seed, budget
        self._sequences, self._per_step = sequences, micro_batches_per_step
        self._shares, self._shards_per_row = shares, shards_per_row
        self.num_rows = sum(map(len, self._lengths)) if shares is None else shares.num_rows
        longest = max(int(lengths.max(initial=0)) for lengths in self._lengths) * sequences
        if longest > budget:
            raise UserError(
                "the longest row does not fit into a micro-batch",
                found=f"{longest} tokens" + (" for a pair" if sequences == 2 else ""),
                expected=f"at most batch_tokens {budget}",
                advice="Raise --batch-tokens",
            )
        self._ends = [0]  # micro-batches up to the end of each epoch
        self._cached = (-1, np.zeros((0, 2), np.int64), np.zeros(1, np.int64))
        self._lock = threading.RLock()  # two threads read the order
        self.rows_per_step = self.num_rows / self.num_steps(1)

    def position_of(self, step: int) -> int:
        with self._lock:
            epoch, index = self._find(step * self._per_step)
            return epoch * self.num_rows + int(self._bounds_of(epoch)[1][index])

    def epoch_of(self, step: int) -> int:
        return self._find(step * self._per_step)[0]

    def micro_batches_of(self, step: int) -> list[list[RowIndex]]:
        first = step * self._per_step
        return [self._micro_batch(number) for number in range(first, first + self._per_step)]

    def num_steps(self, epochs: float) -> int:
        """Steps that read every row `epochs` times; the last step is filled up from the next epoch."""
        whole = int(epochs)
        while len(self._ends) <= whole + 1:
            self._append_epoch()
        number = self._ends[whole] + (epochs - whole) * (self._ends[whole + 1] - self._ends[whole])
        return max(1, int(np.ceil(number / self._per_step)))

    def _micro_batch(self, number: int) -> list[RowIndex]:
        with self._lock:
            epoch, index = self._find(number)
            order, bounds = self._bounds_of(epoch)
        rows = order[bounds[index] : bounds[index + 1]]
        return [(int(group), int(row)) for group, row in rows]

    def _find(self, number: int) -> tuple[int, int]:
        """Epoch of micro-batch `number`, and its index in the epoch."""
        with self._lock:
            while self._ends[-1] <= number:
                self._append_epoch()
        epoch = int(np.searchsorted(self._ends, number, side="right")) - 1
        return epoch, number - self._ends[epoch]

    def _bounds_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """`_epoch`; the last one is kept."""
        if epoch != self._cached[0]:
            self._cached = (epoch, *self._epoch(epoch))
        return self._cached[1], self._cached[2]

    def _append_epoch(self) -> None:
        self._ends.append(self._ends[-1] + len(self._epoch(len(self._ends) - 1)[1]) - 1)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch in order, [N, 2], and where each micro-batch starts, followed by the end."""
        sizes = [len(lengths) for lengths in self._lengths]
        order = rows_of_epoch(sizes, self._seed, epoch, self._shares)
        ends = window_ends_of_epoch(sizes, self._seed, epoch, self._shares, self._window_groups)
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch, 1])))
        batches: list[np.ndarray] = []
        for rows in _windows(order, ends):
            lengths = np.array([self._lengths[group][row] for group, row in rows])
            by_length = np.argsort(lengths, kind="stable")
            cut = np.split(rows[by_length], self._cuts(lengths[by_length]))
            # a window holds the rows of a few shards: to shuffle beyond it would make the reader decode many at a time
            batches += [cut[index] for index in random.permutation(len(cut))]
        return np.concatenate(batches), np.cumsum([0, *map(len, batches)])

    def _window_groups(self, group_sizes: Sequence[int]) -> int:
        """Groups of a window: two windows of the data order where they are small and the reader keeps their shards."""
        rows = WINDOW_GROUPS * sum(group_sizes) / len(group_sizes)
        return 2 * WINDOW_GROUPS if self._shards_per_row == 1 and rows <= WINDOW_ROWS / 1.5 else WINDOW_GROUPS

    def _cuts(self, lengths: np.ndarray) -> list[int]:
        """Where to cut ascending `lengths` into micro-batches."""
        cuts, start = [], 0
        for index, length in enumerate(lengths.tolist()):
            if (index + 1 - start) * length * self._sequences > self._budget:
                cuts.append(index)
                start = index
        return cuts


def _windows(order: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    """The rows between two `ends`, in parts of equal size where they are many."""
    for rows in np.split(order, ends[:-1]):
        yield from np.array_split(rows, max(1, round(len(rows) / WINDOW_ROWS)))
