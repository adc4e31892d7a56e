"""What happens to a job's files and data while it does not look: nothing wrong is ever called complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dpkd.core.errors import UserError
from dpkd.core.settings import Settings
from dpkd.distill.options.train import TrainConfig
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.folder import JOB, MANIFEST
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job

NUM_BEFORE = 2  # shards that are committed before the accident


@pytest.fixture
def data(tmp_path: Path, toy_data: Path) -> Path:
    """A data file of this test's own."""
    path = tmp_path / "data" / toy_data.name
    path.parent.mkdir()
    path.write_bytes(toy_data.read_bytes())
    return path


@pytest.fixture
def config(tmp_path: Path, toy_teacher: Path, data: Path) -> CacheConfig:
    return CacheConfig(
        teacher=str(toy_teacher), data=str(data), out=str(tmp_path / "cache"), template="chat", engine="transformers",
        responses="both", rows_per_shard=4, max_new_tokens=8, top_k=4, device="cpu",
        max_num_seqs=1,  # the last bit of a log-prob depends on the batch
    )  # fmt: skip


def after_commits(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Call `action` before commit `number` (from 0) of a job."""
    commit, calls = Job.commit, []

    def commit_or_act(job: Job, *arguments: object) -> None:
        if len(calls) == number:
            action()
        calls.append(1)
        commit(job, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Job, "commit", commit_or_act)


def interrupt() -> None:
    raise KeyboardInterrupt


def shards(out: str) -> dict[str, bytes]:
    folder = open_folder(out)
    return folder.read_many(folder.sizes("shards"))


@pytest.mark.parametrize("store", ["local", "s3"])
@pytest.mark.parametrize("accident", ["cut", "emptied", "flipped", "removed"])
def test_a_shard_that_changes_while_no_job_runs_is_made_again(
    config: CacheConfig,
    accident: str,
    store: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = config.model_copy(update={"out": config.out + "-whole"})
    build_cache(whole)
    if store == "s3":
        config = config.model_copy(update={"out": f"{request.getfixturevalue('s3')}/hostile-{accident}"})
    with monkeypatch.context() as context:
        after_commits(context, NUM_BEFORE, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_cache(config)
    folder = open_folder(config.out)
    shard = min(folder.sizes("shards"))
    content = folder.read(shard)
    if accident == "removed":
        folder.delete(shard)
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        folder.write(shard, {"cut": content[:middle], "emptied": b"", "flipped": flipped}[accident])
    capsys.readouterr()
    build_cache(config)
    assert shards(config.out) == shards(whole.out)
    assert f"{shard} has changed since it was committed" in capsys.readouterr().err


def test_data_that_changes_during_the_job_is_not_cached(
    config: CacheConfig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config.model_copy(update={"out": config.out + "-whole"})
    build_cache(whole)
    original = data.read_bytes()
    with monkeypatch.context() as context:
        after_commits(context, NUM_BEFORE, lambda: data.write_bytes(original[: len(original) // 2]))
        with pytest.raises(UserError, match=r"the data file changed while the job ran .*Restore the file"):
            build_cache(config)
    assert not Path(config.out, MANIFEST).exists()
    assert len(shards(config.out)) == NUM_BEFORE
    data.write_bytes(original)
    build_cache(config)
    assert shards(config.out) == shards(whole.out)


def test_data_that_changes_behind_the_same_date_and_size_is_found_at_the_end(
    config: CacheConfig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        status = data.stat()
        content = data.read_bytes()
        data.write_bytes(content[::-1].replace(b"e ", b"x ", 1)[::-1])  # one letter of the last row
        os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))

    after_commits(monkeypatch, NUM_BEFORE, change)
    with pytest.raises(UserError, match="the data file changed while the job ran"):
        build_cache(config)
    assert not Path(config.out, MANIFEST).exists()
    assert Path(config.out, JOB).exists()


def test_a_shard_that_is_lost_during_the_job_is_not_called_complete(
    config: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        after_commits(context, NUM_BEFORE, lambda: sorted(Path(config.out, "shards").iterdir())[0].unlink())
        with pytest.raises(UserError, match=r"a shard changed while the job ran: found no file"):
            build_cache(config)
    assert not Path(config.out, MANIFEST).exists()
    build_cache(config)
    assert Path(config.out, MANIFEST).exists()


@pytest.mark.parametrize("url", ["s3://b/run[1]/c", "s3://b/run*/c", "s3://b/run?/c", "memory://a/b*"])
def test_keys_that_a_driver_takes_as_patterns_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pattern|query"):
        open_folder(url)
    with pytest.raises(UserError, match=r"pattern|query"):
        CacheConfig.parse({"teacher": "t", "data": "d.jsonl", "out": url}, where="")
    open_folder(tmp_path / "run[1]").write("x", b"1")  # a path is literal
    assert (tmp_path / "run[1]" / "x").read_bytes() == b"1"


@pytest.mark.parametrize(
    "url",
    [
        "http://me:SECRET@host:8000", "http://SECRET@host:8000", "http://host:8000?api_key=SECRET", "http://host/#SECRET",
        "s3://me:SECRET@bucket/key", "s3://bucket/key?token=SECRET",
    ],
)  # fmt: skip
@pytest.mark.parametrize("option", ["out", "server_url", "cache", "teacher_url"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str, option: str) -> None:
    kind: type[Settings] = CacheConfig if option in ("out", "server_url") else TrainConfig
    values = {"teacher": "t", "data": "d.jsonl", "out": "c"} if kind is CacheConfig else {"student": "s", "out": "r"}
    with pytest.raises(UserError) as caught:
        kind.parse(values | {option: url}, where="", flags=[option])
    assert "SECRET" not in str(caught.value)
    assert "environment variable" in str(caught.value)


def test_a_shard_that_could_have_too_many_entries_is_refused_at_the_start(
    config: CacheConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """10^8 rows of 8 tokens with 4 entries are 3.2e9."""
    too_large = config.model_copy(update={"rows_per_shard": 10**8, "num_samples": 10**8})
    message = r"found 3200000000 entries .*expected at most 2147483647 .*--rows-per-shard 67108863 or less"
    with pytest.raises(UserError, match=message):
        build_cache(too_large)
    assert not Path(config.out).exists()
    assert "starting" not in capfd.readouterr().err
    # as many rows as there are, not as many as there could be
    build_cache(config.model_copy(update={"rows_per_shard": 10**9}))
