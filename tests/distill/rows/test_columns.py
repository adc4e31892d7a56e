"""Columns of shards in an object store: how many bytes and requests they take, and what a bad shard gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.columns import longest_prompts, read_columns, read_each, read_example_ids, read_keyed_lengths
from dpkd.distill.run.setup import open_run
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache


@pytest.fixture(scope="module")
def wide_cache(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_student: Path, toy_data: Path) -> Path:
    """A cache whose entries are nearly all of its bytes, as those of real ones, with the round `r0`."""
    out = tmp_path_factory.mktemp("wide") / "cache"
    options: dict[str, Any] = {
        "teacher": str(toy_teacher), "out": out, "engine": "transformers", "template": "chat", "max_new_tokens": 60,
        "top_k": 500, "rows_per_shard": 7, "device": "cpu",
    }  # fmt: skip
    build_cache(CacheConfig(**options, data=str(toy_data)))
    build_cache(CacheConfig(**options, student=str(toy_student), round="r0"))
    return out


@pytest.fixture
def remote(wide_cache: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(str(wide_cache), "/wide-cache", recursive=True)
    yield "memory://wide-cache"
    memory.rm("/wide-cache", recursive=True)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Path and bytes of each request for a shard from now on."""
    found: list[tuple[str, int]] = []
    real, lock = MemoryFileSystem.cat_file, threading.Lock()

    def counted(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> bytes:
        data: bytes = real(self, path, *args, **kwargs)
        if path.endswith(".parquet"):
            with lock:
                found.append((path, len(data)))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    return found


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 2),  # all examples of the cache, and those of the rows
        ({"batch_tokens": 2000}, 3),  # and lengths
        (
            {"batch_tokens": 2000, "round": "r0", "level": "sequence"},
            2,
        ),  # of a shard of the cache, and one of the round
    ],
    ids=["rows", "tokens", "pairs"],
)
def test_a_run_reads_little_before_its_first_step(
    remote: str, toy_student: Path, requests: list[tuple[str, int]], options: dict[str, Any], passes: int
) -> None:
    run = open_run(
        TrainConfig(cache=remote, student=str(toy_student), out=Path("out"), device="cpu", steps=2, **options)
    )
    cache = TeacherCache.open(remote)
    shards = cache.shards() + (cache.round("r0").manifest.shards if "round" in options else [])
    by_path: dict[str, list[int]] = {}
    for path, size in requests:
        by_path.setdefault(path, []).append(size)
    assert len(by_path) == len(shards)
    for sizes in by_path.values():
        # each time the end of the file, and the column or the few columns that are asked for
        assert sizes.count(64 * 1024) == passes
        assert len(sizes) <= 2 * passes
        assert sum(sizes) < passes * (64 * 1024 + 3000)
    assert sum(size for _, size in requests) < sum(shard.num_bytes for shard in shards)
    run.rows.row(0, 0)
    assert requests[-1][1] in {shard.num_bytes for shard in shards}  # whole, to compare its checksum


def test_columns_of_an_object_store_are_those_of_the_directory(remote: str, wide_cache: Path) -> None:
    there, here = TeacherCache.open(remote), TeacherCache.open(wide_cache)
    every = ["example_id", "prompt_ids", "entry_ids", "log_remainder", "between_ids"]
    for record in here.shards():
        assert read_columns(there.folder, record, every).equals(read_columns(here.folder, record, every))
    for read in (read_example_ids, read_keyed_lengths):
        assert read_each(read, there.folder, there.shards()) == read_each(read, here.folder, here.shards())
    assert longest_prompts(there.folder, there.shards()) == longest_prompts(here.folder, here.shards())
    record = here.shards()[0]
    lengths = dict(read_keyed_lengths(here.folder, record))
    rows = [here.read(record).row(index) for index in range(record.rows)]
    assert lengths == {(row.example_id, row.sample): row.num_tokens for row in rows}


def test_a_bad_shard_of_an_object_store_is_named(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TeacherCache.open(remote)
    record, memory = cache.shards()[1], fsspec.filesystem("memory")
    path = f"/wide-cache/{record.path}"
    whole = memory.cat_file(path)
    no_footer = whole[:-8] + b"x" * 8
    for data in (no_footer, whole[:-8], whole[:1000], whole + b"more", b""):
        memory.pipe_file(path, data)
        with pytest.raises(UserError, match=rf"a shard of the cache cannot be read: .*{record.path}"):
            read_each(read_example_ids, cache.folder, cache.shards())
    memory.rm(path)
    with pytest.raises(UserError, match=rf"a shard of the cache is missing \(in {remote}/{record.path}\)"):
        read_each(read_example_ids, cache.folder, cache.shards())
    memory.pipe_file(path, whole)
    real = MemoryFileSystem.cat_file

    def fails_later(self: MemoryFileSystem, path: str, start: int = 0, end: int | None = None) -> bytes:
        if start < 1000:
            raise ConnectionError("the network is down")
        data: bytes = real(self, path, start=start, end=end)
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails_later)
    with pytest.raises(UserError, match=r"the storage returned an error: ConnectionError: the network is down"):
        read_example_ids(cache.folder, record)
