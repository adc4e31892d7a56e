"""The engine `ray` on a real local cluster, with real vLLM replicas, real kills and real interrupts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.progress import Progress
from dpkd.core.prompts.messages import Message
from dpkd.core.prompts.templates import EncodedPrompt
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.build.ray.blocks import from_block, split_blocks, to_block
from dpkd.teacher_cache.build.ray.cluster import check_resources
from dpkd.teacher_cache.build.ray.engine import RayFiller
from dpkd.teacher_cache.build.ray.replica import Assignment, Replica
from dpkd.teacher_cache.build.request import engine_options
from dpkd.teacher_cache.engines.engine import Sampling
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.folder import LocalFolder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import Round, TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow, PlannedRow
from dpkd.teacher_cache.store.shards import read_shard

LAYOUT = ShardLayout("teacher", 4, "teacher")
SAMPLING = Sampling(1.0, 1.0, 8, (0,))


def planned(index: int, **fields: object) -> PlannedRow:
    return PlannedRow(index, f"row {index}", 0, "teacher", "a prompt", [5, 6, 7], seed=index, **fields)  # type: ignore[arg-type]


def indices(blocks: Iterator[list[PlannedRow]]) -> list[list[int]]:
    return [[row.index for row in block] for block in blocks]


def test_blocks_are_whole_shards_of_bounded_size() -> None:
    blocks = indices(split_blocks(map(planned, range(100)), LAYOUT, set(), 16, 2))
    assert [len(block) for block in blocks] == [16] * 6 + [4]
    assert [index for block in blocks for index in block] == list(range(100))


def test_a_small_job_has_blocks_for_every_replica() -> None:
    rows = [planned(index) for index in range(38)]  # ten shards, the last of two rows
    assert [len(block) for block in split_blocks(rows, LAYOUT, set(), 1000, 2)] == [8, 8, 8, 8, 6]
    assert [len(block) for block in split_blocks(rows, LAYOUT, set(), 1000, 50)] == [4] * 9 + [2]


def test_committed_shards_are_in_no_block_and_a_large_shard_is_a_block_of_its_own() -> None:
    rows = [planned(index) for index in range(20)]
    blocks = split_blocks(rows, LAYOUT, {LAYOUT.path(0), LAYOUT.path(2)}, 1, 1)
    assert indices(blocks) == [[4, 5, 6, 7], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert indices(split_blocks([], LAYOUT, set(), 16, 2)) == []


def test_rows_go_through_arrow_and_come_back() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns = (Message("user", "Why?"), Message("assistant", "", (call,), (("reasoning_content", "so"),)))
    rows = [
        planned(0),
        planned(1, response_ids=[8, 9], finish_reason="length"),
        planned(2, response_ids=[]),
        planned(3, failed="the student: it fails"),
        planned(4, question=EncodedPrompt("Why?", [9], "Why?", turns), spans=[[1, 2]]),
        PlannedRow(2**40, "é", 3, "student", "", [], seed=2**31 - 1),
    ]
    block = to_block(rows)
    assert block.num_rows == 1  # what Ray Data hands out
    assert from_block(block) == [replace(row, question=None) for row in rows]  # only endpoints are asked with texts


def refusal(replica: Replica, rows: list[PlannedRow]) -> str:
    return [report["refusal"] for table in replica(to_block(rows)) for report in table.to_pylist()][-1]


def test_a_node_without_the_directory_or_the_model_says_so(tmp_path: Path, toy_teacher: Path) -> None:
    model = ModelSource("toy", toy_teacher)
    config = CacheConfig(teacher="toy", data="of no use", out=tmp_path)
    (tmp_path / "job.json").write_bytes(b"another job")

    def assignment(model: ModelSource, content: bytes) -> Assignment:
        witness = (tmp_path / "job.json", content)
        return Assignment(model, engine_options(config), str(tmp_path), None, witness, "cache", LAYOUT, SAMPLING)

    text = refusal(Replica(assignment(model, b"this job")), [planned(0)])
    assert "does not see the cache's directory" in text
    assert "a disk that all nodes share" in text
    elsewhere = ModelSource("toy", tmp_path / "not here")
    text = refusal(Replica(assignment(elsewhere, b"another job")), [planned(0)])
    assert "does not have the model" in text


@pytest.mark.engine
def test_an_engine_that_does_not_start_says_so(tmp_path: Path, toy_teacher: Path) -> None:
    config = CacheConfig(
        teacher="toy", data="of no use", out=tmp_path, engine="ray", engine_arg={"quantization": "nonsense"}
    )
    model = ModelSource("toy", toy_teacher)
    replica = Replica(Assignment(model, engine_options(config), str(tmp_path), None, None, "cache", LAYOUT, SAMPLING))
    assert "vLLM cannot load the model" in refusal(replica, [planned(0)])
    assert "vLLM cannot load the model" in refusal(replica, [planned(4)])  # whichever block the driver takes up first


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster of two CPUs, and two GPUs in name, so that the way to replicas with a GPU is taken."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        context = ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
        yield context.address_info["gcs_address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, repeat_rows: Callable[[Path, int], Path]) -> Path:
    """Enough rows that a kill falls into the middle."""
    return repeat_rows(tmp_path_factory.mktemp("data") / "many.jsonl", 6)


@pytest.fixture(scope="module")
def options(toy_teacher: Path, many: Path) -> dict[str, object]:
    return {
        "teacher": str(toy_teacher), "data": str(many), "max_new_tokens": 80, "top_k": 8,
        "rows_per_shard": 2, "max_num_seqs": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def by_vllm(cluster: str, tmp_path_factory: pytest.TempPathFactory, options: dict[str, object]) -> Path:
    """The cache as the engine vllm makes it."""
    out = tmp_path_factory.mktemp("caches") / "vllm"
    build_cache(CacheConfig.model_validate(options | {"out": out, "engine": "vllm"}))
    return out


def start(options: dict[str, object], out: Path, address: str, **more: object) -> subprocess.Popen[bytes]:
    """The command in a process of its own, on the running cluster: a forked one would have Ray's earlier settings."""
    arguments = [sys.executable, "-m", "dpkd.pipelines.cli", "cache-teacher"]
    for key, value in (options | {"out": out, "engine": "ray", **more}).items():
        arguments += ["--set", f"{key}={value}"]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, env=os.environ | {"RAY_ADDRESS": address})


