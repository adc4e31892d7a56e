"""`dpkd cache verify` and `dpkd cache info`: is the cache what it claims, and what does it hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpkd.teacher_cache.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.folders import Folder
from dpkd.teacher_cache.manifest import Manifest
from dpkd.teacher_cache.progress import Progress
from dpkd.teacher_cache.reader import TeacherCache
from dpkd.teacher_cache.schema import CachedRow
from dpkd.teacher_cache.shards import ShardRecord, read_shard


def verify_cache(location: str | Path) -> dict[str, int]:
    """Check manifests, checksums and every value of a cache and its rounds; the counts that were checked.

    Raises `UserError` at the first thing that is wrong, naming shard and row.
    """
    cache = TeacherCache.open(location)
    parts = [(cache.folder, cache.manifest)]
    parts += [(held.folder, held.manifest) for held in map(cache.round, cache.round_names)]
    num_rows = sum(manifest.counts["rows"] for _, manifest in parts)
    with Progress("verify", num_rows, "rows") as progress:
        for folder, manifest in parts:
            for record in manifest.shards:
                _verify_shard(folder, record, cache, progress)
    return {
        "rows": num_rows,
        "shards": sum(len(manifest.shards) for _, manifest in parts),
        "rounds": len(parts) - 1,
    }


def _verify_shard(folder: Folder, record: ShardRecord, cache: TeacherCache, progress: Progress) -> None:
    shard = read_shard(folder, record)
    positions = entries = 0
    for index in range(len(shard)):
        row = shard.row(index)
        for problem in row_problems(row, cache.vocab_size):
            raise UserError(f"row {index} ({row.example_id}): {problem}", where=folder.where(record.path))
        positions += len(row.response_ids)
        entries += 0 if row.distributions is None else len(row.distributions.ids_E)
        progress.advance()
    found, expected = (len(shard), positions, entries), (record.rows, record.positions, record.entries)
    if found != expected:
        raise UserError(
            "rows, positions and entries are not those of the manifest",
            found=found,
            expected=expected,
            where=folder.where(record.path),
        )


def row_problems(row: CachedRow, vocab_size: int) -> Iterator[str]:
    """What is wrong with a row's values; nothing for a sound one."""
    for name, ids in (("prompt", row.prompt_ids), ("response", row.response_ids)):
        if not len(ids):
            yield f"the {name} is empty"
        elif ids.min() < 0 or ids.max() >= vocab_size:
            yield f"a {name} id stands outside the vocabulary of {vocab_size}"
    if len(row.response_logprobs) != len(row.response_ids):
        yield f"{len(row.response_ids)} response ids have {len(row.response_logprobs)} log-probs"
    elif not (np.isfinite(row.response_logprobs).all() and (row.response_logprobs <= 1e-5).all()):
        yield "a response log-prob is not a finite number <= 0"
    top = row.distributions
    if top is None:
        return
    if len(top.counts_T) != len(row.response_ids) or len(top.log_remainder_T) != len(row.response_ids):
        yield "the distributions do not cover every response token"
        return
    if top.counts_T.sum() != len(top.ids_E) or len(top.ids_E) != len(top.logprobs_E):
        yield "the entry counts do not add up"
        return
    if len(top.ids_E) and (top.ids_E.min() < 0 or top.ids_E.max() >= vocab_size):
        yield f"an entry id stands outside the vocabulary of {vocab_size}"
    if np.isnan(top.log_remainder_T).any() or (top.log_remainder_T > 1e-6).any():
        yield "a remainder is above 1 or not a number"
    position_E = np.repeat(np.arange(len(top.counts_T)), top.counts_T)
    rising = np.diff(top.logprobs_E) > 0
    if (rising & (np.diff(position_E) == 0)).any():
        yield "entries are not in rank order"
    mass_T = np.bincount(position_E, np.exp(top.logprobs_E.astype(np.float64)), minlength=len(top.counts_T))
    if (mass_T > np.exp(MAX_ERROR_NATS) + 1e-5).any():
        yield "the entries of a position hold more mass than 1"


def describe_cache(location: str | Path) -> dict[str, Any]:
    """What `dpkd cache info --json` prints: counts, sizes (bytes), mass kept, identities, rounds."""
    cache = TeacherCache.open(location)
    rounds = {name: cache.round(name).manifest for name in cache.round_names}
    return _describe(cache.manifest) | {"rounds": {name: _describe(manifest) for name, manifest in rounds.items()}}


def _describe(manifest: Manifest) -> dict[str, Any]:
    counts = manifest.counts
    per_entry = counts["bytes"] / counts["entries"] if counts["entries"] else None
    return {
        **counts,
        "bytes_per_position": counts["bytes"] / counts["positions"],
        "bytes_per_entry": per_entry,
        "mass_kept": manifest.mass_kept,
        "skipped": len(manifest.skipped),
        "fingerprint": manifest.fingerprint,
        "identities": manifest.identities,
        "software": manifest.software,
    }
