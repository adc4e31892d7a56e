"""Students whose embeddings or logits are fewer than the ids of the cache or the data.

Teacher and student share a tokenizer, but each pads its logits to a width of its own. Padding ids mean nothing. A wider
student's extra logits belong to the tail. A narrower student has no logit for the teacher's last ids: entries with such
ids become part of the tail (`dpkd.distill.batches.batch.narrowed`), and text that contains them is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pyarrow.compute as pc

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.distill.rows.columns import read_columns, read_each
from dpkd.teacher_cache.store.folder import Folder
from dpkd.teacher_cache.store.reader import CacheReader
from dpkd.teacher_cache.store.rows import CachedRow
from dpkd.teacher_cache.store.shards import ShardRecord


def check_width(student: ModelSource, teacher_width: int) -> bool:
    """Whether the student has fewer logits than the teacher; if so, prints a line about it."""
    width = student.vocab_size
    if width >= teacher_width:
        return False
    say(
        f"the student has {width} logits and the teacher {teacher_width}: "
        f"the teacher's probability of ids {width} and above counts as tail mass"
    )
    return True


def check_narrower(student: ModelSource, cache: CacheReader, shards: Iterable[tuple[Folder, ShardRecord]]) -> None:
    """Raise `UserError`, with their number, when rows of `shards` contain ids that a narrower student lacks."""
    if not check_width(student, cache.vocab_size):
        return
    width = student.vocab_size
    num_rows, largest = 0, -1
    for folder, pairs in itertools.groupby(shards, key=lambda pair: pair[0]):
        read = partial(_rows_beyond, width=width)
        for num_beyond, largest_of_shard in read_each(read, folder, [record for _, record in pairs]):
            num_rows, largest = num_rows + num_beyond, max(largest, largest_of_shard)
    if num_rows:
        found = f"{num_rows} rows with ids up to {largest}"
        raise ids_without_embedding("cache", found, width, largest, where=cache.folder)


def _rows_beyond(folder: Folder, record: ShardRecord, *, width: int) -> tuple[int, int]:
    """How many rows of a shard have ids of `width` and above, and its largest id."""
    table, largest = read_columns(folder, record, ["prompt_ids", "response_ids", "between_ids"]), -1
    beyond = np.zeros(table.num_rows, bool)
    for column in table.columns:
        ids_of_rows = column.combine_chunks()
        ids, row = ids_of_rows.flatten().to_numpy(), pc.list_parent_indices(ids_of_rows).to_numpy()
        beyond[row[ids >= width]] = True
        largest = max(largest, int(ids.max(initial=-1)))
    return int(beyond.sum()), largest


def check_data(student: ModelSource, rows: Sequence[CachedRow], where: str) -> None:
    """Raise `UserError`, with their number, when `rows` of data contain ids that the student has no embedding for.

    A tokenizer may have more tokens than its model, when tokens were added without widening the model.
    """
    width = student.vocab_size
    largest_of_rows = [int(row.sequence_ids().max(initial=-1)) for row in rows]
    num_rows = sum(largest >= width for largest in largest_of_rows)
    if num_rows:
        largest = max(largest_of_rows)
        found = f"{num_rows} of {len(rows)} rows with ids up to {largest}"
        raise ids_without_embedding("data", found, width, largest, where=where)


def check_corpus(student: ModelSource, blocks_BS: np.ndarray, where: str) -> None:
    """The check of `check_data` for blocks of a corpus, as they are read."""
    if (largest := int(blocks_BS.max())) >= student.vocab_size:
        raise ids_without_embedding("corpus", f"id {largest}", student.vocab_size, largest, where=where)


def ids_without_embedding(what: str, found: str, num_logits: int, largest: int, *, where: object) -> UserError:
    """The error for text of `what` with ids up to `largest`, for a student of `num_logits` logits."""
    return UserError(
        f"the {what} contains token ids that the student has no embedding for",
        found=found,
        expected=f"ids below {num_logits}",
        where=where,
        advice=f"Widen the student with `resize_token_embeddings({largest + 1})` of transformers and train that",
    )
