"""Single columns of a cache's shards, for what must be known of every row before the first step."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpkd.core.errors import UserError
from dpkd.teacher_cache.store.folder import Folder, LocalFolder
from dpkd.teacher_cache.store.shards import ShardRecord, repair_advice

#: columns that only some caches have
_OPTIONAL = ("between_ids", "teacher_prompt_ids")
_LENGTHS = ("prompt_ids", "response_ids", "between_ids")
_FOOTER_BYTES = 64 * 1024  # what pyarrow reads of the end of a file, to find its footer there
_REQUESTS = 8  # at a time, of an object store

T = TypeVar("T")


def read_each(read: Callable[[Folder, ShardRecord], T], folder: Folder, records: Iterable[ShardRecord]) -> list[T]:
    """`read` of every shard, in order; of several at a time in an object store, where each request waits."""
    if isinstance(folder, LocalFolder):
        return [read(folder, record) for record in records]
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="read-columns") as pool:
        return list(pool.map(partial(read, folder), records))


def read_example_ids(folder: Folder, record: ShardRecord) -> list[str]:
    """Example ids of a shard's rows, in order."""
    ids: list[str] = read_columns(folder, record, ["example_id"])["example_id"].to_pylist()
    return ids


def read_keys(folder: Folder, record: ShardRecord) -> list[tuple[str, int]]:
    """Example id and sample number of a shard's rows, in order."""
    return _keys(read_columns(folder, record, ["example_id", "sample"]))


def read_lengths(
    folder: Folder, record: ShardRecord, sampled: int | None = None, with_response: bool = True
) -> np.ndarray:
    """Tokens of a shard's rows, prompt and response, in order.

    With `sampled`, a response of so many tokens takes the place of the row's own, or of the shorter of the two
    `with_response`.
    """
    prompts, responses, between = _lengths(read_columns(folder, record, _LENGTHS))
    if sampled is not None:
        responses = np.maximum(responses, sampled) if with_response else np.full_like(responses, sampled)
    return prompts + responses + between


def read_keyed_lengths(folder: Folder, record: ShardRecord) -> list[tuple[tuple[str, int], int]]:
    """`read_keys` of a shard's rows, each with its `read_lengths`, in order."""
    table = read_columns(folder, record, ["example_id", "sample", *_LENGTHS])
    prompts, responses, between = _lengths(table)
    return list(zip(_keys(table), (prompts + responses + between).tolist(), strict=True))


def _keys(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["example_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def _lengths(table: pa.Table) -> list[np.ndarray]:
    """Tokens of prompts, of responses and between spans; 0 where there are no spans."""
    found = {name: pc.list_value_length(table[name]).to_numpy() for name in _LENGTHS if name in table.column_names}
    return [found.get(name, np.zeros(table.num_rows, np.int32)) for name in _LENGTHS]


def longest_prompts(folder: Folder, records: Sequence[ShardRecord]) -> tuple[int, int]:
    """Tokens of the longest prompts of these shards, the student's and the teacher's; reads all prompts once."""
    found = read_each(_longest_prompts, folder, records)
    student = max((longest for longest, _ in found), default=0)
    return student, max((longest for _, longest in found), default=student)


def _longest_prompts(folder: Folder, record: ShardRecord) -> tuple[int, int]:
    """Tokens of the longest prompt of a shard: the student's, and the longer one of the student's and the teacher's."""
    table = read_columns(folder, record, ["prompt_ids", "teacher_prompt_ids"])
    longest = [int(pc.max(pc.list_value_length(column)).as_py() or 0) for column in table.columns]
    return longest[0], max(longest)


def read_columns(folder: Folder, record: ShardRecord, names: Sequence[str]) -> pa.Table:
    """Some columns of a shard, without checking its checksum. Only their bytes and the footer are read.

    `between_ids` and `teacher_prompt_ids` are left out where the shard has no such column. Raises `UserError` when the
    shard is missing or is not Parquet with these columns.
    """
    where, advice = folder.where(record.path), repair_advice(folder, of_round=record.origin == "student")
    try:
        if isinstance(folder, LocalFolder):
            with pa.memory_map(where) as file:
                return _read(file, names)
        # columns that lie side by side become one request
        return _read(pa.PythonFile(_RangedFile(folder, record), mode="r"), names, pre_buffer=True)
    except FileNotFoundError:
        raise UserError("a shard of the cache is missing", where=where, advice=advice) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"a shard of the cache cannot be read: {error}", where=where, advice=advice) from None


def _read(file: pa.NativeFile, names: Sequence[str], *, pre_buffer: bool = False) -> pa.Table:
    parquet = pq.ParquetFile(file, pre_buffer=pre_buffer)
    known = parquet.schema_arrow.names
    return parquet.read(columns=[name for name in names if name in known or name not in _OPTIONAL])


class _RangedFile(io.RawIOBase):
    """A shard in an object store, of which each read is a request for these bytes alone.

    The end of the file, with Parquet's footer, is read once. fsspec's own files read ahead: they would fetch all of it.
    """

    def __init__(self, folder: Folder, record: ShardRecord) -> None:
        self._folder, self._path, self._size = folder, record.path, record.num_bytes
        self._position = 0
        self._end_start = max(self._size - _FOOTER_BYTES, 0)
        self._end = folder.read_range(record.path, self._end_start, self._size + 1)
        if len(self._end) != self._size - self._end_start:
            raise OSError(f"the file does not have the {self._size} bytes that were committed")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= self._end_start:
            data = self._end[start - self._end_start : end - self._end_start]
        else:
            data = self._folder.read_range(self._path, start, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
