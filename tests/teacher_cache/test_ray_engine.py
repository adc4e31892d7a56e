"""Ray: replicas write the shards of one job on a real local cluster, and one that is killed loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dpkd.teacher_cache.assembling import ShardLayout
from dpkd.teacher_cache.build import build_cache
from dpkd.teacher_cache.config import CacheConfig
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.ray_engine import from_block, split_blocks, to_block
from dpkd.teacher_cache.reader import TeacherCache
from dpkd.teacher_cache.schema import CachedRow, PlannedRow
from dpkd.teacher_cache.verify import verify_cache


def planned(number: int) -> list[PlannedRow]:
    return [PlannedRow(i, f"r{i}", 0, "teacher", f"prompt {i}", [i, i + 1], seed=i) for i in range(number)]


def test_blocks_hold_whole_shards_once_and_leave_out_what_is_committed() -> None:
    layout = ShardLayout("teacher", 4, "teacher")
    blocks = list(split_blocks(planned(50), layout, {layout.path(1), layout.path(5)}, most_rows=8, num_replicas=2))
    assert all(len({row.index // 4 for row in block}) <= 2 for block in blocks)
    indices = [row.index for block in blocks for row in block]
    assert indices == [i for i in range(50) if i // 4 not in (1, 5)]
    for block in blocks:
        assert block[0].index % 4 == 0
    # a small job has something for every replica
    assert len(list(split_blocks(planned(16), layout, set(), most_rows=512, num_replicas=2))) == 4


def test_a_block_gives_back_its_rows() -> None:
    rows = planned(3)
    given = PlannedRow(3, "r3", 1, "reference", "p", [5], response_ids=[7, 0], finish_reason="length")
    failed = PlannedRow(4, "r4", 0, "student", "p", [5], failed="the student: no")
    assert from_block(to_block([*rows, given, failed])) == [*rows, given, failed]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two CPUs."""
    import ray

    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield context.address_info["gcs_address"]
    ray.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def config(out: Path, teacher: Path, data: Path, **options: Any) -> CacheConfig:
    defaults: dict[str, Any] = {
        "engine": "ray",
        "ray_replicas": 2,
        "template": "chat",
        "max_new_tokens": 12,
        "max_prompt_tokens": 200,
        "top_k": 8,
        "rows_per_shard": 3,
        "max_num_seqs": 8,
    }
    return CacheConfig(out=out, teacher=str(teacher), data=str(data), **(defaults | options))


def all_rows(location: Path) -> list[CachedRow]:
    cache = TeacherCache.open(location)
    return [shard.row(i) for record in cache.shards() for shard in [cache.read(record)] for i in range(len(shard))]


def many_rows(path: Path, data: Path, copies: int) -> Path:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    lines = [json.dumps(row | {"id": f"{copy}-{row['id']}"}) for copy in range(copies) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.engine
def test_replicas_make_the_cache_that_one_engine_makes(
    cluster: str, tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> None:
    by_ray = build_cache(config(tmp_path / "ray", toy_teacher, toy_data))
    by_one = build_cache(config(tmp_path / "one", toy_teacher, toy_data, engine="vllm"))
    assert by_ray.fingerprint == by_one.fingerprint
    verify_cache(tmp_path / "ray")
    for ours, theirs in zip(all_rows(tmp_path / "ray"), all_rows(tmp_path / "one"), strict=True):
        assert ours.example_id == theirs.example_id
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        assert np.abs(ours.response_logprobs - theirs.response_logprobs).max() < 1e-3
    # a round, and with it scoring
    build_cache(
        CacheConfig(out=str(tmp_path / "ray"), teacher=str(toy_teacher), student=str(toy_student), round="r0",
                    engine="ray", ray_replicas=2, max_new_tokens=12, top_k=8, max_num_seqs=8)
    )  # fmt: skip
    verify_cache(tmp_path / "ray")
    assert TeacherCache.open(tmp_path / "ray").round("r0").manifest.counts["rows"] == 20


def replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "MapWorker(MapBatches(Replica))" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.engine
def test_a_killed_replica_loses_and_repeats_nothing_and_the_job_can_change_engines(
    cluster: str, tmp_path: Path, toy_teacher: Path, toy_data: Path
) -> None:
    out = tmp_path / "cache"
    data = many_rows(tmp_path / "data.jsonl", toy_data, copies=10)
    options = ["--template", "chat", "--max-new-tokens", "200", "--max-prompt-tokens", "200", "--top-k", "16"]
    command = [
        sys.executable, "-m", "dpkd.pipelines.cli", "cache-teacher", "--teacher", str(toy_teacher), "--data", str(data),
        "--out", str(out), *options, "--set", "rows_per_shard=2", "--set", "max_num_seqs=2",
    ]  # fmt: skip
    by_ray = [*command, "--engine", "ray", "--set", "ray_replicas=2"]
    environment = os.environ | {"RAY_ADDRESS": cluster}

    def committed() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (out / "ledger").glob("*.json")}

    def wait_for(process: subprocess.Popen[bytes], number: int) -> None:
        deadline_s = time.monotonic() + 180
        while len(committed()) < number:
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            assert time.monotonic() < deadline_s
            time.sleep(0.02)

    process = subprocess.Popen(by_ray, stderr=subprocess.PIPE, env=environment)
    wait_for(process, 6)
    victims = replicas()
    assert len(victims) == 2
    victims[0].kill()
    kept = committed()
    wait_for(process, len(kept) + 6)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    at_interrupt = committed()
    assert at_interrupt.items() >= kept.items()

    # the same job, taken up by one engine in one process for a while, and brought to its end by replicas
    process = subprocess.Popen([*command, "--engine", "vllm"], stderr=subprocess.PIPE)
    wait_for(process, len(at_interrupt) + 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    before_end = committed()
    assert before_end.items() >= at_interrupt.items()
    finished = subprocess.run(by_ray, capture_output=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr.decode()
    verify_cache(out)
    shards = {shard.path: shard.sha256 for shard in TeacherCache.open(out).manifest.shards}
    assert all(shards[record["path"]] == record["sha256"] for record in map(json.loads, before_end.values()))
    seen = [row.example_id for row in all_rows(out)]
    assert len(seen) == len(set(seen)) == 200


@pytest.mark.engine
def test_what_a_replica_refuses_reaches_the_person(
    cluster: str, tmp_path: Path, toy_teacher: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # more positions than the model has: only the replica's vLLM finds out
    with pytest.raises(UserError, match="vLLM cannot load the model"):
        build_cache(
            config(tmp_path / "a", toy_teacher, toy_data, ray_replicas=1, engine_arg={"quantization": "nonsense"})
        )
    assert not (tmp_path / "a" / "manifest.json").exists()
