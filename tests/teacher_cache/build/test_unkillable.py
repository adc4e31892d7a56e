"""What a job survives: kills at random moments, full and read-only disks, flipped bits, prompts that break the model.

Faults are real ones where this machine can make them (signals, a full file system, weights that are not numbers); a
failure inside vLLM's step, which no prompt of a toy provokes, is raised from around the real engine's step.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Command, dpkd

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.caches import verify_share
from dpkd.distill.run.setup import open_run
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.engines.engine import EngineOptions, EngineResult, FailedRequest, GenerateRequest, Sampling
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache

WriteRows = Callable[..., Path]
RepeatRows = Callable[[Path, int], Path]


def config(out: Path, teacher: Path, data: Path, **options: Any) -> CacheConfig:
    defaults: dict[str, Any] = {
        "engine": "transformers",
        "template": "chat",
        "max_new_tokens": 24,
        "top_k": 16,
        "rows_per_shard": 2,
    }
    return CacheConfig(out=out, teacher=str(teacher), data=str(data), **(defaults | options))


def in_child(settings: CacheConfig) -> int:
    """Process id of a fork of this process that builds the cache; a fork has the imports that a start would repeat."""
    pid = os.fork()
    if pid == 0:
        try:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            build_cache(settings)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "ledger").glob("[!.]*.json")}


def count_records(folders: list[Path]) -> int:
    """Without reading them, as it is asked every millisecond."""
    return sum(1 for folder in folders for _ in (folder / "ledger").glob("[!.]*.json"))


def kill_at_random(settings: CacheConfig, folders: list[Path], kills: int, seed: int) -> int:
    """Run the job, killing it at random moments; how many kills met it at work."""
    random.seed(seed)
    met = 0
    kept: dict[Path, dict[str, bytes]] = {folder: {} for folder in folders}
    while met < kills:
        pid = in_child(settings)
        # some kills fall into the start, most somewhere behind the next commit
        before = sum(map(len, kept.values()))
        deadline_s = time.monotonic() + 60
        if random.random() < 0.8:
            while count_records(folders) <= before and os.waitpid(pid, os.WNOHANG)[0] == 0:
                assert time.monotonic() < deadline_s
                time.sleep(0.001)
        time.sleep(random.uniform(0, 0.06))
        try:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        except (ProcessLookupError, ChildProcessError):
            break  # it came to its end
        if not os.WIFSIGNALED(status):
            break
        met += 1
        for folder in folders:
            now = records(folder)
            for name, content in kept[folder].items():
                assert now.get(name) == content, "a committed shard was lost or made again"
            kept[folder] = now
    return met


def test_thirty_kills_lose_and_repeat_nothing(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, repeat_rows: RepeatRows
) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    out = tmp_path / "cache"
    data = repeat_rows(tmp_path / "data.jsonl", 7)
    settings = config(out, toy_teacher, data, responses="both", num_samples=2)
    # first, so that every fork has the imports of a whole job
    whole = build_cache(settings.model_copy(update={"out": str(tmp_path / "whole")}))
    assert kill_at_random(settings, [out], kills=30, seed=1) == 30
    manifest = build_cache(settings)
    assert manifest.counts["rows"] == 140 * 3
    verify_cache(out)
    cache = TeacherCache.open(out)
    seen = [
        (record.origin, row.example_id, row.sample)
        for record in cache.shards()
        for row in map(cache.read(record).row, range(record.rows))
    ]
    assert len(seen) == len(set(seen)) == 140 * 3
    assert [(shard.path, shard.rows) for shard in whole.shards] == [
        (shard.path, shard.rows) for shard in cache.shards()
    ]
    assert sorted(path.name for path in out.iterdir()) == ["dpkd.toml", "manifest.json", "shards"]

    in_round = settings.model_copy(update={"student": str(toy_student), "round": "r0"})
    folder = out / "rounds" / "r0"
    assert kill_at_random(in_round, [folder, folder / "sampled"], kills=8, seed=2) == 8
    build_cache(in_round)
    verify_cache(out)
    held = TeacherCache.open(out).round("r0")
    assert held.manifest.counts["rows"] == 140 * 3
    assert sorted(path.name for path in folder.iterdir()) == ["dpkd.toml", "manifest.json", "shards"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "dpkd-test", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


needs_mount = pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")


@needs_mount
def test_a_full_disk_keeps_what_is_committed(
    small_disk: Path, tmp_path: Path, toy_teacher: Path, repeat_rows: RepeatRows
) -> None:
    out = small_disk / "cache"
    settings = config(out, toy_teacher, repeat_rows(tmp_path / "data.jsonl", 2))
    with pytest.raises(UserError, match=r"cannot be written: No space left on device .* run the same command again"):
        build_cache(settings)
    kept = records(out)
    assert kept
    assert not list(out.rglob(".*.tmp*"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    manifest = build_cache(settings)
    assert manifest.counts["rows"] == 40
    held = {shard.path: shard.sha256 for shard in manifest.shards}
    assert all(held[record["path"]] == record["sha256"] for record in map(json.loads, kept.values()))
    verify_cache(out)


@needs_mount
def test_a_read_only_directory_is_refused_before_the_engine_starts(
    small_disk: Path, toy_teacher: Path, toy_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="the directory cannot be written to: Read-only file system"):
        build_cache(config(small_disk / "cache", toy_teacher, toy_data))
    assert "starting" not in capfd.readouterr().err


def test_a_finished_cache_on_a_read_only_disk_is_read(tmp_path: Path, toy_cache: Path, toy_teacher: Path) -> None:
    read_only = Path(shutil.copytree(toy_cache, tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in read_only.rglob("*")}
    verify_cache(read_only)
    assert {path: path.stat().st_mtime_ns for path in read_only.rglob("*")} == before


def flips(folder: Path, number: int, seed: int, but: str = "") -> Iterator[Path]:
    """Flip one bit at a time, in a file of `folder` whose name is not `but`, and mend it again."""
    random.seed(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != but)
    for _ in range(number):
        path = random.choice(files)
        data = path.read_bytes()
        place = random.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :])
        yield path
        path.write_bytes(data)


def test_two_hundred_flipped_bits_are_caught_by_every_reader(
    cache_copy: Path, tmp_path: Path, toy_student: Path, write_rows: WriteRows, capfd: pytest.CaptureFixture[str]
) -> None:
    training = TrainConfig(
        cache=cache_copy, student=str(toy_student), out=tmp_path / "run", steps=1, level="sequence", round="r0",
        responses="all", device="cpu",
    )  # fmt: skip
    for path in flips(cache_copy, 200, seed=7):
        with pytest.raises(UserError):
            verify_cache(cache_copy)
        capfd.readouterr()
        # what `dpkd train` does before its first step; it needs no options of the cache
        with contextlib.nullcontext() if path.name == "dpkd.toml" else pytest.raises(UserError):
            verify_share(training)
            open_run(training)
        if path.name == "dpkd.toml":
            assert f"warning: {path} is not as it was" in capfd.readouterr().err
        assert not (tmp_path / "run").exists(), path
    verify_share(training)
    open_run(training)
    verify_cache(cache_copy)
    # an evaluation reads the cache, not its rounds
    shutil.rmtree(cache_copy / "rounds")
    data = write_rows([{"instruction": "Say it", "output": "it"}])
    evaluation = EvalConfig(
        model={"student": str(toy_student)}, data={"d": str(data)}, out=tmp_path / "eval", cache=cache_copy,
        engine="transformers", device="cpu",
    )  # fmt: skip
    for path in flips(cache_copy, 200, seed=8, but="dpkd.toml"):
        with pytest.raises(UserError):
            evaluate(evaluation)
        assert not (tmp_path / "eval").exists(), path


@pytest.fixture(scope="module")
def broken_teacher(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path) -> tuple[Path, str]:
    """The toy teacher with one token whose embedding is not a number, and a word that holds that token alone."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    directory = Path(shutil.copytree(toy_teacher, tmp_path_factory.mktemp("models") / "broken"))
    token = AutoTokenizer.from_pretrained(directory).encode("~", add_special_tokens=False)
    assert len(token) == 1
    weights = load_file(directory / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"].clone()
    embedding[token[0]] = float("nan")
    # the head is tied to the embedding: untie it, or every logit of that token would be broken too
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"] = embedding
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    return directory, "~"


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_prompt_that_breaks_the_model_becomes_a_failed_row(
    engine: str, tmp_path: Path, broken_teacher: tuple[Path, str], toy_student: Path, write_rows: WriteRows
) -> None:
    teacher, word = broken_teacher
    rows = [{"id": f"r{i}", "instruction": f"Say {word if i == 3 else i}"} for i in range(6)]
    out = tmp_path / "cache"
    words = (
        "cache-teacher", "--teacher", teacher, "--data", write_rows(rows), "--out", out, "--engine", engine,
        "--template", "raw", "--max-new-tokens", 6, "--top-k", 8, "--set", "rows_per_shard=2",
    )  # fmt: skip
    first = dpkd(*words)
    assert first.returncode == 3, first.stderr
    assert "1 rows failed (all are listed in the manifest, with the reason)" in first.stderr
    assert "teacher r3, sample 0: " in first.stderr
    verify_cache(out)
    cache = TeacherCache.open(out)
    assert [row["example_id"] for row in cache.manifest.failed] == ["r3"]
    assert [shard.rows for shard in cache.manifest.shards] == [2, 1, 2]
    # the finished cache says so again, and trains
    assert dpkd(*words).returncode == 3
    if engine == "transformers":
        build_cache(
            CacheConfig(out=str(out), teacher=str(teacher), student=str(toy_student), round="r0", engine="transformers",
                        max_new_tokens=6, top_k=8)
        )  # fmt: skip
        held = TeacherCache.open(out).round("r0")
        assert held.manifest.counts["rows"] == 5
        verify_cache(out)
        rows_of = open_run(
            TrainConfig(cache=out, student=str(toy_student), out=tmp_path / "run", steps=1, batch_size=2,
                        level="sequence", round="r0", device="cpu")
        ).rows  # fmt: skip
        assert rows_of.group_sizes == [2, 1, 2]
        pair = rows_of.row(1, 0)
        assert pair.rejected is not None
        assert pair.chosen.example_id == pair.rejected.example_id == "r2"


def test_a_row_that_a_round_cannot_answer_leaves_the_others_paired(
    tmp_path: Path, toy_teacher: Path, broken_teacher: tuple[Path, str], write_rows: WriteRows
) -> None:
    student, word = broken_teacher
    rows = [{"id": f"r{i}", "instruction": f"Say {word if i == 2 else i}"} for i in range(6)]
    out = tmp_path / "cache"
    options = {"template": "raw", "max_new_tokens": 6, "top_k": 8}
    build_cache(config(out, toy_teacher, write_rows(rows), **options))
    manifest = build_cache(
        CacheConfig(out=str(out), teacher=str(toy_teacher), student=str(student), round="r0", engine="transformers",
                    max_new_tokens=6, top_k=8)
    )  # fmt: skip
    assert [(row["example_id"], row["reason"][:12]) for row in manifest.failed] == [("r2", "the student:")]
    verify_cache(out)
    source = open_run(
        TrainConfig(cache=out, student=str(toy_teacher), out=tmp_path / "run", steps=1, batch_size=2,
                    level="sequence", round="r0", device="cpu")
    ).rows  # fmt: skip
    pairs = [source.row(group, i) for group, size in enumerate(source.group_sizes) for i in range(size)]
    assert [pair.chosen.example_id for pair in pairs] == ["r0", "r1", "r3", "r4", "r5"]
    assert all(pair.rejected is not None and pair.rejected.example_id == pair.chosen.example_id for pair in pairs)


PROMPTS = [[5, 9, 33], [7] * 20, [300, 301, 302], [11, 12], [40, 41], [80]]
SAMPLING = Sampling(1.0, 1.0, 12, (0,))


def answers(engine: Any) -> dict[int, EngineResult | FailedRequest]:
    requests = (GenerateRequest(i, ids, seed=100 + i) for i, ids in enumerate(PROMPTS))
    return {answer.index: answer for answer in engine.generate(requests, SAMPLING)}


@pytest.mark.engine
def test_a_failing_vllm_is_restarted_and_the_failing_row_found(
    toy_teacher: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    options = EngineOptions(max_length=64, top_k=4, dtype="float32", max_num_seqs=6)
    step = LLMEngine.step
    fault: dict[str, Any] = {"index": None, "error": None, "times": 0}

    def failing_step(self: LLMEngine) -> Any:
        under_way = {state.external_req_id for state in self.output_processor.request_states.values()}
        if fault["times"] and (fault["index"] is None or fault["index"] in under_way):
            fault["times"] -= 1
            raise fault["error"]
        return step(self)

    monkeypatch.setattr(LLMEngine, "step", failing_step)
    with open_engine("vllm", locate_model(str(toy_teacher), "teacher"), options) as engine:
        sound = answers(engine)
        # once: the batch is repeated in halves, and every request is answered as before
        fault |= {"error": RuntimeError("device-side assert"), "times": 1}
        again = answers(engine)
        assert all(isinstance(answer, EngineResult) for answer in again.values())
        assert {i: a.response_ids.tolist() for i, a in again.items()} == {
            i: a.response_ids.tolist() for i, a in sound.items()
        }
        # whenever one request is running: only that one fails
        fault |= {"index": "3", "times": 100}
        found = answers(engine)
        assert [i for i, answer in found.items() if isinstance(answer, FailedRequest)] == [3]
        assert found[3].reason == "vLLM fails on it: device-side assert"
        assert found[5].response_ids.tolist() == sound[5].response_ids.tolist()
        # on every request: no culprit, the job stops
        fault |= {"index": None, "times": 1000}
        with pytest.raises(UserError, match="vLLM fails on every request: device-side assert"):
            answers(engine)
        # out of memory: nothing to isolate, the option is named
        fault |= {"error": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "times": 1}
        with pytest.raises(UserError, match=r"vLLM ran out of memory: CUDA out of memory.*Lower --max-num-seqs"):
            answers(engine)
        fault |= {"times": 0}
        assert answers(engine).keys() == sound.keys()
    assert "vLLM failed (device-side assert); restarting it for 6 requests" in capfd.readouterr().err


@pytest.mark.engine
def test_out_of_memory_is_an_error_of_one_line(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    found = Command(
        "cache-teacher", "--teacher", toy_teacher, "--data", toy_data, "--out", tmp_path / "cache",
        "--engine", "vllm", "--max-new-tokens", 6, environment={"VLLM_CPU_KVCACHE_SPACE": "100000"},
    ).finish()  # fmt: skip
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    assert "VLLM_CPU_KVCACHE_SPACE" in found.stderr


@pytest.mark.engine
def test_vllm_refuses_a_prompt_by_name(toy_teacher: Path) -> None:
    options = EngineOptions(max_length=64, top_k=4, dtype="float32", max_num_seqs=2)
    with open_engine("vllm", locate_model(str(toy_teacher), "teacher"), options) as engine:
        requests = [GenerateRequest(0, [5, 9], 1), GenerateRequest(1, [5, 600_000], 1), GenerateRequest(2, [7], 1)]
        found = {answer.index: answer for answer in engine.generate(requests, SAMPLING)}
    assert isinstance(found[1], FailedRequest)
    assert found[1].reason.startswith("vLLM refuses it: ")
    assert isinstance(found[0], EngineResult)
    assert isinstance(found[2], EngineResult)
