"""Shards: their records, their bytes, and their rows, which are checked when they are read."""

from __future__ import annotations

import hashlib
import io
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpkd.core.errors import UserError
from dpkd.teacher_cache.store.folder import MANIFEST, Folder
from dpkd.teacher_cache.store.schema import DICTIONARY_COLUMNS, ROW_SCHEMA, column_encodings, is_row_schema
from dpkd.teacher_cache.store.tables import ShardRows


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard's entry in the manifest. `path` is relative to the directory of the cache or round.

    `positions` are response tokens, `entries` kept top-K entries, `num_bytes` is the file's size. `mass_kept` is the
    probability of the entries, summed over positions. `unfinished` counts rows that reached the length limit. `longest`
    is the longest row, prompt and response, in tokens. `lengths` counts rows by response length: index i for 2^i up to
    2^(i+1) tokens. `failed` are the rows that the engine could not answer; they are not in the shard.
    """

    path: str
    origin: str
    sha256: str
    num_bytes: int
    rows: int
    positions: int
    entries: int
    mass_kept: float
    unfinished: int
    longest: int = 0
    lengths: Sequence[int] = ()
    failed: Sequence[dict[str, Any]] = ()

    def __hash__(self) -> int:
        return hash((self.path, self.sha256))

    @property
    def stem(self) -> str:
        """How the shard's name begins, before its number."""
        return self.path.rpartition("/")[2].rpartition("-")[0]

    @property
    def num_settled(self) -> int:
        """Rows of the shard, plus the failed ones."""
        return self.rows + len(self.failed)

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> ShardRecord:
        """The record in a manifest or ledger at `where`; raises `UserError` for fields of a newer version."""
        if not values.keys() <= _RECORD_FIELDS:
            refuse_newer_fields(values, _RECORD_FIELDS, where)
        return cls(**values)


_RECORD_FIELDS = {field.name for field in fields(ShardRecord)}


def refuse_newer_fields(values: Collection[str], known: Collection[str], where: object) -> None:
    """Raise `UserError` if `values` has a field that is not `known`: only a newer dpkd can have written it."""
    if newer := sorted(set(values) - set(known)):
        raise newer_dpkd(f"the field {', '.join(newer)}", "only fields that this version knows", where)


def newer_dpkd(found: str, expected: str, where: object) -> UserError:
    """The error for something that only a newer version can read."""
    return UserError(
        "the cache was made by a newer dpkd",
        found=found,
        expected=expected,
        where=where,
        advice="Install that version: in the clone, `git pull`, then `pip install -e .`",
    )


def repair_advice(folder: Folder, *, of_round: bool) -> str:
    """What to do about a bad shard in `folder`, which is that of a cache or of its round."""
    cache = re.sub("/rounds/[^/]+$", "", str(folder)) if of_round else str(folder)
    return f"Run `dpkd cache repair {shlex.quote(cache)}`: it makes only the bad shards again"


def encode_shard(
    table: pa.Table, path: str, origin: str, failed: Sequence[dict[str, Any]] = ()
) -> tuple[bytes, ShardRecord]:
    """The bytes of a shard and its record. Equal tables give equal bytes (with one pyarrow version)."""
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        compression_level=1,
        use_dictionary=DICTIONARY_COLUMNS,
        column_encoding=column_encodings(table.schema),
        store_schema=False,
        write_statistics=False,
        row_group_size=max(table.num_rows, 1),
    )
    data = buffer.getvalue()
    log_tail = pc.list_flatten(table["log_remainder"]).to_numpy()
    response_lengths = pc.list_value_length(table["response_ids"]).to_numpy()
    prompt_lengths = pc.list_value_length(table["prompt_ids"]).to_numpy()
    between = pc.list_value_length(table["between_ids"]).to_numpy() if "between_ids" in table.column_names else 0
    entries = int(pc.sum(pc.list_value_length(table["entry_ids"])).as_py() or 0)
    record = ShardRecord(
        path=path,
        origin=origin,
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        rows=table.num_rows,
        positions=int(response_lengths.sum()),
        entries=entries,
        mass_kept=float((1.0 - np.exp(log_tail.astype(np.float64))).sum()) if entries else 0.0,
        unfinished=sum(reason == "length" for reason in table["finish_reason"].to_pylist()),
        longest=int((prompt_lengths + response_lengths + between).max(initial=0)),
        lengths=np.bincount(np.log2(np.maximum(response_lengths, 1)).astype(np.int64)).tolist(),
        failed=list(failed),
    )
    return data, record


def read_shard(folder: Folder, record: ShardRecord) -> ShardRows:
    """Read, check and decode a shard; raises `UserError` if it is missing or corrupt."""
    return ShardRows(read_table(folder, record))


def read_table(folder: Folder, record: ShardRecord, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a shard (of some `columns`), checked; raises `UserError` if the shard is missing or corrupt."""
    return _parse(check_shard(folder, record), folder.where(record.path), columns)


def read_shards(folder: Folder, records: Iterable[ShardRecord]) -> Iterator[tuple[ShardRecord, ShardRows]]:
    """`read_shard` of every record in order; a thread reads one shard ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-shards") as pool:
        ahead = None
        for record in records:
            before, ahead = ahead, (record, pool.submit(read_shard, folder, record))
            if before is not None:
                yield before[0], before[1].result()
        if ahead is not None:
            yield ahead[0], ahead[1].result()


def check_shard(folder: Folder, record: ShardRecord) -> bytes:
    """The bytes of a shard; raises `UserError` if they are missing or not those that were committed."""
    path = folder.where(record.path)
    try:
        data = folder.read(record.path)
    except FileNotFoundError:
        raise UserError("a shard of the cache is missing", where=path, advice=_advice(folder, record)) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        raise UserError(
            "a shard of the cache is corrupt (checksum mismatch)",
            found=f"sha256 {digest[:16]}… of {len(data)} bytes",
            expected=f"{record.sha256[:16]}… of {record.num_bytes} bytes",
            where=path,
            advice=_advice(folder, record),
        )
    return data


def _advice(folder: Folder, record: ShardRecord) -> str:
    if folder.exists(MANIFEST):
        return repair_advice(folder, of_round=record.origin == "student")
    return "Delete the file, then run the command that wrote it again: it makes the shard again"


def _parse(data: bytes, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data))
        table = parquet.read(columns=columns)
    except pa.ArrowInvalid as error:
        raise UserError(f"the shard is not a Parquet file: {error}", where=path) from None
    if not is_row_schema(parquet.schema_arrow):
        raise UserError(
            "the shard has the wrong schema", found=parquet.schema_arrow.names, expected=ROW_SCHEMA.names, where=path
        )
    return table
