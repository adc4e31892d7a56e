"""Caches of made-up responses, and how often their shards are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dpkd.teacher_cache.engines.engine import EngineResult
from dpkd.teacher_cache.store import shards as shards_module
from dpkd.teacher_cache.store.folder import Folder, LocalFolder
from dpkd.teacher_cache.store.manifest import Manifest
from dpkd.teacher_cache.store.reader import Round, TeacherCache
from dpkd.teacher_cache.store.rows import Origin, PlannedRow
from dpkd.teacher_cache.store.shards import ShardRecord, encode_shard
from dpkd.teacher_cache.store.tables import to_table

#: example id, sample, log-prob of every token
Response = tuple[str, int, list[float]]


def write_shards(
    folder: LocalFolder, origin: Origin, stem: str, rows: Sequence[Response | None], size: int
) -> list[ShardRecord]:
    """Rows as shards of `size`; None is a row that failed."""
    records = []
    for start in range(0, len(rows), size):
        planned = []
        for index, row in enumerate(rows[start : start + size]):
            if row is None:
                continue
            example_id, sample, logprobs = row
            ids = np.full(len(logprobs), 5, np.int32)
            result = EngineResult(index, ids, "stop", np.array(logprobs, np.float32), None)
            planned.append((PlannedRow(index, example_id, sample, origin, "", [1, 2]), result, ""))
        data, record = encode_shard(to_table(planned), f"shards/{stem}-{start // size:06d}.parquet", origin)
        folder.write(record.path, data)
        records.append(record)
    return records


def cache_of(
    directory: Path,
    rows: dict[Origin, Sequence[Response]],
    students: dict[Origin, Sequence[Response | None]],
    size: int,
    end: str = "known",
) -> tuple[TeacherCache, Round]:
    """A cache with these rows, and a round with a student row, or none, for each. `end` is what it knows of EOS."""
    ours, theirs = LocalFolder(directory), LocalFolder(directory / "rounds" / "r0")
    records = [record for origin in sorted(rows) for record in write_shards(ours, origin, origin, rows[origin], size)]
    beside = [
        record for origin in sorted(rows) for record in write_shards(theirs, "student", origin, students[origin], size)
    ]
    cache = TeacherCache(ours, Manifest("teacher-cache", {"logprobs": {"end": end}}, records))
    return cache, Round("r0", theirs, Manifest("round", {}, beside))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard is read as a whole from now on, by its path."""
    reads: Counter[str] = Counter()
    real = shards_module.check_shard

    def counted(folder: Folder, record: ShardRecord) -> bytes:
        reads[folder.where(record.path)] += 1
        return real(folder, record)

    monkeypatch.setattr(shards_module, "check_shard", counted)
    return reads
