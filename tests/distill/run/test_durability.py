"""What a run keeps where the disk is full, a machine loses power, or a terminal closes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command, dpkd, train_arguments

from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.interrupts import Interrupts
from dpkd.distill.training import train

COMMON: dict[str, Any] = {"steps": 4, "batch_size": 3, "learning_rate": 1e-3, "device": "cpu", "tracker": "none"}


@contextlib.contextmanager
def refusing_files_as_large_as(file: Path) -> Iterator[None]:
    """The system refuses to write so large a file; the error has another text than that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size - 1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def config(out: Path, cache: Path, student: Path, **options: object) -> TrainConfig:
    """A run that is validated after every step."""
    validation = {"validation_examples": 4, "validate_every": 1}
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(COMMON | validation | options))


def refused(directory: Path) -> str:
    return (
        f"error: the directory cannot be written: File too large (in {directory}). "
        "Free space and run the same command again: it resumes"
    )


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"validation_examples": 0, "save_every": 1}, "checkpoint-1"),
        ({"validation_examples": 4, "validate_every": 1}, "best"),
        ({"validation_examples": 0}, ".final"),
    ],
)
def test_weights_that_the_disk_refuses_are_one_line(
    tmp_path: Path, toy_cache: Path, toy_student: Path, options: dict[str, Any], where: str
) -> None:
    run = tmp_path / "run"
    given = {"out": run, "cache": toy_cache, "student": toy_student, **COMMON, **options}
    with refusing_files_as_large_as(toy_student / "model.safetensors"):
        done = dpkd(*train_arguments(given))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, refused(run / where))
    assert not [path for path in run.iterdir() if path.is_dir()]
    assert dpkd(*train_arguments(given)).returncode == 0


def test_a_student_that_the_disk_refuses_is_one_line(tmp_path: Path, toy_teacher: Path, toy_student: Path) -> None:
    words = ["init-student", "--teacher", toy_teacher, "--layers", 1, "--keep", "first", "--out", tmp_path / "student"]
    with refusing_files_as_large_as(toy_student / "model.safetensors"):
        done = dpkd(*words)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, refused(tmp_path / "student"))
    assert not any(tmp_path.iterdir())


def test_the_logs_are_on_the_disk_before_the_checkpoint_that_counts_their_lines(
    tmp_path: Path, toy_cache: Path, toy_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fsync, replace = tmp_path / "run", os.fsync, os.replace
    synced: dict[int, int] = {}
    seen: list[tuple[str, list[bool]]] = []

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def record_replace(source: Path, target: Path) -> None:
        if Path(target).name.startswith(("checkpoint-", "run.json")):
            logs = [(run / name).stat() for name in ("metrics.jsonl", "validation.jsonl")]
            seen.append((Path(target).name, [synced.get(log.st_ino) == log.st_size for log in logs]))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    train(config(run, toy_cache, toy_student, save_every=2))
    assert seen == [("checkpoint-2", [True, True]), ("run.json", [True, True])]


@pytest.mark.parametrize("first", ["validation", "metrics"])
def test_a_damaged_log_does_not_stop_a_resume_and_is_reported(
    tmp_path: Path, toy_cache: Path, toy_student: Path, capfd: pytest.CaptureFixture[str], first: str
) -> None:
    """After a power loss a log may have a block of zeros, or end early."""
    options = config(tmp_path / "run", toy_cache, toy_student, save_every=3)
    log = train(options) / f"{first}.jsonl"
    (log.parent / "run.json").unlink()
    lines = log.read_bytes().splitlines(keepends=True)  # of steps 0 to 4 and 1 to 4
    log.write_bytes(bytes(len(lines[0]) - 1) + b"\n" + b'{"loss": 1}\n' + b"".join(lines[1:-3]))
    capfd.readouterr()
    train(options)
    missing = {"validation": "3 of 4, from step 0 on", "metrics": "3 of 3, from step 1 on"}[first]
    assert [line for line in capfd.readouterr().err.splitlines() if "is damaged" in line] == [
        f"warning: {log} is damaged (unreadable lines, dropped: 2; missing lines up to step 3: {missing}). "
        "The student is not affected"
    ]
    written = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert written == {"validation": [1, 4], "metrics": [4]}[first]
    (log.parent / "run.json").unlink()
    log.unlink()
    train(options)
    assert f"{log} is damaged (missing lines up to step 3" in capfd.readouterr().err


@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_terminal_costs_no_step(tmp_path: Path, toy_cache: Path, toy_student: Path, ignored: bool) -> None:
    """`nohup` starts the command with SIGHUP ignored, and it stays so."""
    run = tmp_path / "run"
    given = {"out": run, "cache": toy_cache, "student": toy_student, **COMMON, "steps": 60 if ignored else 4000}
    process = Command(*train_arguments(given), prepare=_ignore_sighup if ignored else None)
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    for _ in range(2):  # of the shell, and of the kernel
        process.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    done = process.finish()
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert done.returncode == (0 if ignored else 130), done.stderr
    assert done.stderr.count("finishing this step and writing a checkpoint") == (not ignored)
    assert [path.name for path in run.glob("checkpoint-*")] == ([] if ignored else [f"checkpoint-{steps}"])


def _ignore_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_second_lost_terminal_does_not_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dpkd.distill.run.interrupts.time.monotonic", lambda: now[0])
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.should_stop
            now[0] += 5
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)
