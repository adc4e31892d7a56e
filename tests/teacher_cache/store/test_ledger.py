"""Committed shards that change while no job looks are found before a cache is called complete, by a listing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dpkd.core.errors import UserError
from dpkd.teacher_cache.build.ray.replica import _ReplicaJob
from dpkd.teacher_cache.store.folder import JOB, MANIFEST, Folder, LocalFolder
from dpkd.teacher_cache.store.folders import RemoteFolder, open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.ledger import Ledger, bad_shards
from dpkd.teacher_cache.store.locks import LOCK
from dpkd.teacher_cache.store.shards import ShardRecord, check_shard

PATHS = ("shards/teacher-000000.parquet", "shards/teacher-000001.parquet")
SHARDS = {path: path.encode() * 100 for path in PATHS}


def record_of(path: str, data: bytes) -> ShardRecord:
    return ShardRecord(path, "teacher", hashlib.sha256(data).hexdigest(), len(data), 1, 0, 0, 0.0, 0, 0, [], [])


RECORDS = {path: record_of(path, data) for path, data in SHARDS.items()}


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return open_folder(tmp_path / "cache")
    return open_folder(f"{request.getfixturevalue('s3') if request.param == 's3' else 'memory:/'}/{tmp_path.name}")


def unfinished(folder: Folder) -> None:
    """Leave a job behind that has committed both of its shards and has no manifest."""
    job = Job(folder, "teacher-cache", {})
    with job.opened("", {"teacher": 2}):
        for path, data in SHARDS.items():
            job.commit(data, RECORDS[path])


def resume(folder: Folder, before_the_end: Callable[[], None] = lambda: None) -> list[str]:
    """Run the job again to its end; returns the shards that it makes."""
    job = Job(folder, "teacher-cache", {})
    with job.opened("", {"teacher": 2}) as manifest:
        assert manifest is None
        made = [path for path in PATHS if path not in job.committed]
        for path in made:
            job.commit(SHARDS[path], RECORDS[path])
        before_the_end()
        job.finish([])
    assert {path: folder.read(path) for path in PATHS} == SHARDS
    assert sorted(folder.sizes()) == ["dpkd.toml", MANIFEST, *PATHS]
    return made


def flip(folder: Folder, path: str) -> None:
    """Replace the shard by other bytes of the same size."""
    folder.write(path, SHARDS[path][:-1] + b"!")


def count_reads(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards whose bytes are read from now on."""
    reads: list[str] = []
    read = folder.read

    def read_and_note(name: str) -> bytes:
        reads.extend([name] if name.startswith("shards/") else [])
        return read(name)

    monkeypatch.setattr(folder, "read", read_and_note)
    return reads


