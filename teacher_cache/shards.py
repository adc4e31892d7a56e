"""Shards on disk: written whole or not at all, committed by a record of their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.files import write_atomic
from dpkd.teacher_cache.schema import COLUMN_ENCODINGS, DICTIONARY_COLUMNS, ROW_SCHEMA, ShardRows


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What the manifest knows of a shard. `path` is relative to the cache (or round) directory.

    `positions` are response tokens, `entries` kept top-K entries, `num_bytes` the file's size; `mass_kept` is the
    probability inside the entries summed over positions; `unfinished` counts rows that ended by length.
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


def encode_shard(table: pa.Table, path: str, origin: str) -> tuple[bytes, ShardRecord]:
    """The bytes of a shard and its record. Equal tables give equal bytes (with one pyarrow version)."""
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        compression_level=6,
        use_dictionary=DICTIONARY_COLUMNS,
        column_encoding=COLUMN_ENCODINGS,
        store_schema=False,
        write_statistics=False,
        row_group_size=max(table.num_rows, 1),
    )
    data = buffer.getvalue()
    log_remainder = table["log_remainder"].combine_chunks().flatten().to_numpy()
    positions = len(table["response_ids"].combine_chunks().flatten())
    entries = len(table["entry_ids"].combine_chunks().flatten())
    record = ShardRecord(
        path=path,
        origin=origin,
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        rows=table.num_rows,
        positions=positions,
        entries=entries,
        mass_kept=float((1.0 - np.exp(log_remainder.astype(np.float64))).sum()) if entries else 0.0,
        unfinished=sum(reason == "length" for reason in table["finish_reason"].to_pylist()),
    )
    return data, record


def read_shard(directory: Path, record: ShardRecord) -> ShardRows:
    """Read, check and decode a shard; raises `UserError` when it is missing or not what was written."""
    return ShardRows(_parse(check_shard(directory, record), directory / record.path))


def check_shard(directory: Path, record: ShardRecord) -> bytes:
    """The shard's bytes when they are the ones that were committed, else `UserError`."""
    path = directory / record.path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError("a shard of the cache is missing", where=path, advice=REBUILD) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        raise UserError(
            "a shard of the cache is not what was written",
            found=f"sha256 {digest[:16]}… of {len(data)} bytes",
            expected=f"{record.sha256[:16]}… of {record.num_bytes} bytes",
            where=path,
            advice=REBUILD,
        )
    return data


REBUILD = "Restore the file, or delete the directory and build it again with `dpkd cache-teacher`"


def _parse(data: bytes, path: Path) -> pa.Table:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowInvalid as error:
        raise UserError(f"the shard is not Parquet: {error}", where=path) from None
    if not table.schema.equals(ROW_SCHEMA):
        raise UserError("the shard has another schema", found=table.schema.names, expected=ROW_SCHEMA.names, where=path)
    return table


def record_from_json(value: dict[str, Any]) -> ShardRecord:
    """Inverse of `dataclasses.asdict` for a record."""
    return ShardRecord(**value)


class Ledger:
    """Which shards of an unfinished directory are committed: one small file each, written after the shard.

    A shard without a record was cut off by a kill and is written again. Records are files of their own rather than
    lines of one, so that several writers need no lock and a torn write touches one shard alone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records_dir = directory / "ledger"

    def committed(self) -> dict[str, ShardRecord]:
        """Records by shard path. A record that cannot be read counts as absent: its shard is written again."""
        records = {}
        for file in sorted(self._records_dir.glob("*.json")):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = record_from_json(json.loads(file.read_text(encoding="utf-8")))
                if (self._directory / record.path).is_file():
                    records[record.path] = record
        return records

    def commit(self, data: bytes, record: ShardRecord) -> None:
        """Write the shard, then the record that makes it count."""
        write_atomic(self._directory / record.path, data)
        name = record.path.replace("/", "--").removesuffix(".parquet") + ".json"
        write_atomic(self._records_dir / name, json.dumps(asdict(record)).encode())

    def discard(self) -> None:
        """Remove the records, once the manifest holds them."""
        for file in self._records_dir.glob("*.json"):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._records_dir.rmdir()
