"""Locks that are lost, stolen or misread, and the memory of a reader."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpkd.core.errors import UserError
from dpkd.teacher_cache.store import locks
from dpkd.teacher_cache.store.folders import Folder, LocalFolder, open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.schema import ShardRows
from dpkd.teacher_cache.store.shards import ShardRecord


def test_a_job_that_lost_its_lock_writes_nothing_more(s3: str, tmp_path: Path) -> None:
    """At once, and not after the next renewal."""
    for location in (f"{s3}/lost-lock", str(tmp_path / "cache")):
        folder = open_folder(location)
        for found, accident in (
            ("process 7 on elsewhere", lambda folder: folder.write(locks.LOCK, lock_of(host="elsewhere"))),
            ("no job.lock", lambda folder: folder.delete(locks.LOCK)),
        ):
            job = Job(folder, "teacher-cache", {})
            with job.opened("", {"teacher": 0}):
                accident(folder)
                with pytest.raises(UserError, match=f"has taken over this directory: found {found}"):
                    job.commit(b"late", ShardRecord("shards/a", "teacher", "", 4, 0, 0, 0, 0.0, 0))
                with pytest.raises(UserError, match=f"has taken over this directory: found {found}"):
                    job.finish([])
            assert not folder.exists("shards/a")
            assert not folder.exists("manifest.json")
            folder.delete(locks.LOCK)


def lock_of(**fields: object) -> bytes:
    lock = {"host": socket.gethostname(), "pid": 7, "token": "t", "renewed": time.time()} | locks._place()
    return json.dumps(lock | fields).encode()


def test_the_same_host_in_another_process_namespace_keeps_its_lock(s3: str) -> None:
    """Process 2^22 does not run here; there it may."""
    folder = open_folder(f"{s3}/namespaces")
    for elsewhere in ({"pid_namespace": "pid:[1]"}, {"boot": "another"}):
        folder.write(locks.LOCK, lock_of(pid=2**22, **elsewhere))
        with pytest.raises(UserError, match="another dpkd job is writing"), locks.hold(folder):
            pass
    folder.write(locks.LOCK, lock_of(pid=2**22))
    with locks.hold(folder):
        pass


def test_a_clock_that_is_ahead_steals_no_live_lock(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WATCH_S", 0.5)
    monkeypatch.setattr(locks, "_SETTLE_S", 0.1)
    folder = open_folder(f"{s3}/clocks")
    old = time.time() - 180
    folder.write(locks.LOCK, lock_of(host="elsewhere", renewed=old))
    changed = []

    def renew_once(folder: Folder) -> dict[str, object] | None:
        changed.append(folder.write(locks.LOCK, lock_of(host="elsewhere", renewed=old + len(changed))))
        return read(folder)

    read = locks._read
    with monkeypatch.context() as patch:
        patch.setattr(locks, "_read", renew_once)
        with pytest.raises(UserError, match="another dpkd job is writing"), locks.hold(folder):
            pass
    assert json.loads(folder.read(locks.LOCK))["host"] == "elsewhere"
    with locks.hold(folder):  # and one that does not change is stale
        assert json.loads(folder.read(locks.LOCK))["pid"] == os.getpid()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("text")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / locks.LOCK).symlink_to(target)
    with pytest.raises(UserError, match="the lock is a symbolic link"), locks.hold(LocalFolder(tmp_path / "cache")):
        pass
    assert target.read_text() == "text"
    assert (tmp_path / "cache" / locks.LOCK).is_symlink()


def test_a_reader_does_not_copy_a_shard(toy_cache: Path) -> None:
    table = pq.read_table(next((toy_cache / "shards").glob("teacher-*.parquet")))
    before = pa.total_allocated_bytes()
    rows = ShardRows(table)
    assert len(rows) > 0
    assert pa.total_allocated_bytes() - before < table.nbytes / 10


def test_rows_that_were_not_planned_make_no_manifest(tmp_path: Path) -> None:
    job = Job(LocalFolder(tmp_path / "cache"), "teacher-cache", {})
    with job.opened("", {"teacher": 200}):
        job.commit(b"data", ShardRecord("shards/a.parquet", "teacher", "", 4, 150, 0, 0, 0.0, 0, 0, [], []))
        with pytest.raises(UserError, match=r"the committed rows are not the planned ones: found .*150.*200"):
            job.finish([])
        job.ledger.discard()
        with pytest.raises(UserError, match="the record of a shard changed while the job ran"):
            job.finish([])
    assert not (tmp_path / "cache" / "manifest.json").exists()
