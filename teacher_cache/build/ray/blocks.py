"""A job's rows as blocks of whole shards, which Ray Data hands to the replicas."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Set

import pyarrow as pa

from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.store.schema import PlannedRow

_BLOCKS_PER_REPLICA = 2  # at least, so that a fast replica can help a slow one

_ROW_TYPE = pa.struct(
    {
        "index": pa.int64(),
        "example_id": pa.string(),
        "sample": pa.int32(),
        "origin": pa.string(),
        "prompt": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "seed": pa.int64(),
        "response_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "failed": pa.string(),
    }
)
# one row of the dataset is a whole block: to replicas with a GPU Ray Data hands a number of rows, never a block
_BLOCK_SCHEMA = pa.schema({"rows": pa.list_(_ROW_TYPE)})


def to_block(rows: list[PlannedRow]) -> pa.Table:
    """Planned rows as an Arrow table of one row."""
    values = [{field.name: getattr(row, field.name) for field in _ROW_TYPE} for row in rows]
    return pa.table([[values]], schema=_BLOCK_SCHEMA)


def from_block(block: pa.Table) -> list[PlannedRow]:
    """Inverse of `to_block`."""
    return [PlannedRow(**values) for values in block["rows"][0].as_py()]


def split_blocks(
    rows: Iterable[PlannedRow], layout: ShardLayout, committed: Set[str], most_rows: int, num_replicas: int
) -> Iterator[list[PlannedRow]]:
    """The rows of shards that are not in `committed`, in blocks of whole shards.

    A block has up to `most_rows` rows, but at least one shard; a small job has smaller ones, for every replica some.
    """
    shards = (
        list(members)
        for number, members in itertools.groupby(rows, lambda row: row.index // layout.rows_per_shard)
        if layout.path(number) not in committed
    )
    most = max(1, most_rows // layout.rows_per_shard)
    least_blocks = _BLOCKS_PER_REPLICA * num_replicas
    head = list(itertools.islice(shards, least_blocks * most))  # all of a small job
    size = max(1, len(head) // least_blocks)
    shards_again = itertools.chain(head, shards)
    while part := list(itertools.islice(shards_again, size)):
        yield list(itertools.chain.from_iterable(part))


def paths_of(rows: Iterable[PlannedRow], layout: ShardLayout) -> set[str]:
    """Paths of the shards that `rows` belong to."""
    return {layout.path(number) for number in {row.index // layout.rows_per_shard for row in rows}}
