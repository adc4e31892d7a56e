"""The columns of a shard, by format; docs/cache-format.md describes each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import pyarrow as pa

#: the newest format that this version reads
FORMAT_VERSION = 2


def _list(value_type: pa.DataType) -> pa.DataType:
    # list items are named as Parquet returns them
    return pa.list_(pa.field("element", value_type, nullable=False))


ROW_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("prompt_ids", _list(pa.int32()), nullable=False),
        pa.field("response_ids", _list(pa.int32()), nullable=False),
        pa.field("response_logprobs", _list(pa.float32()), nullable=False),
        pa.field("entry_counts", _list(pa.int32()), nullable=False),
        pa.field("entry_ids", _list(pa.int32()), nullable=False),
        pa.field("entry_logprob_steps", _list(pa.uint16()), nullable=False),
        pa.field("log_remainder", _list(pa.float32()), nullable=False),
    ]
)
#: the columns of a round's shards since format 2: how likely the student, or what else drew the response, found it
ROUND_SCHEMA = ROW_SCHEMA.append(pa.field("sampling_logprobs", _list(pa.float32()), nullable=False)).append(
    pa.field("cached_sampling_logprob", pa.float64())
)
#: columns of caches of format 2 whose rows have several spans, or other prompts for the teacher than for the student
EXTRA_COLUMNS: Final = {
    "spans": (
        pa.field("span_starts", _list(pa.int32()), nullable=False),
        pa.field("span_lengths", _list(pa.int32()), nullable=False),
        pa.field("between_ids", _list(pa.int32()), nullable=False),
    ),
    "teacher_prompt": (pa.field("teacher_prompt_ids", _list(pa.int32()), nullable=False),),
}
_SPLIT = (
    "prompt_ids",
    "response_ids",
    "response_logprobs",
    "entry_ids",
    "entry_logprob_steps",
    "log_remainder",
    "sampling_logprobs",
    "between_ids",
    "teacher_prompt_ids",
)
DICTIONARY_COLUMNS = ["origin", "finish_reason"]


def column_encodings(schema: pa.Schema) -> dict[str, str]:
    """Encodings that every Parquet reader supports: 2.3 to 2.8 bytes an entry with zstd (docs/cache-format.md)."""
    return {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _SPLIT if name in schema.names}


def format_of(kind: str, identities: Mapping[str, Any]) -> int:
    """The format that a cache or round is written in: 1, or 2 for rounds and for caches with extra columns."""
    return 2 if kind == "round" or identities.get("layout", {}).get("columns") else 1


def is_row_schema(schema: pa.Schema) -> bool:
    """Whether a shard has the columns of a cache or a round, with or without extra ones."""
    expected = ROUND_SCHEMA if "sampling_logprobs" in schema.names else ROW_SCHEMA
    return bool(schema.equals(with_extra(expected, schema.names)))


def with_extra(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    """`schema` with the extra columns that `names` has."""
    for fields in EXTRA_COLUMNS.values():
        if fields[0].name in names:
            for field in fields:
                schema = schema.append(field)
    return schema