def test_a_shard_that_is_replaced_while_no_job_runs_is_made_again(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished(folder)
    flip(folder, PATHS[1])
    assert resume(folder) == [PATHS[1]]
    message = f"{PATHS[1]} has changed since it was committed (checksum mismatch): its rows are made again"
    assert message in capsys.readouterr().err


def test_a_shard_that_is_replaced_after_the_last_commit_is_not_called_complete(folder: Folder) -> None:
    unfinished(folder)
    with pytest.raises(UserError, match="a shard changed while the job ran: found checksum mismatch, expected 2900 by"):
        resume(folder, before_the_end=lambda: flip(folder, PATHS[0]))
    assert not folder.exists(MANIFEST)
    assert resume(folder) == [PATHS[0]]


def test_a_damaged_shard_is_committed_for_no_process(folder: Folder) -> None:
    """A replica of a Ray cluster reads the ledger after the driver has resumed, and must make the shard again."""
    unfinished(folder)
    flip(folder, PATHS[1])
    driver = Job(folder, "teacher-cache", {})
    with driver.opened("", {"teacher": 2}):
        assert _ReplicaJob(folder, "teacher-cache", driver.lock).committed.keys() == {PATHS[0]}


@pytest.mark.parametrize("damaged", [False, True])
def test_records_of_0_1_0_have_no_version_and_their_shards_are_read(
    folder: Folder, damaged: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(folder)
    for name, content in folder.read_many(folder.sizes("ledger")).items():
        values = json.loads(content)
        assert values.pop("version")
        assert values.pop("checksum")
        assert ShardRecord(**values) == RECORDS[values["path"]]  # nothing else is new
        folder.write(name, json.dumps(values).encode())
    if damaged:
        flip(folder, PATHS[0])
    with monkeypatch.context() as context:
        reads = count_reads(folder, context)
        made = resume(folder, before_the_end=lambda: reads.append("the end"))
    assert made == [PATHS[0]] * damaged
    assert "compare with checksums: 2/2 committed shards" in capsys.readouterr().err
    assert sorted(reads[:2]) == sorted(PATHS)
    # those that are hashed at the start are not read again at the end, unless the store names no versions
    of_the_end = len(reads) - reads.index("the end") - 1 - len(PATHS)
    assert of_the_end == (2 if str(folder).startswith("memory:") else 0)


def test_a_record_with_a_flipped_bit_commits_nothing(folder: Folder) -> None:
    """Else a count would come into the manifest, and another sha256 would make every reader refuse the shard."""
    unfinished(folder)
    name = min(folder.sizes("ledger"))
    content = folder.read(name)
    for bit in range(0, 8 * len(content), 1 if str(folder).startswith("memory:") else 401):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        folder.write(name, bytes(flipped))
        assert Ledger(folder).committed().keys() == {PATHS[1]}, bytes(flipped)
    assert resume(folder) == [PATHS[0]]


def test_what_is_read_of_shards_that_have_not_changed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a store with ETags; on a disk each once; in a store without versions each at the start and the end."""
    unfinished(folder)
    with monkeypatch.context() as context:
        reads = count_reads(folder, context)
        job = Job(folder, "teacher-cache", {})
        with job.opened("", {"teacher": 2}):
            job.finish([])
    times = 0 if str(folder).startswith("s3:") else 1 if isinstance(folder, LocalFolder) else 2
    assert sorted(reads) == sorted(PATHS * times)


def test_a_shard_with_another_version_and_the_same_bytes_is_kept(s3: str) -> None:
    """A copied bucket: an upload in parts has another ETag, which is no hash of the bytes."""
    folder = open_folder(f"{s3}/copied")
    assert isinstance(folder, RemoteFolder)
    data = b"x" * (11 << 20)
    record = record_of(PATHS[0], data)
    job = Job(folder, "teacher-cache", {})
    with job.opened("", {"teacher": 1}):
        job.commit(data, record)
    before = folder.version(PATHS[0])
    folder._filesystem.pipe_file(folder._key(PATHS[0]), data, chunksize=5 << 20)
    assert folder.version(PATHS[0]) != before
    job = Job(folder, "teacher-cache", {})
    with job.opened("", {"teacher": 1}):
        assert job.committed == {PATHS[0]: record}
        job.finish([])


def test_a_listing_gives_the_version_of_a_file(folder: Folder) -> None:
    folder.write("shards/a", b"one")
    before, version = folder.files("shards")["shards/a"], folder.version("shards/a")
    assert before.size == 3
    if str(folder).startswith("memory:"):
        assert before.version is None
        assert version is not None
    else:
        assert before.version == version
    folder.write("shards/a", b"two")
    assert folder.version("shards/a") != version


def test_a_storage_that_does_not_answer_makes_no_shard_bad(
    folder: Folder, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repair would make it again, and a finished cache would be taken for an unfinished one."""
    unfinished(folder)
    if isinstance(folder, RemoteFolder):

        def refuse(*_: object, **__: object) -> bytes:
            raise PermissionError("Access Denied")

        monkeypatch.setattr(folder._filesystem, "cat_file", refuse)
        monkeypatch.setattr(folder._filesystem, "info", refuse)
        with pytest.raises(UserError, match="the storage returned an error: PermissionError: Access Denied"):
            bad_shards(folder, list(RECORDS.values()))
        with pytest.raises(UserError, match="the storage returned an error"):
            folder.exists(MANIFEST)
    else:
        folder.delete(PATHS[0])
        assert bad_shards(folder, list(RECORDS.values())) == [RECORDS[PATHS[0]]]


def test_a_missing_bucket_is_an_error(s3: str) -> None:
    job = Job(open_folder("s3://nosuchbucket/run412/cache"), "teacher-cache", {})
    with pytest.raises(UserError, match=r"storage returned an error: FileNotFoundError.*job\.lock"), job.opened("", {}):
        pass


@pytest.mark.parametrize("finishes", [False, True])
def test_a_job_that_starts_or_finishes_while_another_looks_leaves_no_foreign_files(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, finishes: bool
) -> None:
    first, exists = Job(open_folder(str(folder)), "teacher-cache", {}), folder.exists
    opened = first.opened("", {"teacher": 0})

    def start_after_the_answer(name: str) -> bool:
        answer = exists(name)
        monkeypatch.setattr(folder, "exists", exists)
        opened.__enter__()
        if finishes:
            first.finish([])
            opened.__exit__(None, None, None)
        return answer

    monkeypatch.setattr(folder, "exists", start_after_the_answer)
    second = Job(folder, "teacher-cache", {})
    if finishes:
        with second.opened("", {"teacher": 0}) as manifest:
            assert manifest is not None
    else:
        with pytest.raises(UserError, match="another dpkd job is writing"), second.opened("", {"teacher": 0}):
            pass
        opened.__exit__(None, None, None)


def test_what_a_job_leaves_that_was_killed_after_its_manifest_is_removed(folder: Folder) -> None:
    unfinished(folder)
    resume(folder)
    dead = {"host": "elsewhere", "pid": 2**22, "token": "t", "renewed": 0, "boot": "another"}
    for leftover in (JOB, LOCK):
        here = json.loads(own_lock(folder)) | {"pid": 2**22, "started": "0"}
        folder.write(leftover, json.dumps(here if leftover == LOCK else dead).encode())
        with Job(folder, "teacher-cache", {}).opened("", {"teacher": 2}) as manifest:
            assert manifest is not None
        assert sorted(folder.sizes()) == ["dpkd.toml", MANIFEST, *PATHS]


def own_lock(folder: Folder) -> bytes:
    """The lock that a job of this process holds."""
    from dpkd.teacher_cache.store import locks

    child = folder.child("rounds/lock")
    with locks.hold(child):
        return child.read(LOCK)


def test_a_job_that_ends_leaves_the_files_of_a_job_in_a_round_alone(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "cache")
    unfinished(folder)
    ours, of_round = (folder.path / name for name in ("shards/.a.1.tmp.parquet", "rounds/r0/shards/.a.2.tmp.parquet"))
    for path in (ours, of_round):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    resume(folder)
    assert not ours.exists()
    assert of_round.exists()


def test_a_lock_that_cannot_be_read_is_not_waited_for(s3: str) -> None:
    folder = open_folder(f"{s3}/unreadable")
    folder.write(LOCK, b"{")
    with pytest.raises(UserError, match=r"the lock cannot be read.*Delete it"), Job(folder, "k", {}).opened("", {}):
        pass


def test_the_advice_about_a_bad_shard_fits_what_it_is_part_of(folder: Folder) -> None:
    unfinished(folder)
    flip(folder, PATHS[0])
    with pytest.raises(UserError, match="Delete the file, then run the command that wrote it again"):
        check_shard(folder, RECORDS[PATHS[0]])
    folder.delete(PATHS[0])
    assert Ledger(folder).committed().keys() == {PATHS[1]}
    resume(folder)
    flip(folder, PATHS[0])
    with pytest.raises(UserError, match="Run `dpkd cache repair"):
        check_shard(folder, replace(RECORDS[PATHS[0]]))


@pytest.mark.parametrize("url", ["simplecache::memory://cache", "filecache::s3://bucket/cache"])
def test_a_driver_that_keeps_copies_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="the URL is a chain of drivers"):
        open_folder(url)


def test_local_urls_are_directories(tmp_path: Path) -> None:
    assert isinstance(open_folder(f"local://{tmp_path}"), LocalFolder)
