"""Two real processes (gloo, on the CPU) equal one: curve, rows, weights, checkpoints, interrupts."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.commands import TwoRanks, free_port, train_arguments

from dpkd.core.outputs import LOCK, lock_directory
from dpkd.distill.batches.order import BatchOrder
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows import caches
from dpkd.distill.rows.caches import verify_share
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig

#: what a run of one and a run of two have in common; the second halves the batch
COMMON: dict[str, Any] = {
    "preset": "released-code",
    "steps": 6,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "device": "cpu",
    "lm_length": 32,
    "validation_examples": 5,
    "validate_every": 3,
    "save_every": 3,
}
ONE, TWO = COMMON | {"batch_size": 4}, COMMON | {"batch_size": 2}


def launch(launcher: str, options: dict[str, Any]) -> str:
    """Both ranks by `torchrun` or `accelerate launch`; what they say."""
    port = str(free_port())
    starts = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "--module"],
        "accelerate": [
            *("accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"),
            *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, "--module"),
        ],
    }
    done = subprocess.run(
        [sys.executable, "-m", *starts[launcher], "dpkd.pipelines.cli", *train_arguments(options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def lines(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, reference: Path) -> None:
    """The same rows, curve and weights, up to the order in which sums are added."""
    for name in ("metrics", "validation"):
        ours, theirs = lines(run, name), lines(reference, name)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for one, two in zip(ours, theirs, strict=True):
            assert one.get("tokens") == two.get("tokens")
            for key in ("loss", "loss_dpkd", "loss_sft", "loss_lm", "grad_norm", "reward_margin", "kld"):
                if two.get(key) is not None:
                    assert math.isclose(one[key], two[key], rel_tol=1e-4, abs_tol=1e-4), (name, one["step"], key)
    ours, theirs = load_file(run / "model.safetensors"), load_file(reference / "model.safetensors")
    assert set(ours) == set(theirs)
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() < 1e-4, name


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, toy_cache: Path, toy_student: Path) -> dict[str, Any]:
    from support.toys import dolly_texts

    corpus = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in dolly_texts("heldout")), encoding="utf-8")
    return {"cache": str(toy_cache), "student": str(toy_student), "lm_data": str(corpus)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> Path:
    """The run of one process."""
    return train(TrainConfig(out=tmp_path_factory.mktemp("runs") / "one", **options, **ONE))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> Path:
    """The run of two processes under FSDP2."""
    out = tmp_path_factory.mktemp("runs") / "fsdp2"
    texts = TwoRanks({"out": out, **options, **TWO, "sharding": "fsdp2"}).finish()
    assert "complete: 6 steps" in texts[0]
    assert "complete" not in texts[1]  # one rank speaks
    return out


def test_a_mix_reads_the_same_rows_on_two_ranks(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    shared = {"cache": str(toy_cache), "student": str(toy_student), "objective": "jsd", "round": "r0", "mix": 0.5}
    shared |= {"steps": 4, "learning_rate": 1e-3, "device": "cpu", "validation_examples": 5}
    one = train(TrainConfig(out=tmp_path / "one", batch_size=4, **shared))
    TwoRanks({"out": tmp_path / "two", "batch_size": 2, **shared}).finish()
    assert_same_run(tmp_path / "two", one)


def test_several_caches_give_the_same_rows_on_two_ranks(
    tmp_path: Path, toy_cache: Path, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> None:
    """Rows by weight, and metrics by cache, also where a rank has no row of one."""
    options = {"teacher": str(toy_teacher), "data": str(toy_data), "template": "chat", "engine": "transformers"}
    build_cache(CacheConfig(out=str(tmp_path / "short"), max_new_tokens=5, top_k=4, device="cpu", **options))
    caches = [f"a:{toy_cache}=0.8", f"b:{tmp_path / 'short'}=0.2"]
    shared: dict[str, Any] = {"cache": caches, "student": str(toy_student)}
    shared |= {"steps": 4, "learning_rate": 1e-3, "device": "cpu", "validation_examples": 5}
    one = train(TrainConfig(out=tmp_path / "one", batch_size=4, **shared))
    TwoRanks({"out": tmp_path / "two", "batch_size": 2, **shared}).finish()
    assert_same_run(tmp_path / "two", one)
    for name in ("metrics", "validation"):
        for ours, theirs in zip(lines(tmp_path / "two", name), lines(one, name), strict=True):
            for key in ("kld/a", "kld/b", "epoch/a", "epoch/b"):
                if theirs.get(key) is not None:
                    assert math.isclose(ours[key], theirs[key], rel_tol=1e-4)


def as_killed_after(step: int, finished: Path, run: Path) -> Path:
    """A copy of a finished run as a kill after the checkpoint of `step` leaves it."""
    shutil.copytree(finished, run)
    for name in ("run.json", "model.safetensors", "config.json"):
        (run / name).unlink()
    assert (run / f"checkpoint-{step}").is_dir()
    return run


def test_torchrun_gives_the_run_of_one_process(tmp_path: Path, options: dict[str, Any], reference: Path) -> None:
    launch("torchrun", {"out": tmp_path / "run", **options, **TWO})
    assert_same_run(tmp_path / "run", reference)


def test_fsdp2_gives_the_run_of_one_process(sharded: Path, reference: Path) -> None:
    assert_same_run(sharded, reference)
    ours, theirs = (load_file(run / "checkpoint-3" / "optimizer.safetensors") for run in (sharded, reference))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def test_fsdp2_in_bfloat16_computes_what_one_process_does(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    """The head, the cached log-probs and the losses stay in float32; FSDP's own bfloat16 would round all three."""
    shared = {"cache": str(toy_cache), "student": str(toy_student), "objective": "forward-kl", "dtype": "bfloat16"}
    shared |= {"steps": 2, "learning_rate": 1e-3, "device": "cpu", "validation_examples": 5}
    one = train(TrainConfig(out=tmp_path / "one", batch_size=4, **shared))
    TwoRanks({"out": tmp_path / "two", "batch_size": 2, "sharding": "fsdp2", **shared}).finish()
    for name in ("metrics", "validation"):
        for ours, theirs in zip(lines(tmp_path / "two", name), lines(one, name), strict=True):
            for key in ("loss", "kld", "rkld"):
                assert math.isclose(ours[key], theirs[key], rel_tol=1e-3), (name, ours["step"], key)


