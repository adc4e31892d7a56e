"""Micro-batches of similar lengths and bounded size: rows are sorted by length in windows and cut by a token budget.

Every row is read once an epoch. A micro-batch of short rows holds many of them and one of long rows few, so that a
step's mean over positions weighs every token about equally. Batches of a fixed number of sorted rows would not do that.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from dpkd.core.errors import UserError
from dpkd.distill.batches.order import RowOrder, rows_of_epoch
from dpkd.distill.batches.shares import CacheShares
from dpkd.distill.rows.row import RowIndex

#: rows that are sorted together: enough for little padding, few enough to keep the order random
WINDOW_ROWS = 1024


class TokenBatchOrder(RowOrder):
    """A `RowOrder` whose micro-batches have at most `budget` tokens, padding included, in random order.

    A pure function of (seed, step, lengths, budget, micro-batches a step): resuming needs the step alone, and the
    micro-batches are the same for any number of ranks that share them.

    Args:
        lengths_by_group: tokens of every row, prompt and response; of a pair, tokens of its longer sequence.
        sequences: sequences of a row: 1, or 2 for pairs, for each live sample of a row.
        micro_batches_per_step: over accumulation and ranks.
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
        shares: CacheShares | None = None,
    ) -> None:
        self._lengths, self._seed, self._budget = list(lengths_by_group), seed, budget
        self._sequences, self._per_step = sequences, micro_batches_per_step
        self._shares = shares
        # copies of a row have its length: in one window they would make micro-batches of one row
        self._window = WINDOW_ROWS if shares is None else min(WINDOW_ROWS, shares.rows_without_repeats)
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
        order = rows_of_epoch([len(lengths) for lengths in self._lengths], self._seed, epoch, self._shares)
        batches: list[np.ndarray] = []
        for window in range(0, len(order), self._window):
            rows = order[window : window + self._window]
            lengths = np.array([self._lengths[group][row] for group, row in rows])
            by_length = np.argsort(lengths, kind="stable")
            batches += np.split(rows[by_length], self._cuts(lengths[by_length]))
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch, 1])))
        # a window holds the rows of a few shards: to shuffle beyond it would make the reader decode many at a time
        batches = [batches[index] for index in _shuffled(batches, self._window, random)]
        return np.concatenate(batches), np.cumsum([0, *map(len, batches)])

    def _cuts(self, lengths: np.ndarray) -> list[int]:
        """Where to cut ascending `lengths` into micro-batches."""
        cuts, start = [], 0
        for index, length in enumerate(lengths.tolist()):
            if (index + 1 - start) * length * self._sequences > self._budget:
                cuts.append(index)
                start = index
        return cuts


def _shuffled(batches: Sequence[np.ndarray], window_rows: int, random: np.random.Generator) -> list[int]:
    """Indices of the micro-batches, in random order inside each window."""
    order: list[int] = []
    window: list[int] = []
    rows = 0
    for index, batch in enumerate(batches):
        window.append(index)
        rows += len(batch)
        if rows >= window_rows or index == len(batches) - 1:
            order += random.permutation(window).tolist()
            window, rows = [], 0
    return order
