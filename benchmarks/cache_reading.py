"""Speed of the reader against a bare pyarrow scan of the same columns, and the time to open a cache of 1,000 shards.

    python benchmarks/cache_reading.py

Both read the same files in turn, from the page cache. The scan only decodes Parquet to Arrow. The reader also checks
each shard's sha256, decodes the log-probs and returns the arrays of every row. The cache has random rows with the shape
of a real cache (64 entries per position), written by dpkd's own encoder.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.engines.engine import EngineResult
from dpkd.teacher_cache.engines.top_k import from_top_k
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import CACHE_KIND, TeacherCache
from dpkd.teacher_cache.store.rows import PlannedRow
from dpkd.teacher_cache.store.shards import encode_shard
from dpkd.teacher_cache.store.tables import to_table

_VOCAB, _TOP_K = 49152, 64


def make_cache(directory: Path, num_shards: int, rows_per_shard: int, positions: int) -> None:
    random = np.random.default_rng(0)
    layout = ShardLayout("teacher", rows_per_shard, "teacher")
    identities = {
        "teacher": {"vocab_size": _VOCAB, "name": "random"},
        "logprobs": {"top_k": _TOP_K},
        "layout": {"rows_per_shard": rows_per_shard},
    }
    job = Job(open_folder(directory), CACHE_KIND, identities)
    with job.opened("", {"teacher": num_shards * rows_per_shard}):
        for shard in range(num_shards):
            rows = []
            for index in range(shard * rows_per_shard, (shard + 1) * rows_per_shard):
                logits = np.sort(random.normal(size=(positions, _TOP_K)) * 3, axis=1)[:, ::-1]
                logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.1).astype(np.float32)
                ids = random.integers(0, _VOCAB, size=(positions, _TOP_K)).astype(np.int32)
                response, own = ids[:, 0], logprobs[:, 0]
                top = from_top_k(ids, logprobs, response, own, _VOCAB)
                planned = PlannedRow(index, f"r{index}", 0, "teacher", "a prompt", list(range(60)))
                rows.append((planned, EngineResult(index, response, "length", own, top), "a response"))
            job.commit(*encode_shard(to_table(rows), layout.path(shard), "teacher"))
        job.finish([])


def scan(directory: Path) -> int:
    return sum(pq.read_table(path).num_rows for path in sorted((directory / "shards").glob("*.parquet")))


def read(directory: Path) -> tuple[int, int]:
    cache = TeacherCache.open(directory)
    rows = tokens = 0
    for _, shard in cache.scan(cache.shards()):
        for index in range(len(shard)):
            row = shard.row(index)
            rows, tokens = rows + 1, tokens + len(row.response_ids)
    return rows, tokens


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        speed, many = Path(scratch) / "speed", Path(scratch) / "many"
        make_cache(speed, num_shards=40, rows_per_shard=128, positions=100)
        scans_s, reads_s, peaks = [], [], []
        for repeat in range(6):
            started_s = time.perf_counter()
            scan(speed)
            between_s = time.perf_counter()
            rows, tokens = read(speed)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            if repeat:
                scans_s.append(between_s - started_s)
                reads_s.append(time.perf_counter() - between_s)
        make_cache(many, num_shards=1000, rows_per_shard=2, positions=4)
        opens_s = []
        for _ in range(5):
            started_s = time.perf_counter()
            TeacherCache.open(many)
            opens_s.append(time.perf_counter() - started_s)
    scan_s, read_s = statistics.median(scans_s), statistics.median(reads_s)
    report = {
        "rows": rows,
        "response_tokens": tokens,
        "scan_rows_per_s": round(rows / scan_s),
        "reader_rows_per_s": round(rows / read_s),
        "reader_tokens_per_s": round(tokens / read_s),
        "ratio_median": round(statistics.median(s / r for s, r in zip(scans_s, reads_s, strict=True)), 3),
        "peak_MiB_after_each_pass": [round(peak) for peak in peaks],
        "open_1000_shards_s": round(statistics.median(opens_s), 3),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
