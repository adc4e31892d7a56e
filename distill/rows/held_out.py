"""Examples that are held out of training: chosen once for a cache, whatever is learnt from it and with which round."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import RowSource, TrainingRow
from dpkd.teacher_cache.store.folders import Folder, LocalFolder
from dpkd.teacher_cache.store.reader import Round, TeacherCache
from dpkd.teacher_cache.store.shards import REBUILD, ShardRecord


class SubsetRows:
    """Some rows of a source, its groups kept together; groups of which no row is left are dropped."""

    def __init__(self, source: RowSource, places_by_group: Sequence[np.ndarray]) -> None:
        kept = [(group, places.astype(np.int32)) for group, places in enumerate(places_by_group) if len(places)]
        self._source, self._groups = source, kept
        self.group_sizes = [len(places) for _, places in kept]

    @property
    def longest(self) -> int:
        """Tokens of the source's longest row: none of these is longer."""
        return self._source.longest

    def row(self, group: int, index: int) -> TrainingRow:
        """Row `index` of those that are left of a group."""
        held, places = self._groups[group]
        return self._source.row(held, int(places[index]))

    def lengths_by_group(self) -> list[np.ndarray]:
        """See `RowSource`."""
        lengths = self._source.lengths_by_group()
        return [lengths[group][places] for group, places in self._groups]


def choose_examples(example_ids: Iterable[str], num_examples: int, seed: int) -> frozenset[str]:
    """The `num_examples` ids with the smallest sha256 of (seed, id): neither order nor repetition matters.

    Raises `UserError` when that leaves nothing to train on.
    """
    distinct = set(example_ids)
    if num_examples >= len(distinct):
        raise UserError(
            "validation leaves no example to train on",
            found=f"validation_examples {num_examples}",
            expected=f"fewer than the {len(distinct)} examples of the cache",
            advice="Lower --validation-examples",
        )
    return frozenset(sorted(distinct, key=lambda example_id: _rank(seed, example_id))[:num_examples])


def _rank(seed: int, example_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{example_id}".encode()).digest()


def choose_of_cache(cache: TeacherCache, num_examples: int, seed: int) -> frozenset[str]:
    """`choose_examples` among all examples of a cache, so that a row that failed in one round moves no other."""
    return choose_examples(
        (example_id for record in cache.shards() for example_id in read_example_ids(cache.folder, record)),
        num_examples,
        seed,
    )


def split_rows(
    source: RowSource, ids_by_group: Sequence[Sequence[str]], held_out: Collection[str]
) -> tuple[SubsetRows, SubsetRows]:
    """Rows to train on, and those of the `held_out` examples; `ids_by_group` has the example id of every row.

    Raises `UserError` when one of the two is empty.
    """
    inside = [np.array([example_id in held_out for example_id in ids], bool) for ids in ids_by_group]
    training = SubsetRows(source, [np.flatnonzero(~mask) for mask in inside])
    validation = SubsetRows(source, [np.flatnonzero(mask) for mask in inside])
    for rows, purpose in ((training, "train on"), (validation, "validate on")):
        if not rows.group_sizes:
            raise UserError(
                f"no row is left to {purpose}",
                found=f"{sum(map(len, inside))} rows, {len(held_out)} examples held out",
                advice="Change --validation-examples, or train on more rows (--responses, --round)",
            )
    return training, validation


def ids_by_group(cache: TeacherCache, held: Round | None, shards: Sequence[ShardRecord]) -> list[list[str]]:
    """Example id of every row that is read shard by shard: of the round's rows, where there is one."""
    if held is None:
        return [read_example_ids(cache.folder, record) for record in shards]
    return [read_example_ids(held.folder, held.shards_by_path[record.path]) for record in shards]


def read_example_ids(folder: Folder, record: ShardRecord) -> list[str]:
    """Example ids of a shard's rows, in order."""
    return [str(example_id) for example_id in read_columns(folder, record, ["example_id"])["example_id"].to_pylist()]


def read_keys(folder: Folder, record: ShardRecord) -> list[tuple[str, int]]:
    """Example id and sample of a shard's rows, in order."""
    table = read_columns(folder, record, ["example_id", "sample"])
    return list(zip(table["example_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def read_lengths(folder: Folder, record: ShardRecord) -> np.ndarray:
    """Tokens of a shard's rows, prompt and response, in order."""
    table = read_columns(folder, record, ["prompt_ids", "response_ids"])
    lengths: np.ndarray = sum(pc.list_value_length(table[name]).to_numpy() for name in table.column_names)
    return lengths


def read_columns(folder: Folder, record: ShardRecord, names: Sequence[str]) -> pa.Table:
    """Some columns of a shard; of a local file, only their bytes are read. The checksum is not looked at.

    Raises `UserError` when the shard is missing or is no Parquet with these columns.
    """
    where = folder.where(record.path)
    try:
        if isinstance(folder, LocalFolder):
            with pa.memory_map(where) as file:
                return pq.read_table(file, columns=list(names))
        return pq.read_table(pa.BufferReader(folder.read(record.path)), columns=list(names))
    except FileNotFoundError:
        raise UserError("a shard of the cache is missing", where=where, advice=REBUILD) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"a shard of the cache cannot be read: {error}", where=where, advice=REBUILD) from None