def shards_committed(out: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every shard that has a record."""
    records = [json.loads(path.read_bytes()) for path in (out / "ledger").glob("[!.]*.json")]
    files = [out / record["path"] for record in records]
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def committed(out: Path) -> list[int]:
    """Numbers of the shards that have a record."""
    return [int(path.stem.rpartition("-")[2]) for path in (out / "ledger").glob("[!.]*.json")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def replicas() -> list[int]:
    """Processes of the cluster's replicas."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def rows_of(held: TeacherCache | Round) -> dict[tuple[str, int], CachedRow]:
    """Every row by its key; a key that is there twice fails."""
    found: dict[tuple[str, int], CachedRow] = {}
    for record in held.manifest.shards:
        shard = read_shard(held.folder, record)
        for place in range(len(shard)):
            assert shard.key(place) not in found
            found[shard.key(place)] = shard.row(place)
    return found


def assert_same_rows(found: dict[tuple[str, int], CachedRow], expected: dict[tuple[str, int], CachedRow]) -> None:
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert row.response_ids.tolist() == expected[key].response_ids.tolist()
        np.testing.assert_allclose(row.response_logprobs, expected[key].response_logprobs, atol=1e-3)


@pytest.mark.engine
def test_a_killed_replica_costs_no_row_and_the_cache_is_that_of_vllm(
    tmp_path: Path, cluster: str, options: dict[str, object], by_vllm: Path
) -> None:
    out = tmp_path / "cache"
    process = start(options, out, cluster, ray_replicas=2, ray_gpus=1)

    def both_in_the_middle() -> bool:
        """Whether two of the four blocks, of 15 shards each, are begun and not done."""
        of_block = Counter(number // 15 for number in committed(out))
        return sum(number < 15 for number in of_block.values()) == 2

    wait_for(both_in_the_middle, process)
    before = replicas()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    kept = shards_committed(out)
    assert not (out / "manifest.json").exists()
    wait_for(lambda: len(set(replicas()) - set(before)) == 1, process)  # another takes its place
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()

    for name, (content, written_ns) in kept.items():
        assert (out / "shards" / name).read_bytes() == content
        assert (out / "shards" / name).stat().st_mtime_ns == written_ns  # nothing committed was made again
    verify_cache(out)
    ours, theirs = TeacherCache.open(out), TeacherCache.open(by_vllm)
    assert ours.manifest.identities == theirs.manifest.identities
    assert [record.path for record in ours.shards()] == [record.path for record in theirs.shards()]
    assert_same_rows(rows_of(ours), rows_of(theirs))
    assert sorted(path.name for path in out.iterdir()) == ["dpkd.toml", "manifest.json", "shards"]


@pytest.mark.engine
def test_vllm_and_ray_resume_each_others_jobs(
    tmp_path: Path, cluster: str, options: dict[str, object], by_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    config = CacheConfig.model_validate(options | {"out": out, "engine": "vllm"})

    def interrupt(progress: Progress, amount: int = 1, **fields: object) -> None:
        progress.done += amount
        if progress.done == 20 and progress.label != "reading the data":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_cache(config)
    of_vllm = shards_committed(out)
    assert of_vllm

    process = start(options, out, cluster)
    wait_for(lambda: len(committed(out)) >= len(of_vllm) + 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    assert b"run the same command again" in errors
    of_both = shards_committed(out)
    assert of_vllm.items() <= of_both.items()
    assert len(of_both) < 60

    build_cache(config)
    for name, (content, _) in of_both.items():
        assert (out / "shards" / name).read_bytes() == content
    verify_cache(out)
    assert_same_rows(rows_of(TeacherCache.open(out)), rows_of(TeacherCache.open(by_vllm)))


@pytest.mark.engine
def test_a_round_can_be_written_by_ray(
    tmp_path: Path, cluster: str, options: dict[str, object], by_vllm: Path, toy_student: Path
) -> None:
    out = Path(shutil.copytree(by_vllm, tmp_path / "cache"))
    of_round = {"student": str(toy_student), "round": "r0", "max_new_tokens": 12, "max_num_seqs": 16}
    build_cache(CacheConfig.model_validate(options | of_round | {"out": out, "engine": "ray"}))
    assert verify_cache(out)["rounds"] == 1
    made = TeacherCache.open(out).round("r0")
    assert made.manifest.identities["generation"]["engine"] == "vllm"
    assert rows_of(made).keys() == rows_of(TeacherCache.open(by_vllm)).keys()
    assert not (out / "rounds" / "r0" / "sampled").exists()
    wait_for_no_replicas()


@pytest.mark.engine
def test_replicas_without_room_are_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = CacheConfig(teacher="t", data="d", out="o", engine="ray", ray_replicas=2)
    check_resources(config)
    with pytest.raises(UserError, match=r"found resources for 1 replicas of 2 CPUs and 0 GPUs, expected for 2"):
        check_resources(config.model_copy(update={"ray_cpus": 2}))


@pytest.mark.engine
def test_a_replica_that_cannot_write_says_so(tmp_path: Path, toy_teacher: Path) -> None:
    config = CacheConfig(teacher=str(toy_teacher), data="of no use", out=tmp_path, max_new_tokens=8, top_k=4)
    (tmp_path / "shards").write_text("in the way")
    model = ModelSource("toy", toy_teacher)
    replica = Replica(Assignment(model, engine_options(config), str(tmp_path), None, None, "cache", LAYOUT, SAMPLING))
    with contextlib.closing(replica._engine):
        text = refusal(replica, [planned(index) for index in range(8)])
    assert re.search("the file cannot be written: File exists .* run the same command again", text)
    assert not Job(LocalFolder(tmp_path), "cache", {}).ledger.committed()


@pytest.mark.engine
def test_a_replica_that_gives_up_ends_the_job_with_its_words(tmp_path: Path, cluster: str, toy_teacher: Path) -> None:
    config = CacheConfig(teacher=str(toy_teacher), data="of no use", out=tmp_path, max_new_tokens=8, top_k=4)
    job = Job(LocalFolder(tmp_path), "cache", {})
    rows = [planned(index) for index in range(8)]
    with (
        Progress("rows", len(rows), "rows") as progress,
        RayFiller(ModelSource("toy", tmp_path / "not here"), engine_options(config), config) as filler,
        pytest.raises(UserError, match=r"does not have the model \(in .*not here on .*\)\. Put it on a disk"),
    ):
        filler(job, LAYOUT, rows, SAMPLING, progress)
    assert not job.ledger.committed()
    wait_for_no_replicas()


def wait_for_no_replicas() -> None:
    """They end with the job, while the cluster keeps running."""
    deadline_s = time.monotonic() + 30
    while replicas():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
