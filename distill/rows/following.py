"""Training on a cache while it is written: shards in the order in which they are seen, kept with the run.

The first epoch takes the rows in that order (permuted inside each shard by the seed); later epochs are permutations of
the whole cache, as always, and begin when the cache is finished. The order is written to `followed.jsonl` before a
shard is used, so that a resumed run, and every rank, reads the same rows at the same step.
"""

from __future__ import annotations

import bisect
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.files import write_atomic
from dpkd.core.progress import say
from dpkd.distill.batches.batch import TrainingRow, cut
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.sources import check_positions
from dpkd.teacher_cache.store.growing import GrowingCache
from dpkd.teacher_cache.store.order import epoch_order
from dpkd.teacher_cache.store.shards import ShardRecord, record_from_json

_POLL_S = 0.5


def open_growing(config: TrainConfig) -> GrowingCache:
    """The cache of `config`, as soon as a job has begun it; `UserError` when none does in `follow_timeout_s`."""
    assert config.cache is not None  # the config's own check
    deadline_s = time.monotonic() + config.follow_timeout_s
    said = False
    while (cache := GrowingCache.open(config.cache)) is None:
        if not said:
            said = True
            say(f"waiting for a `dpkd cache-teacher` to begin the cache {config.cache}")
        if time.monotonic() > deadline_s:
            raise UserError(
                f"no job has begun the cache in {config.follow_timeout_s:.0f} s",
                where=config.cache,
                advice="Start `dpkd cache-teacher` with this --out, then train again",
            )
        time.sleep(_POLL_S)
    return cache


