"""`dpkd cache verify`: check the whole content of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.progress import Progress
from dpkd.teacher_cache.store.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.store.folder import Folder
from dpkd.teacher_cache.store.manifest import changed_files
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow
from dpkd.teacher_cache.store.shards import ShardRecord, read_shards
from dpkd.teacher_cache.store.tables import ShardRows


def verify_cache(location: str | Path) -> dict[str, int]:
    """Check manifests, checksums and every value of a cache and its rounds; returns the number of rows, shards, rounds.

    Raises `UserError` at the first problem, with its shard and row.
    """
    cache = TeacherCache.open(location)
    rounds = [cache.round(name) for name in cache.round_names]
    parts = [(cache.folder, cache.manifest), *((part.folder, part.manifest) for part in rounds)]
    num_rows = sum(manifest.counts["rows"] for _, manifest in parts)
    with Progress("verify", num_rows, "rows") as progress:
        for folder, manifest in parts:
            seen: set[int] = set()
            # opening a round has checked that it has the cache's shards
            for (record, shard), ours in zip(read_shards(folder, manifest.shards), cache.manifest.shards, strict=True):
                scored = manifest.identities["logprobs"].get("responses") != "unknown"
                _verify_shard(shard, record, folder.where(record.path), cache.vocab_size, progress, scored=scored)
                _check_unique(seen, shard, record, folder)
                if manifest is not cache.manifest:
                    _check_same_rows(cache.read(ours), shard, folder.where(record.path))
    for folder, manifest in parts:
        for name in changed_files(folder, manifest):
            raise UserError(
                "a file of the cache is not as it was when the cache was built (checksum mismatch)",
                where=folder.where(name),
                advice="All rows are sound. Restore the file if you still need to know the options",
            )
    return {
        "rows": num_rows,
        "shards": sum(len(manifest.shards) for _, manifest in parts),
        "rounds": len(rounds),
    }


def _verify_shard(
    shard: ShardRows, record: ShardRecord, where: str, vocab_size: int, progress: Progress, *, scored: bool
) -> None:
    actual = dict.fromkeys(("positions", "entries", "unfinished", "longest"), 0)
    for index in range(len(shard)):
        row = shard.row(index)
        for problem in row_problems(row, vocab_size, scored=scored):
            raise UserError(f"row {index} ({row.example_id}): {problem}", where=where)
        actual["positions"] += len(row.response_ids)
        actual["entries"] += 0 if row.distributions is None else len(row.distributions.ids_E)
        actual["unfinished"] += row.finish_reason == "length"
        actual["longest"] = max(actual["longest"], row.num_tokens)
        progress.advance()
    actual["rows"] = len(shard)
    expected = {name: getattr(record, name) for name in actual}
    if actual != expected:
        raise UserError(
            "the shard's rows differ from the counts in the manifest",
            found=actual,
            expected=expected,
            where=where,
        )


def _check_unique(seen: set[int], shard: ShardRows, record: ShardRecord, folder: Folder) -> None:
    """Raise `UserError` for a row that appears twice. Only hashes are kept, because ids need much memory."""
    stem = record.path.rpartition("-")[0]
    for index in range(len(shard)):
        key = hash((stem, *shard.key(index)))
        if key in seen:
            example_id, sample = shard.key(index)
            raise UserError(
                f"row {index} ({example_id}, sample {sample}) appears twice", where=folder.where(record.path)
            )
        seen.add(key)


def _check_same_rows(ours: ShardRows, theirs: ShardRows, where: str) -> None:
    """Raise `UserError` unless a round has the cache's rows, in the same order and with the same prompts."""
    indices = [ours.index_of.get(theirs.key(index), -1) for index in range(len(theirs))]
    same_order = -1 not in indices and indices == sorted(indices)
    if not same_order or any(
        not np.array_equal(ours.row(ours_index).prompt_ids, theirs.row(index).prompt_ids)
        for index, ours_index in enumerate(indices)
    ):
        raise UserError("the round's rows are not those of the cache", where=where)


def row_problems(row: CachedRow, vocab_size: int, *, scored: bool = True) -> Iterator[str]:
    """The problems of a row's values; none for a valid row. A cache of texts alone is not `scored`."""
    parts = {"prompt": row.prompt_ids, "response": row.response_ids, "teacher's prompt": row.asked_ids}
    if row.between_ids is not None:
        parts["text between spans"] = row.between_ids
    for name, ids in parts.items():
        if not len(ids):
            yield f"the {name} is empty"
        elif ids.min() < 0 or ids.max() >= vocab_size:
            yield f"a {name} id is outside the vocabulary of {vocab_size}"
    if len(row.response_logprobs) != (len(row.response_ids) if scored else 0):
        yield f"{len(row.response_ids)} response ids have {len(row.response_logprobs)} log-probs"
    elif not (np.isfinite(row.response_logprobs).all() and (row.response_logprobs <= 1e-5).all()):
        yield "a response log-prob is not a finite number <= 0"
    yield from _span_problems(row)
    sampling = row.sampling_logprobs
    if sampling is not None and not (len(sampling) == len(row.response_ids) and np.isfinite(sampling).all()):
        yield "the sampling log-probs are not one finite number a response token"
    top = row.distributions
    if top is None:
        return
    if len(top.counts_T) != len(row.response_ids) or len(top.log_tail_T) != len(row.response_ids):
        yield "the distributions do not cover every response token"
        return
    if top.counts_T.sum() != len(top.ids_E) or len(top.ids_E) != len(top.logprobs_E):
        yield "the entry counts do not add up"
        return
    if len(top.ids_E) and (top.ids_E.min() < 0 or top.ids_E.max() >= vocab_size):
        yield f"an entry id is outside the vocabulary of {vocab_size}"
    if np.isnan(top.log_tail_T).any() or (top.log_tail_T > 1e-6).any():
        yield "the tail mass is above 1 or not a number"
    position_E = np.repeat(np.arange(len(top.counts_T)), top.counts_T)
    rising = np.diff(top.logprobs_E) > 0
    if (rising & (np.diff(position_E) == 0)).any():
        yield "entries are not in rank order"
    mass_T = np.bincount(position_E, np.exp(top.logprobs_E.astype(np.float64)), minlength=len(top.counts_T))
    if (mass_T > np.exp(MAX_ERROR_NATS) + 1e-5).any():
        yield "the entries of a position have more mass than 1"


def _span_problems(row: CachedRow) -> Iterator[str]:
    """The problems of a row's spans, which lie one after the other behind the prompt and end with the sequence."""
    if row.spans is None:
        return
    ends = row.spans.sum(axis=1)
    before = np.concatenate([[len(row.prompt_ids)], ends[:-1]])
    if (row.spans[:, 1] < 1).any() or row.spans[:, 1].sum() != len(row.response_ids):
        yield "the spans do not have the response's tokens"
    elif row.spans[0, 0] != before[0] or ends[-1] != row.num_tokens or (row.spans[1:, 0] < before[1:]).any():
        yield f"the spans overlap or lie outside the row: {row.spans.tolist()} of {row.num_tokens} tokens"
