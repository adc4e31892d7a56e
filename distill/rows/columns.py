"""Single columns of a cache's shards, for what must be known of every row before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpkd.core.errors import UserError
from dpkd.teacher_cache.store.folder import Folder, LocalFolder
from dpkd.teacher_cache.store.shards import ShardRecord, repair_advice

#: columns that only some caches have
_OPTIONAL = ("between_ids", "teacher_prompt_ids")


def read_example_ids(folder: Folder, record: ShardRecord) -> list[str]:
    """Example ids of a shard's rows, in order."""
    ids: list[str] = read_columns(folder, record, ["example_id"])["example_id"].to_pylist()
    return ids


def read_keys(folder: Folder, record: ShardRecord) -> list[tuple[str, int]]:
    """Example id and sample number of a shard's rows, in order."""
    table = read_columns(folder, record, ["example_id", "sample"])
    return list(zip(table["example_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def read_lengths(
    folder: Folder, record: ShardRecord, sampled: int | None = None, with_response: bool = True
) -> np.ndarray:
    """Tokens of a shard's rows, prompt and response, in order.

    With `sampled`, a response of so many tokens takes the place of the row's own, or of the shorter of the two
    `with_response`.
    """
    table = read_columns(folder, record, ["prompt_ids", "response_ids", "between_ids"])
    prompts, responses, *between = (pc.list_value_length(table[name]).to_numpy() for name in table.column_names)
    if sampled is not None:
        responses = np.maximum(responses, sampled) if with_response else np.full_like(responses, sampled)
    lengths: np.ndarray = sum(between, prompts + responses)
    return lengths


def longest_prompts(folder: Folder, records: Sequence[ShardRecord]) -> tuple[int, int]:
    """Tokens of the longest prompts of these shards, the student's and the teacher's; reads all prompts once."""
    longest = {"prompt_ids": 0, "teacher_prompt_ids": 0}
    for record in records:
        table = read_columns(folder, record, [*longest])
        for name in table.column_names:
            longest[name] = max(longest[name], int(pc.max(pc.list_value_length(table[name])).as_py() or 0))
    return longest["prompt_ids"], max(longest.values())


def read_columns(folder: Folder, record: ShardRecord, names: Sequence[str]) -> pa.Table:
    """Some columns of a shard, without checking its checksum; of a local file, only their bytes are read.

    `between_ids` and `teacher_prompt_ids` are left out where the shard has no such column. Raises `UserError` when the
    shard is missing or is not Parquet with these columns.
    """
    where, advice = folder.where(record.path), repair_advice(folder, of_round=record.origin == "student")
    try:
        if isinstance(folder, LocalFolder):
            with pa.memory_map(where) as file:
                return _read(file, names)
        return _read(pa.BufferReader(folder.read(record.path)), names)
    except FileNotFoundError:
        raise UserError("a shard of the cache is missing", where=where, advice=advice) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"a shard of the cache cannot be read: {error}", where=where, advice=advice) from None


def _read(file: pa.NativeFile, names: Sequence[str]) -> pa.Table:
    parquet = pq.ParquetFile(file)
    known = parquet.schema_arrow.names
    return parquet.read(columns=[name for name in names if name in known or name not in _OPTIONAL])
