"""Training on a cache while it is being written.

The first epoch takes shards in the order in which they were committed; later epochs are permutations of the whole cache
and start when it is finished. The order of shards is appended to the run's `followed.jsonl` before any of their rows is
used, so that a resumed run, and every rank, reads the same rows at the same step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.json_lines import AppendOnlyLines
from dpkd.core.progress import say
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.rows.sources import check_positions
from dpkd.teacher_cache.store.growing import GrowingCache
from dpkd.teacher_cache.store.shards import ShardRecord

_POLL_S = 0.5


def open_growing(config: TrainConfig) -> GrowingCache:
    """The cache of `config`, once a job has started it; `UserError` when none does in `follow_timeout_s`."""
    (choice,) = config.caches  # the config's own check
    deadline_s = time.monotonic() + config.follow_timeout_s
    said = False
    while (cache := GrowingCache.open(choice.location)) is None:
        if not said:
            said = True
            say(f"waiting for `dpkd cache-teacher` to start the cache {choice.location}")
        if time.monotonic() > deadline_s:
            raise UserError(
                f"no job has started the cache in {config.follow_timeout_s:.0f} s",
                where=choice.location,
                advice="Start `dpkd cache-teacher` with this --out, then train again",
            )
        time.sleep(_POLL_S)
    return cache


class FollowedRows:
    """The rows of a growing cache as a `RowSource`, one group a shard, in the order of commitment."""

    def __init__(self, cache: GrowingCache, config: TrainConfig, max_positions: int | None) -> None:
        self._cache, self._config, self._max_positions = cache, config, max_positions
        self._origin = config.origin
        if not cache.num_rows(self._origin):
            raise UserError(
                f"the cache holds no {config.origin} responses",
                where=cache.folder,
                advice="Change --responses, or build a cache with --responses both",
            )
        self._shards: list[ShardRecord] = []
        #: rows before each shard seen so far, followed by their total
        self.offsets = [0]
        self._log: AppendOnlyLines | None = None
        self._leader = True
        self._cancelled = threading.Event()

    def start(self, run_dir: Path, *, leader: bool) -> None:
        """Read the order of shards that the run has logged. The leader looks for new shards; other ranks read its log.

        Raises `UserError` when the log cannot be read.
        """
        self._log = AppendOnlyLines(run_dir / "followed.jsonl", {"cache": self._cache.fingerprint})
        self._leader = leader
        self._read_log()
        if leader:
            self._cache.pass_over(self._shards)

    @property
    def group_sizes(self) -> list[int]:
        """Rows in each shard seen so far."""
        return [shard.rows for shard in self._shards]

    @property
    def longest(self) -> int:
        """Tokens of the longest row seen so far."""
        return max((shard.longest for shard in self._shards), default=0)

    @property
    def num_planned(self) -> int:
        """Rows that the cache has or will have, those that may fail included."""
        return self._cache.num_rows(self._origin)

    def lengths_by_group(self) -> list[np.ndarray]:
        """Unknown before the cache is finished: `TrainConfig` refuses the options that need them."""
        raise RuntimeError("a growing cache does not know the lengths of its rows")

    def row(self, group: int, index: int) -> TrainingRow:
        return TrainingRow(self._cache.read(self._shards[group]).row(index))

    def cancel(self) -> None:
        """End every wait."""
        self._cancelled.set()

    def take_new_shards(self) -> bool:
        """Look for new shards; whether the cache is finished and all of them have been seen.

        The leader appends new ones to the run's log, which the other ranks read.
        """
        if not self._leader:
            self._read_log()
            return self._cache.finished() and self.offsets[-1] >= self.num_planned
        new = [record for record in self._cache.new_shards() if self._origin in (None, record.origin)]
        if new and self._log is not None:
            self._log.append(*map(asdict, new), durable=True)
        for record in new:
            self._add(record)
        return self._cache.manifest is not None

    def wait_for(self, num_rows: int | None, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Wait until `num_rows` rows exist (None: until the cache is finished); False when it has fewer.

        Raises `KeyboardInterrupt` when `should_stop` becomes true, and `UserError` when no job writes the cache for
        `follow_timeout_s`.
        """
        said = False
        active_s = time.monotonic()
        while True:
            finished = self.take_new_shards()
            if num_rows is not None and self.offsets[-1] >= num_rows:
                return True
            if finished:
                return num_rows is None
            if self._cancelled.is_set() or should_stop():
                raise KeyboardInterrupt
            if not said:
                said = True
                seen = f"{self.offsets[-1]} of {self.num_planned} rows"
                say(f"read {seen} of the cache so far; waiting for " + ("more" if num_rows else "its manifest"))
            if self._cache.writer() is not None:
                active_s = time.monotonic()
            elif time.monotonic() - active_s > self._config.follow_timeout_s:
                raise UserError(
                    f"no job has written to the cache for {self._config.follow_timeout_s:.0f} s",
                    found=f"{self.offsets[-1]} rows",
                    expected=f"{self.num_planned}",
                    where=self._cache.folder,
                    advice="Run the same `dpkd cache-teacher` again, then the same `dpkd train`: both resume",
                )
            self._cancelled.wait(_POLL_S)

    def _read_log(self) -> None:
        if self._log is not None:
            for record in self._log.read(lambda record: ShardRecord(**record))[len(self._shards) :]:
                self._add(record)

    def _add(self, record: ShardRecord) -> None:
        check_positions(record.longest, self._max_positions, where=self._cache.folder.where(record.path))
        self._shards.append(record)
        self.offsets.append(self.offsets[-1] + record.rows)
