"""The order in which rows are read: a pure function of (seed, epoch, sizes)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: groups (shards) whose rows are mixed with each other; a reader keeps twice as many decoded
WINDOW_GROUPS = 8


def epoch_order(group_sizes: Sequence[int], seed: int, epoch: int, window: int = WINDOW_GROUPS) -> np.ndarray:
    """Every row once, as [N, 2] pairs (group, row inside the group).

    Groups are permuted, then rows are permuted inside windows of `window` groups, so that a reader touches few groups
    at a time. The order depends on nothing else, such as the number of ranks or what was read before.
    """
    random = _random(seed, epoch)
    groups = random.permutation(len(group_sizes))
    parts = []
    for start in range(0, len(groups), window):
        pairs = np.concatenate(
            [
                np.stack([np.full(group_sizes[group], group), np.arange(group_sizes[group])], axis=1)
                for group in groups[start : start + window]
            ]
        )
        parts.append(random.permutation(pairs, axis=0))
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def window_ends(group_sizes: Sequence[int], seed: int, epoch: int, window: int = WINDOW_GROUPS) -> np.ndarray:
    """Rows of `epoch_order` up to the end of each window that has rows, ascending.

    With `window` a multiple of the one that the rows were permuted in, the ends of every second, third, ... window.
    """
    groups = _random(seed, epoch).permutation(len(group_sizes))
    rows = np.cumsum(np.asarray(group_sizes, np.int64)[groups])
    ends = np.unique(np.append(rows[window - 1 :: window], rows[-1:]))
    return ends[ends > 0]


def _random(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
