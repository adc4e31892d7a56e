"""Locks that are lost, stolen or misread, and the memory of a reader."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpkd.core.errors import UserError
from dpkd.teacher_cache.build.ray.replica import _ReplicaJob
from dpkd.teacher_cache.store import locks
from dpkd.teacher_cache.store.folder import MANIFEST, Folder, LocalFolder
from dpkd.teacher_cache.store.folders import RemoteFolder, open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.shards import ShardRecord
from dpkd.teacher_cache.store.tables import ShardRows


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


def test_a_process_id_means_something_in_its_own_boot_and_namespace(
    s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Process 2^22 does not run here; elsewhere it may."""
    monkeypatch.setattr(locks, "STALE_S", 0.5)
    monkeypatch.setattr(locks, "_SETTLE_S", 0.0)
    folder = open_folder(f"{s3}/namespaces")
    me = os.getpid()
    for lock, watched in (
        (lock_of(pid=2**22), False),
        (lock_of(pid=2**22, pid_namespace="pid:[1]"), True),
        (lock_of(pid=2**22, boot="another"), True),
        (lock_of(pid=2**22, host="elsewhere"), True),
    ):
        folder.write(locks.LOCK, lock)
        with locks.hold(folder):
            assert ("watching the lock" in capsys.readouterr().err) == watched
    folder.write(locks.LOCK, lock_of(pid=me, started="before"))  # of a process that had our number
    with locks.hold(folder):
        pass
    folder.write(locks.LOCK, lock_of(pid=me, started=locks._started(me)))
    capsys.readouterr()
    with pytest.raises(UserError, match=f"found process {me}"), locks.hold(folder):
        pass
    assert capsys.readouterr().err == ""  # it runs: nothing to watch


