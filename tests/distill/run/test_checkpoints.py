"""What a run saves: verified checkpoints, the best student, and no loss by a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.commands import Command, train_arguments
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.core.outputs import LOCK, lock_directory
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.best import Best, HeldOutPrompt
from dpkd.distill.run.interrupts import Interrupts
from dpkd.distill.run.logs import NormSpikes
from dpkd.distill.training import train
from dpkd.pipelines.bridges import rouge_l_evaluator

COMMON: dict[str, Any] = {
    "steps": 8,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "token_pairs": "drawn",
    "device": "cpu",
    "save_every": 2,
    "keep_checkpoints": 3,
    "validation_examples": 4,
    "validate_every": 2,
    "best_metric": "kld",
}


def config(out: Path, cache: Path, student: Path, **options: object) -> TrainConfig:
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(COMMON | options))


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(("_s", "_bytes"))} for line in found]


def assert_same_run(run: Path, reference: Path) -> None:
    """Bit for bit, times and memory apart."""
    for name in ("metrics", "validation"):
        assert lines(run, name) == lines(reference, name)
    newest = max(reference.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])).name
    for place in (".", newest):
        ours, theirs = (load_file(path / place / "model.safetensors") for path in (run, reference))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("dpkd.json", "run.json"):
        assert json.loads((run / name).read_text()) == json.loads((reference / name).read_text())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, toy_cache: Path, toy_student: Path) -> Path:
    """A run that nothing stopped."""
    return train(config(tmp_path_factory.mktemp("runs") / "whole", toy_cache, toy_student))


def as_killed(reference: Path, run: Path) -> Path:
    """A copy of a finished run as a kill after its last checkpoint leaves it."""
    shutil.copytree(reference, run)
    (run / "run.json").unlink()
    (run / "best").mkdir()
    for name in ("model.safetensors", "config.json", "dpkd.json", "README.md", "tokenizer.json"):
        (run / name).rename(run / "best" / name)
    return run


def test_kills_at_random_steps_change_nothing(
    tmp_path: Path, toy_cache: Path, toy_student: Path, reference: Path
) -> None:
    """SIGKILL in steps, in validations and in writes; the same command resumes each time."""
    run, chance = tmp_path / "run", random.Random(7)
    options = {"out": run, "cache": toy_cache, "student": toy_student, **COMMON}
    kills = 0
    while not (run / "run.json").is_file():
        process = Command(*train_arguments(options))
        seen = len(lines_of(run))
        until = seen + chance.randint(1, 3)
        while process.poll() is None and (kills == 4 or len(lines_of(run)) < until):
            time.sleep(0.005)
        if process.poll() is None:
            time.sleep(chance.random() * 0.05)
            process.kill()
        done = process.finish()
        kills += done.returncode == -signal.SIGKILL
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert kills >= 2
    assert_same_run(run, reference)


def lines_of(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def test_the_best_student_is_kept_whole(tmp_path: Path, toy_cache: Path, toy_student: Path, reference: Path) -> None:
    best = min(lines(reference, "validation"), key=lambda line: line["kld"])
    assert json.loads((reference / "dpkd.json").read_text())["steps"] == best["step"]
    assert json.loads((reference / "run.json").read_text())["student_step"] == best["step"]
    AutoModelForCausalLM.from_pretrained(reference)
    assert (reference / "tokenizer.json").is_file()
    assert not (reference / "best").exists()
    # one checkpoint is kept, and it does not take the best student with it
    run = train(config(tmp_path / "run", toy_cache, toy_student, keep_checkpoints=1))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]
    assert_same_run(run, reference)


def test_a_second_run_in_the_directory_is_refused_until_the_first_one_ends(
    tmp_path: Path, toy_cache: Path, toy_student: Path, reference: Path
) -> None:
    """The first one goes on; when it is killed, the next one resumes at once."""
    run = tmp_path / "run"
    first = Command(*train_arguments({"out": run, "cache": toy_cache, "student": toy_student, **COMMON}))
    while len(lines_of(run)) < 3:
        assert first.poll() is None, first.stderr
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    seen = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    try:
        with pytest.raises(UserError, match=r"another dpkd job is writing to this directory \(in .*run\)\. Wait until"):
            train(config(run, toy_cache, toy_student))
        assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == seen
        assert (run / LOCK).is_file()
    finally:
        first.kill()
    assert train(config(run, toy_cache, toy_student)) == run
    assert not (run / LOCK).exists()
    assert_same_run(run, reference)
    with lock_directory(run, LOCK):  # a complete run is only read
        train(config(run, toy_cache, toy_student))


def test_a_directory_with_only_the_lock_of_a_killed_run_is_free(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).touch()
    (run / ".dpkd-run.4711.tmp.json").write_text("{")
    train(config(run, toy_cache, toy_student, steps=1))
    assert (run / "run.json").is_file()


def test_the_student_is_on_the_disk_before_the_run_is_complete(
    tmp_path: Path, toy_cache: Path, toy_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss a file has only what was synced, and a directory only the names that were."""
    run, fsync, replace = tmp_path / "run", os.fsync, os.replace
    synced: set[int] = set()
    unsynced_names: list[str] = []
    at_the_end: list[list[str]] = []

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        if run.is_dir() and os.fstat(descriptor).st_ino == run.stat().st_ino:
            unsynced_names.clear()

    def record_replace(source: Path, target: Path) -> None:
        if Path(target) == run / "run.json":
            student = [run / name for name in ("model.safetensors", "config.json", "tokenizer.json", "dpkd.json")]
            at_the_end.append([file.name for file in student if file.stat().st_ino not in synced] + unsynced_names)
            assert (run / "best").is_dir()
        replace(source, target)
        if Path(target).parent == run:
            unsynced_names.append(Path(target).name)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    train(config(run, toy_cache, toy_student, steps=2))
    assert at_the_end == [[]]