def test_a_sharded_checkpoint_resumes_in_one_process(
    tmp_path: Path, options: dict[str, Any], sharded: Path, reference: Path
) -> None:
    run = as_killed_after(3, sharded, tmp_path / "run")
    train(TrainConfig(out=run, **options, **ONE))
    assert_same_run(run, reference)


def test_a_run_of_one_process_resumes_on_two_fsdp_ranks(
    tmp_path: Path, options: dict[str, Any], reference: Path
) -> None:
    run = as_killed_after(3, reference, tmp_path / "run")
    said = launch("accelerate", {"out": run, **options, **TWO})
    assert said.count("resuming from step 3 of 6") == 1
    assert_same_run(run, reference)


def test_sigterm_on_all_ranks_leaves_one_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    """The signal reaches ranks at different times; they stop before the same step, and one process resumes."""
    run = tmp_path / "run"
    changed = {"steps": 4000, "save_every": 1000, "gradient_accumulation_steps": 1, "sharding": "fsdp2"}
    ranks = TwoRanks({"out": run, **options, **TWO, **changed})
    deadline_s = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(lines_so_far(run)) < 3:
        assert time.monotonic() < deadline_s, "no step in 120 s"
        time.sleep(0.05)
    seen = len(lines_so_far(run))
    for process in ranks.processes:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    texts = ranks.finish(130)
    assert sum("finishing this step" in text for text in texts) == 1
    written = lines(run)
    assert [line["step"] for line in written] == list(range(1, len(written) + 1))
    assert len(written) >= seen
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{len(written)}"]


def test_all_ranks_end_where_another_run_holds_the_directory(tmp_path: Path, options: dict[str, Any]) -> None:
    with lock_directory(tmp_path / "run", LOCK):
        texts = TwoRanks({"out": tmp_path / "run", **options, **TWO}).finish(2)
    assert ["another dpkd job is writing to this directory" in text for text in texts] == [True, False]
    assert not any((tmp_path / "run").iterdir())


def lines_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_row_goes_to_one_rank_once_an_epoch(ranks: int) -> None:
    whole = BatchOrder([5, 7, 12], seed=3, global_batch_size=8)
    split = BatchOrder([5, 7, 12], seed=3, global_batch_size=8, batch_size=8 // ranks)
    epoch = []
    for step in range(3):
        by_rank = [split.micro_batches_of(step)[rank::ranks] for rank in range(ranks)]
        assert [place for passes in by_rank for part in passes for place in part] == whole.rows_of(step)
        epoch += whole.rows_of(step)
    assert sorted(epoch) == [(group, row) for group, size in enumerate([5, 7, 12]) for row in range(size)]


def test_each_rank_verifies_its_share_and_all_end_at_a_bad_shard(
    tmp_path: Path, cache_copy: Path, toy_student: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(cache=cache_copy, student=str(toy_student), out=tmp_path / "run", round="r0", level="sequence")
    read: list[list[str]] = []
    with monkeypatch.context() as context:
        context.setattr(caches, "check_shard", lambda folder, record: read[-1].append(folder.where(record.path)))
        for rank in range(3):
            read.append([])
            verify_share(config, rank, 3)
    everything = [path for share in read for path in share]
    assert len(everything) == len(set(everything)) == 2 * len(list((cache_copy / "shards").glob("teacher-*")))
    assert max(map(len, read)) - min(map(len, read)) <= 1

    shards = sorted((cache_copy / "shards").glob("teacher-*"))
    for rank in range(2):  # each is in the share of another rank
        data = shards[rank].read_bytes()
        shards[rank].write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        given = {**options, **TWO, "out": tmp_path / "run", "cache": cache_copy}
        texts = TwoRanks(given).finish(2)
        assert ["a shard of the cache is corrupt" in text for text in texts] == [rank == 0, rank == 1]
        assert not (tmp_path / "run").exists()
        shards[rank].write_bytes(data)


def test_an_error_on_every_rank_is_printed_once(tmp_path: Path, options: dict[str, Any]) -> None:
    texts = TwoRanks({"out": tmp_path / "run", **options, **TWO, "batch_size": 500}).finish(2)
    assert sum("a step takes more rows than there are" in text for text in texts) == 1
