"""How the rows of several caches follow each other: by weight, and each cache in epochs of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from dpkd.core.identity import derive_seed
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.caches import RunCache
from dpkd.teacher_cache.store.order import epoch_order, window_ends

#: how many groups a window has, a multiple of `WINDOW_GROUPS`, by the rows in each group of a cache
GroupsOf = Callable[[Sequence[int]], int]

#: 2^64 divided by the golden ratio
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class CacheShares:
    """Which rows of several caches a run reads, in which order: a pure function of the arguments.

    Row n of the run is a row of the cache in whose part of [0, 1) the fractional part of u + n/phi lies. phi is the
    golden ratio, a part is as long as the cache's share of the rows, and u follows from the seed. So any stretch of
    rows is mixed alike, and after n rows a cache has given n times its share, up to a number of rows of order log n
    (Kuipers and Niederreiter 1974, chapter 2, section 3). Each cache is read in permutations of all its rows, one after
    the other.

    An epoch of the run is as many rows as the caches have together; caches of share 0 do not count and are not read.

    Args:
        group_sizes: rows in each group, by cache; the groups of all caches are numbered one after the other.
        weights: of the rows of each cache; they need not sum to 1.
        names: what the order of each cache's rows depends on, besides the seed.
    """

    def __init__(
        self, group_sizes: Sequence[Sequence[int]], weights: Sequence[float], names: Sequence[str], seed: int
    ) -> None:
        self._group_sizes = [list(sizes) for sizes in group_sizes]
        self._first_group = np.cumsum([0, *map(len, group_sizes)])
        #: rows of each cache
        self.sizes = [sum(sizes) for sizes in group_sizes]
        total = sum(weights)
        #: share of the rows that each cache gives
        self.shares = [weight / total for weight in weights]
        self._drawn = [number for number, share in enumerate(self.shares) if share > 0]
        self._seeds = [derive_seed(seed, "cache", name) for name in names]
        self._start = np.uint64(derive_seed(seed, "caches", bits=64))
        ends = np.cumsum([self.shares[number] for number in self._drawn])[:-1]
        self._ends = np.array([min(round(float(end) * 2**64), 2**64 - 1) for end in ends], np.uint64)
        self.num_rows = sum(self.sizes[number] for number in self._drawn)
        self._before = [np.zeros(len(self.sizes), np.int64)]  # rows of each cache before each epoch of the run
        self._cached: tuple[int, list[np.ndarray]] = (-1, [])
        self._lock = threading.RLock()  # the loader's thread and the log read it

    def caches_of(self, start: int, count: int) -> np.ndarray:
        """The cache of each of rows `start` to `start + count - 1` of the run."""
        numbers = np.arange(start, start + count, dtype=np.uint64)
        turns = numbers * _GOLDEN + self._start  # modulo 2^64
        return np.array(self._drawn)[np.searchsorted(self._ends, turns, side="right")]

    def epoch(self, epoch: int) -> np.ndarray:
        """The rows of an epoch of the run as [N, 2] pairs (group, row inside the group)."""
        with self._lock:
            positions, before = self._positions(epoch), self._rows_before_epoch(epoch)
        rows = np.zeros((self.num_rows, 2), np.int64)
        for number in self._drawn:
            rows[positions[number]] = self._stretch(number, int(before[number]), len(positions[number]))
        return rows

    def rows_before(self, position: int) -> list[int]:
        """How many rows of each cache are among the first `position` rows of the run."""
        epoch, inside = divmod(position, self.num_rows)
        with self._lock:
            positions, before = self._positions(epoch), self._rows_before_epoch(epoch)
        return [
            int(count + np.searchsorted(of_cache, inside)) for count, of_cache in zip(before, positions, strict=True)
        ]

    def window_ends(self, epoch: int, groups_of: GroupsOf) -> np.ndarray:
        """Rows of an epoch up to each end of a window of groups of any cache, and up to the epoch's end, ascending.

        The windows of a cache end with each of its own epochs, so between two ends no row comes twice.
        """
        with self._lock:
            positions, before = self._positions(epoch), self._rows_before_epoch(epoch)
        ends = [np.array([self.num_rows])]
        for number in self._drawn:
            size, start, count = self.sizes[number], int(before[number]), len(positions[number])
            sizes, seed = self._group_sizes[number], self._seeds[number]
            for own in range(start // size, (start + count) // size + 1):
                inside = own * size + window_ends(sizes, seed, own, groups_of(sizes)) - start
                ends.append(positions[number][inside[(inside > 0) & (inside <= count)] - 1] + 1)
        return np.unique(np.concatenate(ends))

    def _stretch(self, number: int, start: int, count: int) -> np.ndarray:
        """Rows `start` to `start + count - 1` of the stream of a cache's own epochs."""
        size, parts = self.sizes[number], []
        for epoch in range(start // size, (start + count - 1) // size + 1):
            order = epoch_order(self._group_sizes[number], self._seeds[number], epoch)
            parts.append(order[max(start - epoch * size, 0) : start + count - epoch * size])
        rows = np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)
        return rows + np.array([self._first_group[number], 0])

    def _positions(self, epoch: int) -> list[np.ndarray]:
        """Where the rows of each cache are in an epoch of the run; the last one is kept."""
        if epoch != self._cached[0]:
            caches = self.caches_of(epoch * self.num_rows, self.num_rows)
            self._cached = epoch, [np.flatnonzero(caches == number) for number in range(len(self.sizes))]
        return self._cached[1]

    def _rows_before_epoch(self, epoch: int) -> np.ndarray:
        while len(self._before) <= epoch:
            caches = self.caches_of((len(self._before) - 1) * self.num_rows, self.num_rows)
            self._before.append(self._before[-1] + np.bincount(caches, minlength=len(self.sizes)))
        return self._before[epoch]


def open_shares(caches: Sequence[RunCache], config: TrainConfig) -> CacheShares | None:
    """How the rows of several caches follow each other; None for one cache."""
    if len(caches) < 2:
        return None
    return CacheShares(
        [cache.rows.group_sizes for cache in caches],
        [_row_weight(cache, config) for cache in caches],
        [cache.reader.fingerprint for cache in caches],
        config.seed,
    )


def _row_weight(cache: RunCache, config: TrainConfig) -> float:
    if cache.choice.weight is None:
        return float(sum(cache.rows.group_sizes))
    return cache.choice.weight / (_mean_tokens(cache, config) if config.cache_weights == "tokens" else 1)


def _mean_tokens(cache: RunCache, config: TrainConfig) -> float:
    """Response tokens of a row, mean over the cache (or over its round, where only that is learnt from)."""
    assert cache.finished is not None
    shards = cache.finished.shards(config.origin)
    if cache.student_round is not None and not config.needs_pairs and config.mix is None:
        shards = [cache.student_round.shards_by_path[shard.path] for shard in shards]
    return sum(shard.positions for shard in shards) / max(sum(shard.rows for shard in shards), 1)


def shares_note(caches: Sequence[RunCache], shares: CacheShares, num_rows: float) -> str:
    """One line about several caches: their shares of the rows, and how often `num_rows` rows read each of them."""
    texts = []
    for cache, size, share in zip(caches, shares.sizes, shares.shares, strict=True):
        held_out = "" if cache.split is None or cache.split.validation is not None else ", no held-out examples"
        epochs = f"{size} rows read {share * num_rows / size:.2g} times" if share else "not trained on"
        texts.append(f"{cache.choice.name} {share:.1%} of the rows ({epochs}{held_out})")
    return f"caches: {'; '.join(texts)}"