def test_training_stops_early_without_improvement(
    tmp_path: Path, toy_cache: Path, toy_student: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rate that drives the student away; a run that is killed after the last validation ends there too."""
    changed = {"learning_rate": 0.3, "warmup_ratio": 0.0, "patience": 2, "steps": 40}
    run = train(config(tmp_path / "run", toy_cache, toy_student, **changed))
    _, *found = lines(run, "validation")  # where training starts is no result of it
    best = min(found, key=lambda line: line["kld"])["step"]
    assert f"early stopping: kld has not improved since step {best}" in capfd.readouterr().err
    assert found[-1]["step"] == best + 4 == json.loads((run / "run.json").read_text())["steps"] < 40
    assert (run / f"checkpoint-{best + 4}").is_dir()
    again = as_killed(run, tmp_path / "again")
    train(config(again, toy_cache, toy_student, **changed))
    assert_same_run(again, run)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "dpkd.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_corrupt_checkpoint_is_named_and_the_run_resumes_from_the_one_before(
    tmp_path: Path,
    toy_cache: Path,
    toy_student: Path,
    reference: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    damage: str,
) -> None:
    run = as_killed(reference, tmp_path / "run")
    path = run / "checkpoint-6" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            data[:-40] if damage == "truncated" else data.replace(data[-9:-8], b"1" if data[-9] != 49 else b"2")
        )
    with pytest.raises(
        UserError,
        match=rf"the checkpoint's {name} is corrupt \(checksum mismatch\): .*checkpoint-6\). Give --resume-from ",
    ):
        train(config(run, toy_cache, toy_student))
    train(config(run, toy_cache, toy_student, resume_from="previous"))
    said = capfd.readouterr().err
    assert f"renamed to checkpoint-6.damaged: the checkpoint's {name}" in said
    assert "resuming from step 4 of 8" in said
    assert_same_run(run, reference)


def test_a_run_without_a_sound_checkpoint_does_not_start_again(
    tmp_path: Path, toy_cache: Path, toy_student: Path, reference: Path
) -> None:
    run = as_killed(reference, tmp_path / "run")
    for directory in run.glob("checkpoint-*"):
        (directory / "optimizer.safetensors").write_bytes(b"")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError,
        match=r"every checkpoint .* is corrupt .*found checkpoint-6, checkpoint-4, checkpoint-2 \(in .*run\)\. Choose",
    ):
        train(config(run, toy_cache, toy_student, resume_from="previous"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for directory in run.glob("checkpoint-*"):
        shutil.rmtree(directory)
    train(config(run, toy_cache, toy_student, resume_from="previous"))
    assert_same_run(run, reference)


def test_rouge_l_is_measured_by_the_function_that_is_handed_in(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    seen: list[tuple[set[str], Sequence[HeldOutPrompt]]] = []

    def evaluate(directory: Path, prompts: Sequence[HeldOutPrompt]) -> float:
        AutoModelForCausalLM.from_pretrained(directory)
        seen.append(({path.name for path in directory.iterdir()}, prompts))
        return [40.0, 10.0, 30.0, 20.0, 30.0][len(seen) - 1]

    options = config(tmp_path / "run", toy_cache, toy_student, best_metric="rouge_l")
    run = train(options, evaluate)
    assert [line["rouge_l"] for line in lines(run, "validation")] == [40.0, 10.0, 30.0, 20.0, 30.0]
    # the initial student is measured, but is not a result of training; an equal score is not better
    assert json.loads((run / "dpkd.json").read_text())["steps"] == 4
    assert all("tokenizer.json" in names and len(prompts) == 4 for names, prompts in seen)
    assert all(prompt.references and prompt.prompt_ids for prompt in seen[0][1])
    assert not (run / ".candidate").exists()
    by_default = train(config(tmp_path / "other", toy_cache, toy_student, best_metric="rouge_l", steps=2))
    assert all(0 <= line["rouge_l"] <= 100 for line in lines(by_default, "validation"))
    assert 0 <= rouge_l_evaluator(options, 12)(run, seen[0][1]) <= 100


def test_a_metric_that_validation_does_not_give(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    changed = {"objective": "sft", "token_pairs": "all", "best_metric": "reward_margin"}
    with pytest.raises(UserError, match="validation does not measure the best_metric: found best_metric reward_margin"):
        train(config(tmp_path / "run", toy_cache, toy_student, **changed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"best_metric": "kld", "validation_examples": 0},
            "--best-metric kld needs --validation-examples of 1 or more",
        ),
        ({"patience": 2, "best_metric": "last"}, "--patience needs validation, and a --best-metric other than last"),
        ({"patience": 2, "validation_examples": 0}, "--patience needs validation"),
        ({"follow": True, "patience": 2}, "--patience needs a finished --cache"),
        ({"follow": True, "best_metric": "kld"}, "--best-metric needs a finished --cache"),
        ({"follow": True, "validation_examples": 2}, "--validation-examples needs a finished --cache"),
        ({"max_new_tokens": 9, "turns": "all"}, "--turns, --max-new-tokens goes with --data"),
        ({"follow_timeout_s": 9}, "--follow-timeout-s goes with --follow"),
        ({"staleness": 0, "round": "r0"}, "--staleness goes with --student-samples live"),
        ({"steps": 0}, "`steps` must be 1 or more, found 0"),
        ({"learning_rate": 0}, "`learning_rate` must be above 0, found 0"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, found 0"),
        ({"dtype": "float16"}, "`dtype` must be float32 or bfloat16, found float16"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig.parse({"cache": "c", "student": "s", "out": "o"} | options, where="here")


def test_best_is_smaller_or_larger_by_the_metric() -> None:
    kld, margin = Best("kld"), Best("reward_margin")
    assert [kld.note({"step": step, "kld": value}) for step, value in enumerate([3.0, 2.0, 2.0, 2.5])] == [
        *(True, True, False, False)
    ]
    assert [margin.note({"step": step, "reward_margin": value}) for step, value in enumerate([-1.0, 0.5, 0.4])] == [
        *(True, True, False)
    ]
    assert kld.num_since == 2  # what --patience is compared with


def test_a_large_gradient_norm_is_reported() -> None:
    spikes = NormSpikes()
    assert spikes.note(50.0) is None  # nothing to compare it with yet
    assert not any(spikes.note(1.0) for _ in range(40))
    assert spikes.note(9.9) is None
    assert spikes.note(25.0) == "gradient norm 25, 25 times the median of 42 steps"


def test_two_signals_at_once_count_as_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A launcher hands on the Ctrl-C that the terminal has sent already; a person's second one comes later."""
    now = [100.0]
    monkeypatch.setattr("dpkd.distill.run.interrupts.time.monotonic", lambda: now[0])
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.should_stop
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err.count("finishing this step") == 1
