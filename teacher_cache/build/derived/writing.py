"""Caches made from rows of other caches: what both `cache merge` and `cache filter` do."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpkd.core.identity import fingerprint
from dpkd.core.progress import Progress, say
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.request import say_complete
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import CACHE_KIND, TeacherCache
from dpkd.teacher_cache.store.rows import Origin
from dpkd.teacher_cache.store.shards import ShardRecord, encode_shard, read_table

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.manifest import Manifest


Rewrite = Callable[[str, pa.Table], pa.Table]


@dataclass(frozen=True)
class Piece:
    """The rows at `indices` of a parent's shard, in this order; `rewrite` changes their ids, by stem of the shard."""

    cache: TeacherCache
    record: ShardRecord
    indices: np.ndarray
    rewrite: Rewrite | None = None

    def table(self) -> pa.Table:
        """Its rows; raises `UserError` if the shard is not what the parent's manifest says."""
        table = read_table(self.cache.folder, self.record).take(pa.array(self.indices))
        return table if self.rewrite is None else self.rewrite(self.record.stem, table)


@dataclass(frozen=True)
class DerivedCache:
    """A cache to be made of `pieces`, in order; those of one stem fill its shards one after the other."""

    parents: Sequence[TeacherCache]
    pieces: Sequence[Piece]
    identities: dict[str, Any]

    @property
    def num_rows(self) -> dict[Origin, int]:
        """Rows by origin."""
        counts: Counter[Any] = Counter()
        for piece in self.pieces:
            counts[piece.record.origin] += len(piece.indices)
        return {origin: count for origin, count in sorted(counts.items()) if count}


def write_derived(derived: DerivedCache, out: str, config_toml: str) -> Manifest:
    """Make the cache at `out`, or resume it; a finished one is left as it is.

    Raises `UserError` if a parent's shard is corrupt, or if `out` has something else.
    """
    job = Job(open_folder(out), CACHE_KIND, derived.identities)
    with job.opened(config_toml, derived.num_rows) as manifest:
        if manifest is None:
            fill_derived(job, derived)
            manifest = job.finish([row for cache in derived.parents for row in cache.manifest.skipped])
    say_complete(f"the cache {out}", manifest)
    for cache in derived.parents:
        left = ["rounds"] if cache.round_names else []
        if failed := cache.manifest.failed:
            left.append(f"{len(failed)} failed rows")
        if left:
            say(f"not in the new cache: {' and '.join(left)} of {cache.folder}")
    return manifest


def fill_derived(job: Job, derived: DerivedCache) -> None:
    """Commit every shard that is missing in `job`."""
    rows_per_shard = int(derived.identities["layout"]["rows_per_shard"])
    with Progress("copy", sum(derived.num_rows.values()), "rows", job.num_done()) as progress:
        for stem in dict.fromkeys(piece.record.stem for piece in derived.pieces):
            pieces = [piece for piece in derived.pieces if piece.record.stem == stem and len(piece.indices)]
            if not pieces:
                continue
            layout = ShardLayout(pieces[0].record.origin, rows_per_shard, stem)
            for path, table in _missing_shards(pieces, layout, job):
                data, record = encode_shard(table, path, layout.origin)
                job.commit(data, record)
                progress.advance(table.num_rows)


def _missing_shards(pieces: Sequence[Piece], layout: ShardLayout, job: Job) -> Iterator[tuple[str, pa.Table]]:
    """Path and rows of the shards that are not committed. Reads only the parents' shards that they need, once."""
    starts = np.cumsum([0, *(len(piece.indices) for piece in pieces)]).tolist()
    read = lru_cache(maxsize=1)(lambda index: pieces[index].table())
    for number, first in enumerate(range(0, starts[-1], layout.rows_per_shard)):
        path = layout.path(number)
        if path in job.committed:
            continue
        end = min(first + layout.rows_per_shard, starts[-1])
        parts = []
        for index in range(bisect_right(starts, first) - 1, bisect_left(starts, end)):
            begin = max(first, starts[index])
            parts.append(read(index).slice(begin - starts[index], min(end, starts[index + 1]) - begin))
        yield path, pa.concat_tables(parts).combine_chunks()


def lineage_of(cache: TeacherCache) -> dict[str, Any]:
    """A parent in the lineage of a new cache: identities, fingerprint, and the checksum of its very shards."""
    rows: Counter[str] = Counter()
    for record in cache.manifest.shards:
        rows[record.origin] += record.rows
    return {
        "fingerprint": cache.fingerprint,
        "content": fingerprint([[record.path, record.sha256] for record in cache.manifest.shards]),
        "rows": dict(rows),
        "failed": len(cache.manifest.failed),
        "identities": cache.identities,
    }
