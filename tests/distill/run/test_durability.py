"""What a run keeps where the disk is full, a machine loses power, or a terminal closes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import dpkd, train_arguments

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
