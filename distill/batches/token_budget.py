"""Forward passes of like length and bounded size: rows of a window are sorted by length and cut by a token budget.

Every row is read once an epoch. A pass of short rows holds many of them and a pass of long rows few, so that a step's
mean over positions gives every token about the same weight; batches of a fixed number of sorted rows would not.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from dpkd.core.errors import UserError
from dpkd.teacher_cache.store.order import epoch_order

#: rows among which those of like length are sought: enough that passes hold little padding, few enough to stay random
WINDOW_ROWS = 1024


class TokenBatchOrder:
    """Which rows a step reads: `RowOrder` with passes of at most `budget` tokens, padding counted.

    A pure function of (seed, step, lengths, budget, passes a step): resuming needs the step alone, and the passes are
    the same whatever the number of ranks that share them. The passes of an epoch come in random order.

    Args:
        lengths_by_group: tokens of every row, prompt and response; of a pair, those of the longer response.
        sequences: sequences that a row puts into a pass: 1, or 2 for pairs.
        passes_per_step: forward passes of a step, over accumulation and ranks.
    """

    def __init__(
        self, lengths_by_group: Sequence[np.ndarray], seed: int, *, budget: int, sequences: int, passes_per_step: int
    ) -> None:
        self._lengths, self._seed, self._budget = list(lengths_by_group), seed, budget
        self._sequences, self._passes_per_step = sequences, passes_per_step
        self.num_rows = sum(map(len, self._lengths))
        longest = max(int(lengths.max(initial=0)) for lengths in self._lengths) * sequences
        if longest > budget:
            raise UserError(
                "the longest row does not fit a forward pass",
                found=f"{longest} tokens" + (" for a pair" if sequences == 2 else ""),
                expected=f"at most batch_tokens {budget}",
                advice="Raise --batch-tokens",
            )
        self._ends = [0]  # passes up to and with each epoch
        self._held = (-1, np.zeros((0, 2), np.int64), np.zeros(1, np.int64))
        self._lock = threading.RLock()  # two threads ask for rows

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of the first pass of `step`."""
        return self._find(step * self._passes_per_step)[0]

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """(group, row) of every row of `step` (from 0)."""
        return [row for rows in self.passes_of(step) for row in rows]

    def passes_of(self, step: int) -> list[list[tuple[int, int]]]:
        """(group, row) of every row of each forward pass of `step` (from 0)."""
        first = step * self._passes_per_step
        return [self._pass(number) for number in range(first, first + self._passes_per_step)]

    def num_steps(self, epochs: float) -> int:
        """Steps that read every row `epochs` times, the last step filled up from the next epoch."""
        whole = int(epochs)
        while len(self._ends) <= whole + 1:
            self._append_epoch()
        passes = self._ends[whole] + (epochs - whole) * (self._ends[whole + 1] - self._ends[whole])
        return max(1, int(np.ceil(passes / self._passes_per_step)))

    def _pass(self, number: int) -> list[tuple[int, int]]:
        with self._lock:
            epoch, place = self._find(number)
            if epoch != self._held[0]:
                self._held = (epoch, *self._epoch(epoch))
            _, order, bounds = self._held
        rows = order[bounds[place] : bounds[place + 1]]
        return [(int(group), int(row)) for group, row in rows]

    def _find(self, number: int) -> tuple[int, int]:
        """Epoch of a pass, and its place in it."""
        with self._lock:
            while self._ends[-1] <= number:
                self._append_epoch()
        epoch = int(np.searchsorted(self._ends, number, side="right")) - 1
        return epoch, number - self._ends[epoch]

    def _append_epoch(self) -> None:
        self._ends.append(self._ends[-1] + len(self._epoch(len(self._ends) - 1)[1]) - 1)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch in order, [N, 2], and where each pass begins, with the end."""
        order = epoch_order([len(lengths) for lengths in self._lengths], self._seed, epoch)
        parts: list[np.ndarray] = []
        for window in range(0, len(order), WINDOW_ROWS):
            rows = order[window : window + WINDOW_ROWS]
            lengths = np.array([self._lengths[group][row] for group, row in rows])
            by_length = np.argsort(lengths, kind="stable")
            parts += np.split(rows[by_length], self._cuts(lengths[by_length]))
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch, 1])))
        # windows hold the rows of a few shards, so passes are mixed inside a window only where shards are many
        parts = [parts[place] for place in _mixed(parts, random)]
        return np.concatenate(parts), np.cumsum([0, *map(len, parts)])

    def _cuts(self, lengths: np.ndarray) -> list[int]:
        """Where a pass ends in rising `lengths`."""
        cuts, start = [], 0
        for place, length in enumerate(lengths.tolist()):
            if (place + 1 - start) * length * self._sequences > self._budget:
                cuts.append(place)
                start = place
        return cuts


def _mixed(passes: Sequence[np.ndarray], random: np.random.Generator) -> list[int]:
    """The passes of each window in random order, windows one after the other."""
    places: list[int] = []
    window: list[int] = []
    rows = 0
    for place, part in enumerate(passes):
        window.append(place)
        rows += len(part)
        if rows >= WINDOW_ROWS or place == len(passes) - 1:
            places += random.permutation(window).tolist()
            window, rows = [], 0
    return places
