"""A job's rows in blocks of whole shards, which Ray Data distributes to the replicas."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Set
from dataclasses import asdict, replace

import pyarrow as pa

from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.store.rows import PlannedRow

_BLOCKS_PER_REPLICA = 2  # at least, so that a fast replica can help a slow one


def to_block(rows: list[PlannedRow]) -> pa.Table:
    """Planned rows as an Arrow table of one row: Ray Data gives replicas with a GPU rows, never a whole block.

    Without their questions as text, which only endpoints are asked.
    """
    return pa.table({"rows": [json.dumps([asdict(replace(row, question=None)) for row in rows])]})


def from_block(block: pa.Table) -> list[PlannedRow]:
    """Inverse of `to_block`."""
    return [PlannedRow(**values) for values in json.loads(block["rows"][0].as_py())]


def split_blocks(
    rows: Iterable[PlannedRow], layout: ShardLayout, committed: Set[str], most_rows: int, num_replicas: int
) -> Iterator[list[PlannedRow]]:
    """The rows of shards that are not in `committed`, in blocks of whole shards.

    A block has at most `most_rows` rows, but at least one shard. In a small job the blocks are smaller, so that every
    replica gets some.
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
