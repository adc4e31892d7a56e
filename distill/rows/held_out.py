"""Validation examples: chosen once for a cache, the same for every objective, round and choice of responses."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from dpkd.core.errors import UserError
from dpkd.distill.rows.columns import read_each, read_example_ids
from dpkd.distill.rows.row import RowSource
from dpkd.distill.rows.views import SubsetRows
from dpkd.teacher_cache.store.reader import CacheReader, TeacherCache


def choose_examples(example_ids: Iterable[str], num_examples: int, seed: int) -> frozenset[str]:
    """The `num_examples` ids with the smallest sha256 of seed and id; order and repetition of ids do not matter.

    Raises `UserError` when no example would be left to train on.
    """
    distinct = set(example_ids)
    if num_examples >= len(distinct):
        raise UserError(
            "validation leaves no example to train on",
            found=f"validation_examples {num_examples}",
            expected=f"fewer than the {len(distinct)} examples of the cache",
            advice="Lower --validation-examples",
        )
    by_hash = sorted(distinct, key=lambda example_id: hashlib.sha256(f"{seed}/{example_id}".encode()).digest())
    return frozenset(by_hash[:num_examples])


def cache_examples(cache: TeacherCache) -> frozenset[str]:
    """The ids of all examples of a cache, including those that failed in a round. Reads this column once."""
    ids = read_each(read_example_ids, cache.folder, cache.shards())
    return frozenset(conversation_of(cache, name) for of_shard in ids for name in of_shard)


def conversation_of(cache: CacheReader, example_id: str) -> str:
    """The example that a row belongs to: that of `ID/turn-2` is `ID` where a cache was asked turn by turn."""
    return re.sub(r"/turn-\d+$", "", example_id) if "turns" in cache.identities["generation"] else example_id


def split_rows(
    source: RowSource, ids_by_group: Sequence[Sequence[str]], held_out: Collection[str]
) -> tuple[SubsetRows, SubsetRows]:
    """Rows to train on, and rows of the `held_out` examples; `ids_by_group` is the example id of every row.

    Raises `UserError` when one of the two is empty.
    """
    masks = [np.array([example_id in held_out for example_id in ids], bool) for ids in ids_by_group]
    training = SubsetRows(source, [np.flatnonzero(~mask) for mask in masks])
    validation = SubsetRows(source, [np.flatnonzero(mask) for mask in masks])
    for rows, purpose in ((training, "train on"), (validation, "validate on")):
        if not rows.group_sizes:
            raise UserError(
                f"no row is left to {purpose}",
                found=f"{sum(map(len, masks))} rows, {len(held_out)} examples held out",
                advice="Change --validation-examples, or train on more rows (--responses, --round)",
            )
    return training, validation
