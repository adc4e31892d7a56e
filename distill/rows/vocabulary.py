"""Padded vocabularies: teacher and student share a tokenizer, and each pads its logits to a width of its own.

Ids that pad stand for nothing. A student with more logits than the teacher has their share in the remainder. One with
fewer has no log-prob for the teacher's last ids: where the cache keeps such an entry, its mass goes to the remainder
(outcomes are merged, see `divergences.align`), and a row whose text holds such an id is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import torch

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.distill.batches.batch import Batch
from dpkd.distill.rows.held_out import read_columns
from dpkd.teacher_cache.store.folders import Folder
from dpkd.teacher_cache.store.reader import CacheReader
from dpkd.teacher_cache.store.schema import CachedRow
from dpkd.teacher_cache.store.shards import ShardRecord


def check_width(student: ModelSource, teacher_width: int) -> bool:
    """Whether the student has fewer logits than the teacher, which is said aloud."""
    width = student.vocab_size
    if width >= teacher_width:
        return False
    say(
        f"the student has {width} logits and the teacher {teacher_width}: "
        f"what the teacher gives to ids from {width} on counts to the remainder"
    )
    return True


def check_narrower(student: ModelSource, cache: CacheReader, shards: Iterable[tuple[Folder, ShardRecord]]) -> None:
    """Raise `UserError`, with their number, when rows of `shards` hold ids that a narrower student has no place for."""
    if not check_width(student, cache.vocab_size):
        return
    width = student.vocab_size
    num_rows, largest = 0, -1
    for folder, record in shards:
        table = read_columns(folder, record, ["prompt_ids", "response_ids"])
        beyond = np.zeros(table.num_rows, bool)
        for column in table.columns:
            ids_of_rows = column.combine_chunks()
            ids, row = ids_of_rows.flatten().to_numpy(), pc.list_parent_indices(ids_of_rows).to_numpy()
            beyond[row[ids >= width]] = True
            largest = max(largest, int(ids.max(initial=-1)))
        num_rows += int(beyond.sum())
    if num_rows:
        raise _no_place(f"{num_rows} rows with ids up to {largest}", width, largest, str(cache.folder))


def check_data(student: ModelSource, rows: Sequence[CachedRow], where: str) -> None:
    """Raise `UserError`, with their number, when `rows` of data hold ids that the student has no embedding for.

    A tokenizer may have more tokens than its model: ones that were added without widening it.
    """
    width = student.vocab_size
    largest_of_rows = [max(int(row.prompt_ids.max(initial=-1)), int(row.response_ids.max(initial=-1))) for row in rows]
    num_rows = sum(largest >= width for largest in largest_of_rows)
    if num_rows:
        largest = max(largest_of_rows)
        raise _no_place(f"{num_rows} of {len(rows)} rows with ids up to {largest}", width, largest, where, "data")


def narrowed(batch: Batch, num_logits: int) -> Batch:
    """`batch` as a student of `num_logits` logits can read it: entries with higher ids are part of the remainder.

    Raises `UserError` for a row with such an id in its text, and where no entry of a position would be left.
    """
    largest = int(batch.input_ids_BS.max())
    if largest >= num_logits:
        rows = (batch.input_ids_BS >= num_logits).any(dim=1).nonzero()[:, 0].tolist()
        names = ", ".join(batch.example_ids[row] for row in rows[:8])
        raise _no_place(f"id {largest}", num_logits, largest, f"rows {names}")
    if batch.entry_ids_TK is None:
        return batch
    assert batch.entry_logprobs_TK is not None
    assert batch.log_tail_T is not None
    beyond_TK = batch.entry_ids_TK >= num_logits
    if not bool(beyond_TK.any()):
        return batch
    kept_TK = (batch.entry_ids_TK >= 0) & ~beyond_TK
    counts_T = kept_TK.sum(dim=1)
    lost_T = beyond_TK.any(dim=1) & (counts_T == 0)  # rejected responses have no entries to begin with
    if bool(lost_T.any()):
        row = int(batch.row_T[lost_T.nonzero()[0, 0]])
        raise UserError(
            "at a position the teacher keeps nothing but ids that the student has no logit for",
            found="no entry",
            expected="at least one entry that is a token",
            where=f"row {batch.example_ids[row]}",
            advice="Build the cache with a larger --top-k",
        )
    # kept entries move up, in their order, as a position's entries stand without gaps
    order_TK = (~kept_TK).to(torch.int8).argsort(dim=1, stable=True)
    kept_TK = kept_TK.gather(1, order_TK)
    outside_T = batch.entry_logprobs_TK.masked_fill(~beyond_TK, -torch.inf).logsumexp(dim=1)
    return replace(
        batch,
        entry_ids_TK=batch.entry_ids_TK.gather(1, order_TK).masked_fill(~kept_TK, -1),
        entry_logprobs_TK=batch.entry_logprobs_TK.gather(1, order_TK).masked_fill(~kept_TK, -torch.inf),
        entry_counts_T=counts_T,
        log_tail_T=torch.logaddexp(batch.log_tail_T, outside_T),
    )


def _no_place(found: str, num_logits: int, largest: int, where: str, what: str = "cache") -> UserError:
    return UserError(
        f"the {what} holds text with token ids that the student has no place for",
        found=found,
        expected=f"ids below {num_logits}",
        where=where,
        advice=f"Widen the student with `resize_token_embeddings({largest + 1})` of transformers and train that",
    )
