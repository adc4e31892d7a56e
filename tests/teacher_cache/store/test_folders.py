"""Caches by URL, with the guarantees of a local one, on a real S3 server and fsspec's memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from support.commands import Command

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store import locks
from dpkd.teacher_cache.store.folder import LocalFolder
from dpkd.teacher_cache.store.folders import RemoteFolder, open_folder
from dpkd.teacher_cache.store.reader import TeacherCache


def config(out: str, teacher: Path, data: Path, **options: object) -> CacheConfig:
    defaults: dict[str, object] = {
        "engine": "transformers",
        "template": "chat",
        "max_new_tokens": 8,
        "top_k": 8,
        "rows_per_shard": 3,
        "limit": 8,
    }
    return CacheConfig(out=out, teacher=str(teacher), data=str(data), **(defaults | options))


@pytest.fixture(params=["local", "file", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = request.node.name.replace("[", "-").replace("]", "")
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{name}"
    return {"local": f"{tmp_path}/{name}", "file": f"file://{tmp_path}/{name}", "memory": f"memory://{name}"}[
        request.param
    ]


def test_a_folder_reads_what_was_written(location: str) -> None:
    folder = open_folder(location)
    assert folder.sizes() == {}
    assert not folder.exists("a/b")
    with pytest.raises(FileNotFoundError):
        folder.read("a/b")
    folder.write("a/b", b"one")
    folder.write("a/b", b"three")
    folder.write("c", b"x" * 3_000_000)
    assert folder.read("a/b") == b"three"
    assert folder.read_range("a/b", 1, 4) == b"hre"
    assert folder.read_range("c", 2_999_990, 4_000_000) == b"x" * 10
    assert folder.read_range("a/b", 20, 30) == b""
    with pytest.raises(FileNotFoundError):
        folder.read_range("a/b/c", 0, 1)
    assert folder.read_many(["c", "a/b", "nothing"]) == {"c": b"x" * 3_000_000, "a/b": b"three"}
    assert folder.sizes() == {"a/b": 5, "c": 3_000_000}
    assert folder.sizes("a") == {"a/b": 5}
    assert folder.child("a").sizes() == {"b": 5}
    assert folder.child("a").read("b") == b"three"
    folder.delete("a")
    folder.delete("nothing")
    assert folder.sizes() == {"c": 3_000_000}


def test_a_cache_by_url_is_the_cache_of_a_directory(
    location: str, tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> None:
    manifest = build_cache(config(location, toy_teacher, toy_data))
    local = build_cache(config(str(tmp_path / "elsewhere"), toy_teacher, toy_data))
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in local.shards]
    assert verify_cache(location) == {"rows": 8, "shards": 3, "rounds": 0}
    folder = open_folder(location)
    assert sorted(folder.sizes()) == ["dpkd.toml", "manifest.json", *(shard.path for shard in manifest.shards)]

    build_cache(config(location, toy_teacher, toy_data, student=str(toy_student), round="r0"))
    assert TeacherCache.open(location).round_names == ["r0"]
    run = train(
        TrainConfig(
            cache=location, student=str(toy_student), out=tmp_path / "run", steps=2, batch_size=4, device="cpu",
            level="sequence", round="r0",
        )
    )  # fmt: skip
    assert (run / "model.safetensors").is_file()

    path = manifest.shards[1].path
    data = bytearray(folder.read(path))
    data[len(data) // 2] ^= 4
    folder.write(path, bytes(data))
    with pytest.raises(UserError, match="is corrupt"):
        verify_cache(location)
    with pytest.raises(UserError, match="finished cache with other options"):
        build_cache(config(location, toy_teacher, toy_data, seed=5))
    folder.delete(path)
    with pytest.raises(UserError, match="missing or incomplete: found no file"):
        TeacherCache.open(location)


@pytest.mark.engine
def test_a_killed_job_resumes_in_an_object_store(s3: str, toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    out = f"{s3}/killed"
    words = (
        "cache-teacher", "--teacher", toy_teacher, "--data", toy_data, "--out", out, "--engine", "transformers",
        "--template", "chat", "--max-new-tokens", 300, "--max-prompt-tokens", 200, "--top-k", 16,
        "--set", "rows_per_shard=2",
    )  # fmt: skip
    folder = open_folder(out)
    process = Command(*words)
    deadline_s = time.monotonic() + 120
    while len(folder.sizes("ledger")) < 2:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # alive, and no further while the second one starts
    second = Command(*words).finish()
    assert second.returncode == 2
    assert f"another dpkd job is writing to this directory: found process {process.pid} on" in second.stderr
    process.kill()
    kept = folder.read_many(folder.sizes("ledger"))
    assert kept
    assert not folder.exists("manifest.json")

    again = Command(*words).finish()
    assert again.returncode == 0, again.stderr
    assert f"the lock of process {process.pid} on" in again.stderr
    assert "is stale (that process no longer runs); taking it over" in again.stderr
    cache = TeacherCache.open(out)
    shards = {shard.path: shard for shard in cache.manifest.shards}
    for content in kept.values():
        record = json.loads(content)
        assert shards[record["path"]].sha256 == record["sha256"]  # nothing committed was lost or made again
    verify_cache(out)
    seen = [cache.read(record).row(i).example_id for record in cache.shards() for i in range(record.rows)]
    assert len(seen) == len(set(seen)) == 20


def test_a_lock_refuses_the_second_and_knows_a_stale_one(
    location: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "_SETTLE_S", 0.1)
    monkeypatch.setattr(locks, "STALE_S", 0.5)
    folder = open_folder(location)
    assert locks.Watch(folder).holder() is None
    with locks.hold(folder) as lock:
        me = f"process {os.getpid()} on {socket.gethostname()}"
        assert locks.Watch(folder).holder() == me
        message = f"another dpkd job is writing to this directory: found {me}"
        with pytest.raises(UserError, match=message), locks.hold(folder):
            pass
        lock.check()
    assert not folder.exists(locks.LOCK)
    # of a host that renews it no more, and of one that does, whatever their clocks say
    held = {"host": "elsewhere", "pid": 7, "token": "t", "renewed": time.time() + 1000}
    folder.write(locks.LOCK, json.dumps(held).encode())
    with locks.hold(folder):
        pass
    assert "the lock of process 7 on elsewhere" in capfd.readouterr().err
    folder.write(locks.LOCK, json.dumps(held | {"renewed": time.time() - 1000}).encode())
    renewal = threading.Timer(0.2, folder.write, (locks.LOCK, json.dumps(held).encode()))
    renewal.start()
    with pytest.raises(UserError, match="found process 7 on elsewhere"), locks.hold(folder):
        pass
    renewal.join()


def test_a_lost_lock_stops_the_job(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEW_S", 0.1)
    folder = open_folder(f"{s3}/lost")
    with locks.hold(folder) as lock:
        other = {"host": "elsewhere", "pid": 7, "token": "t", "renewed": time.time()}
        folder.write(locks.LOCK, json.dumps(other).encode())
        time.sleep(0.5)
        with pytest.raises(UserError, match="another dpkd job has taken over this directory: found process 7"):
            lock.check()
    assert folder.exists(locks.LOCK)  # it is the other's now


def test_urls_without_a_driver_and_stores_that_refuse_are_errors(s3: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the URL cannot be used"):
        open_folder("carrierpigeon://coop/cache")
    with pytest.raises(UserError, match=r"the storage returned an error: .*nosuchbucket"):
        open_folder("s3://nosuchbucket/cache").write("a", b"b")
    assert isinstance(open_folder(f"file://{tmp_path}"), LocalFolder)
    assert isinstance(open_folder(s3), RemoteFolder)
