"""The student's responses that a live run has stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dpkd.distill.live.store import SAMPLES
from dpkd.teacher_cache.store.folder import LocalFolder
from dpkd.teacher_cache.store.ledger import Ledger
from dpkd.teacher_cache.store.rows import CachedRow
from dpkd.teacher_cache.store.shards import read_shard


def stored_rows(run_dir: Path) -> Iterator[CachedRow]:
    """Every scored response, block by block in the order of steps, then of ranks."""
    folder = LocalFolder(run_dir / SAMPLES)
    records = Ledger(folder).committed()
    for path in sorted(records):
        shard = read_shard(folder, records[path])
        for index in range(len(shard)):
            yield shard.row(index)