class FollowedRows:
    """The rows of a growing cache, one group a shard, in the order in which shards were seen."""

    def __init__(self, cache: GrowingCache, config: TrainConfig, max_positions: int | None) -> None:
        self._cache, self._config, self._max_positions = cache, config, max_positions
        self._origin = None if config.responses == "all" else config.responses
        if not cache.num_rows(self._origin):
            raise UserError(
                f"the cache holds no {config.responses} responses",
                where=cache.folder,
                advice="Change --responses, or build a cache with --responses both",
            )
        self._shards: list[ShardRecord] = []
        self._offsets = [0]
        self._log: Path | None = None
        self._leader = True
        self._cancelled = threading.Event()

    def start(self, run_dir: Path, *, leader: bool) -> None:
        """Take up the order that the run has kept. One rank leads: it looks for shards, the others read its order."""
        self._log, self._leader = run_dir / "followed.jsonl", leader
        self._read_log()
        if leader:
            self._cache.pass_over(self._shards)
            lines = "".join(f"{json.dumps(asdict(shard))}\n" for shard in self._shards)
            write_atomic(self._log, lines.encode())  # a line that was cut off goes

    @property
    def group_sizes(self) -> list[int]:
        """Rows in each shard seen so far."""
        return [shard.rows for shard in self._shards]

    @property
    def longest(self) -> int:
        """See `RowSource.longest`; of the shards seen so far."""
        return max((shard.longest for shard in self._shards), default=0)

    @property
    def num_planned(self) -> int:
        """Rows that the cache has, or will have but for any that are set aside."""
        return self._cache.num_rows(self._origin)

    @property
    def offsets(self) -> list[int]:
        """Rows before each shard seen so far, and at the end their number."""
        return self._offsets

    def lengths_by_group(self) -> list[np.ndarray]:
        """Not known before the cache is finished: `TrainConfig` refuses what would ask for them."""
        raise RuntimeError("a growing cache does not know the lengths of its rows")

    def row(self, group: int, index: int) -> TrainingRow:
        """Row `index` of the shard that was seen as number `group`."""
        return TrainingRow(self._cache.read(self._shards[group]).row(index))

    def cancel(self) -> None:
        """End every wait."""
        self._cancelled.set()

    def is_finished(self) -> bool:
        """Whether the cache is complete and all its shards are noted."""
        return self._look()

    def wait_for(self, num_rows: int | None, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait until `num_rows` rows are there (None: until the cache is finished); False when it has no more.

        Raises `KeyboardInterrupt` when `give_up` turns true, and `UserError` when no job writes the cache and nothing
        comes for `follow_timeout_s`.
        """
        said = False
        silent_since_s = time.monotonic()
        while True:
            finished = self._look()
            if num_rows is not None and self._offsets[-1] >= num_rows:
                return True
            if finished:
                return num_rows is None
            if self._cancelled.is_set() or give_up():
                raise KeyboardInterrupt
            if not said:
                said = True
                what = f"{self._offsets[-1]} of {self.num_planned} rows are there"
                say(f"caught up with the cache ({what}); waiting for " + ("more" if num_rows else "its manifest"))
            if self._cache.writer() is not None:
                silent_since_s = time.monotonic()
            elif time.monotonic() - silent_since_s > self._config.follow_timeout_s:
                raise UserError(
                    f"no job has written to the cache for {self._config.follow_timeout_s:.0f} s",
                    found=f"{self._offsets[-1]} rows",
                    expected=f"{self.num_planned}",
                    where=self._cache.folder,
                    advice="Run the same `dpkd cache-teacher` again, then the same `dpkd train`: both go on",
                )
            self._cancelled.wait(_POLL_S)

    def _look(self) -> bool:
        """Take note of new shards; True when the cache is finished and all of them are noted."""
        if not self._leader:
            self._read_log()
            return self._cache.finished() and self._offsets[-1] >= self.num_planned
        new = [record for record in self._cache.new_shards() if self._origin in (None, record.origin)]
        finished = self._cache.manifest is not None
        if new:
            assert self._log is not None
            with self._log.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(asdict(record))}\n" for record in new)
                file.flush()
                os.fsync(file.fileno())
        for record in new:
            self._add(record)
        return finished

    def _read_log(self) -> None:
        if self._log is None or not self._log.is_file():
            return
        lines = self._log.read_text(encoding="utf-8").split("\n")[:-1]
        for line in lines[len(self._shards) :]:
            self._add(record_from_json(json.loads(line)))

    def _add(self, record: ShardRecord) -> None:
        check_positions(record.longest, self._max_positions, where=self._cache.folder.where(record.path))
        self._shards.append(record)
        self._offsets.append(self._offsets[-1] + record.rows)


class FollowOrder:
    """Which rows a step reads, as `BatchOrder` says, but that the first epoch is in the order of commitment."""

    def __init__(self, rows: FollowedRows, seed: int, global_batch_size: int, batch_size: int | None = None) -> None:
        self._rows, self._seed, self._global_batch_size = rows, seed, global_batch_size
        self._batch_size = batch_size or global_batch_size
        self.num_rows = rows.num_planned
        self._inside: dict[int, np.ndarray] = {}
        self._later = (0, np.zeros((0, 2), np.int64))

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of the first row of `step`, whose rows have been there."""
        first = step * self._global_batch_size
        return 0 if first < self._rows.offsets[-1] else first // self._rows.offsets[-1]

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """(shard, row) of every row of the global batch of `step` (from 0); waits until they are there."""
        start = step * self._global_batch_size
        return [self._place(index) for index in range(start, start + self._global_batch_size)]

    def passes_of(self, step: int) -> list[list[tuple[int, int]]]:
        """See `RowOrder`."""
        return cut(self.rows_of(step), self._batch_size)

    def _place(self, index: int) -> tuple[int, int]:
        offsets = self._rows.offsets
        if index < offsets[-1] or self._rows.wait_for(index + 1):
            group = bisect.bisect_right(offsets, index) - 1
            if group not in self._inside:
                self._inside = {group: self._permuted(group)}
            return group, int(self._inside[group][index - offsets[group]])
        epoch, place = divmod(index, offsets[-1])
        if self._later[0] != epoch:
            self._later = (epoch, epoch_order(self._rows.group_sizes, self._seed, epoch))
        group, row = self._later[1][place]
        return int(group), int(row)

    def _permuted(self, group: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, group])))
        return random.permutation(self._rows.group_sizes[group])
