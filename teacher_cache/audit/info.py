"""`dpkd cache info`: facts about a cache."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dpkd.teacher_cache.store.manifest import Manifest
from dpkd.teacher_cache.store.reader import TeacherCache

_TEXT_CHARACTERS = 200


def describe_cache(location: str | Path, num_samples: int = 3) -> dict[str, Any]:
    """Counts, sizes (bytes), mass kept, response lengths, finish reasons, sample rows, identities, rounds.

    All but the sample rows comes from the manifest, so this is fast for a large cache too.
    """
    cache = TeacherCache.open(location)
    rounds = {name: cache.round(name).manifest for name in cache.round_names}
    return (
        _describe(cache.manifest)
        | {"samples": _samples(cache, num_samples)}
        | {"rounds": {name: _describe(manifest) for name, manifest in rounds.items()}}
    )


def _describe(manifest: Manifest) -> dict[str, Any]:
    counts = manifest.counts
    return {
        **counts,
        **manifest.densities,
        "mass_kept": manifest.mass_kept,
        "rows_by_origin": _by_origin(manifest),
        "finish_reasons": {"stop": counts["rows"] - counts["unfinished"], "length": counts["unfinished"]},
        "response_lengths": _histogram(manifest),
        "longest_row": manifest.longest,
        "skipped": len(manifest.skipped),
        "text": manifest.text,
        "failed": manifest.failed,
        "fingerprint": manifest.fingerprint,
        "identities": manifest.identities,
        "software": manifest.software,
    }


def _by_origin(manifest: Manifest) -> dict[str, int]:
    rows: Counter[str] = Counter()
    for shard in manifest.shards:
        rows[shard.origin] += shard.rows
    return dict(sorted(rows.items()))


def _histogram(manifest: Manifest) -> dict[str, int]:
    """Rows by response length in tokens, in bins that double: `1`, `2-3`, `4-7`, ..."""
    bins = [sum(column) for column in zip_longest(*(shard.lengths for shard in manifest.shards), fillvalue=0)]
    first = next((i for i, count in enumerate(bins) if count), 0)
    return {"1" if i == 0 else f"{2**i}-{2 ** (i + 1) - 1}": count for i, count in enumerate(bins) if i >= first}


def _samples(cache: TeacherCache, number: int) -> list[dict[str, Any]]:
    """The first rows of each origin in turn, texts cut short."""
    samples = []
    for record in {shard.origin: shard for shard in reversed(cache.manifest.shards)}.values():
        shard = cache.read(record)
        for index in range(min(number, len(shard))):
            row = shard.row(index)
            prompt, response = shard.texts(index)
            samples.append(
                {
                    "example_id": row.example_id,
                    "sample": row.sample,
                    "origin": row.origin,
                    "finish_reason": row.finish_reason,
                    "prompt_tokens": len(row.prompt_ids),
                    "response_tokens": len(row.response_ids),
                    "mean_logprob": float(row.response_logprobs.mean()) if len(row.response_logprobs) else None,
                    "prompt": _cut(prompt),
                    "response": _cut(response),
                }
            )
    return samples


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}…"