def test_clocks_of_other_machines_do_not_matter(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that lives is not robbed, and a dead one's lock is taken, whether clocks are behind or ahead."""
    monkeypatch.setattr(locks, "_SETTLE_S", 0.0)
    folder = open_folder(f"{s3}/clocks")
    for ahead_s in (-180.0, 0.0, 180.0, 86400.0):
        monkeypatch.setattr(locks, "STALE_S", 60.0)  # longer than a renewal takes on a busy machine
        renewed = time.time() - ahead_s
        folder.write(locks.LOCK, lock_of(host="elsewhere", renewed=renewed))
        watch = locks.Watch(folder)
        assert watch.holder() == "process 7 on elsewhere"
        refused = pytest.raises(UserError, match="another dpkd job is writing")
        with renewing(folder, renewed), refused, locks.hold(folder):
            pass
        monkeypatch.setattr(locks, "STALE_S", 0.6)
        assert json.loads(folder.read(locks.LOCK))["host"] == "elsewhere"
        assert watch.holder() == "process 7 on elsewhere"
        with locks.hold(folder):
            assert json.loads(folder.read(locks.LOCK))["pid"] == os.getpid()
        folder.write(locks.LOCK, lock_of(host="elsewhere", renewed=time.time() + ahead_s))
        watch = locks.Watch(folder)
        assert watch.holder() is not None
        time.sleep(0.7)
        assert watch.holder() is None


@contextlib.contextmanager
def renewing(folder: Folder, renewed: float) -> Iterator[None]:
    """Another machine renews its lock, whose first time was `renewed`, again and again."""
    ended = threading.Event()

    def renew() -> None:
        times = 0
        while not ended.wait(0.2):
            times += 1
            folder.write(locks.LOCK, lock_of(host="elsewhere", renewed=renewed + times * locks.RENEW_S))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


PARENT = """
import multiprocessing, os, subprocess, sys, time
from pathlib import Path
from dpkd.teacher_cache.build.ray.replica import _ReplicaJob
from dpkd.teacher_cache.store import locks
from dpkd.teacher_cache.store.folder import LocalFolder

def work():
    print(os.getpid(), flush=True)
    time.sleep(60)

with locks.hold(LocalFolder(Path(sys.argv[1]))):
    if sys.argv[2] == "fork":
        if os.fork() == 0:
            work()
    elif sys.argv[2] == "multiprocessing":
        multiprocessing.get_context("fork").Process(target=work).start()
    else:
        print(subprocess.Popen(["sleep", "60"], close_fds=False).pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["fork", "multiprocessing", "exec"])
def test_a_child_that_outlives_the_job_holds_no_lock(tmp_path: Path, how: str) -> None:
    """Workers of engines are such children."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), how], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"found process {parent.pid}"), locks.hold(LocalFolder(tmp_path)):
            pass
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # it lives
        with locks.hold(LocalFolder(tmp_path)):
            pass
    finally:
        parent.stdout.close()
        os.kill(child, signal.SIGKILL)


class PausedWriter:
    """Runs `accident` between the last look at the lock and the write that follows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: RemoteFolder, accident: Callable[[], None]) -> None:
        def pause_then(method: Callable[..., bool]) -> Callable[..., bool]:
            def call(*arguments: object) -> bool:
                todo, self.accidents = self.accidents, []
                for act in todo:
                    act()
                return method(*arguments)

            return call

        self.accidents = [accident]
        monkeypatch.setattr(folder, "create", pause_then(folder.create))
        monkeypatch.setattr(folder, "replace", pause_then(folder.replace))


@pytest.mark.parametrize("left_behind", [None, b"half a shard"])
def test_a_paused_job_that_lost_its_lock_cannot_overwrite_the_winners_shard(
    s3: str, monkeypatch: pytest.MonkeyPatch, left_behind: bytes | None
) -> None:
    folder = open_folder(f"{s3}/paused-{left_behind is None}")
    assert isinstance(folder, RemoteFolder)
    record = ShardRecord("shards/a.parquet", "teacher", "", 4, 1, 0, 0, 0.0, 0)
    loser = Job(folder, "teacher-cache", {})
    with loser.opened("", {"teacher": 1}):
        if left_behind is not None:
            folder.write(record.path, left_behind)

        def lose() -> None:
            other = open_folder(str(folder))
            other.write(locks.LOCK, lock_of(host="elsewhere", token="winner"))
            winner = Job(other, "teacher-cache", {})
            winner.lock = locks.Lock(other, "winner")
            winner.commit(b"won!", record)

        with monkeypatch.context() as context:
            PausedWriter(context, folder, lose)
            with pytest.raises(UserError, match="has taken over this directory: found process 7 on elsewhere"):
                loser.commit(b"late", record)
        assert folder.read(record.path) == b"won!"
        assert len(folder.sizes("ledger")) == 1
        with pytest.raises(UserError, match="has taken over this directory"):
            loser.finish([])
        assert not folder.exists(MANIFEST)


def test_a_replica_commits_under_the_lock_of_its_driver(s3: str, tmp_path: Path) -> None:
    for location in (f"{s3}/replica", str(tmp_path / "replica")):
        driver = Job(open_folder(location), "teacher-cache", {})
        record = ShardRecord("shards/a.parquet", "teacher", "", 4, 1, 0, 0, 0.0, 0)
        with driver.opened("", {"teacher": 2}):
            assert driver.lock is not None
            lock = locks.Lock(open_folder(location), driver.lock.token)
            replica = _ReplicaJob(open_folder(location), "teacher-cache", lock)
            replica.commit(b"data", record)
            driver.folder.write(locks.LOCK, lock_of(host="elsewhere"))
            with pytest.raises(UserError, match="has taken over this directory"):
                replica.commit(b"late", replace(record, path="shards/b.parquet"))
            assert list(driver.folder.sizes("shards")) == ["shards/a.parquet"]
            assert len(driver.folder.sizes("ledger")) == 1


def test_the_winner_replaces_what_a_paused_job_wrote_late(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way round: the late shard comes first, without its record."""
    folder = open_folder(f"{s3}/late")
    assert isinstance(folder, RemoteFolder)
    record = ShardRecord("shards/a.parquet", "teacher", "", 4, 1, 0, 0, 0.0, 0, 0, [], [])
    winner = Job(folder, "teacher-cache", {})
    with winner.opened("", {"teacher": 1}):
        PausedWriter(monkeypatch, folder, lambda: open_folder(str(folder)).write(record.path, b"late"))
        winner.commit(b"won!", record)
        assert folder.read(record.path) == b"won!"
        winner.finish([])


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
