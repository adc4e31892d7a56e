"""Checkpoints: Hugging Face directories with the optimiser beside them, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpkd.distill.best import BEST_DIR
from dpkd.distill.gathering import spread_optimizer
from dpkd.distill.students import copy_tokenizer
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.files import write_atomic
from dpkd.teacher_cache.identity import canonical_json, file_sha256, fingerprint
from dpkd.teacher_cache.models import ModelSource
from dpkd.teacher_cache.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANDIDATE_DIR = ".candidate"
_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: its directory, the number of steps behind it, and what else the loop has to know."""

    directory: Path
    step: int
    state: dict[str, Any]


def save_student(
    directory: Path, model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: ModelSource, facts: dict[str, Any]
) -> None:
    """`weights` of the class and config of `model`, tokenizer, generation config and `facts` into a new directory."""
    model.save_pretrained(directory, state_dict=weights)
    copy_tokenizer(tokenizer, directory)
    (directory / "dpkd.json").write_bytes(canonical_json(facts))


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    tokenizer: ModelSource,
    facts: dict[str, Any],
    keep: int,
    state: dict[str, Any],
) -> None:
    """Write `checkpoint-STEP`, of gathered weights and moments, and remove all but the `keep` newest.

    `state` is JSON and comes back as it is. Raises `UserError` when it cannot be written.
    """
    target = run_dir / f"checkpoint-{step}"
    with _writing(target) as temporary:
        save_student(temporary, model, weights, tokenizer, facts)
        save_file(moments, temporary / _OPTIMIZER)
        files = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
        record = {"step": step, "files": files, "state": state}
        (temporary / _STATE).write_bytes(canonical_json(record | {"sha256": fingerprint(record)}))
    for old in _directories(run_dir)[:-keep]:
        shutil.rmtree(old)


def save_best(
    run_dir: Path, model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: ModelSource, facts: dict[str, Any]
) -> None:
    """Put a student in place of the one in `best/`; raises `UserError` when it cannot be written."""
    with _writing(run_dir / BEST_DIR) as temporary:
        save_student(temporary, model, weights, tokenizer, facts)


def save_candidate(
    run_dir: Path, model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: ModelSource, facts: dict[str, Any]
) -> None:
    """A student for the time of a measurement, in `.candidate/`; raises `UserError` when it cannot be written."""
    with _writing(run_dir / CANDIDATE_DIR) as temporary:
        save_student(temporary, model, weights, tokenizer, facts)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` when all of it is on the disk."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"the student cannot be written: {error.strerror or error}",
            where=target,
            advice="Free space; the same command goes on from the last checkpoint",
        ) from error


def latest_checkpoint(run_dir: Path, choice: Literal["latest", "previous"] = "latest") -> Checkpoint | None:
    """The newest checkpoint, checked; `UserError` when it is not what was written.

    With `previous` one that is damaged is set aside (its name gets `.damaged`), and the one before it is taken.
    """
    for directory in reversed(_directories(run_dir)):
        try:
            return _checked(directory)
        except UserError as error:
            if choice == "latest":
                raise
            aside = directory.with_name(f"{directory.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            directory.replace(aside)
            say(f"set aside as {aside.name}: {error}")
    return None


def _checked(directory: Path) -> Checkpoint:
    try:
        record = json.loads((directory / _STATE).read_bytes())
        step, files, state, digest = int(record["step"]), dict(record["files"]), record["state"], record.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(directory, _STATE, "unreadable", "the record of a checkpoint") from None
    if fingerprint(record) != digest:
        raise _damaged(directory, _STATE, f"sha256 {fingerprint(record)[:12]}", digest[:12])
    for name, expected in files.items():
        if not (directory / name).is_file():
            raise _damaged(directory, name, "no file", expected[:12])
        found = file_sha256(directory / name)
        if found != expected:
            raise _damaged(directory, name, f"sha256 {found[:12]}", expected[:12])
    return Checkpoint(directory, step, state)


def _damaged(directory: Path, name: str, found: str, expected: str) -> UserError:
    return UserError(
        f"the checkpoint's {name} is not what was written",
        found=found,
        expected=expected,
        where=directory,
        advice="Give --set checkpoint=previous to go on from the one before it",
    )


def load_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments and step counts back, on every rank."""
    spread_optimizer(load_file(checkpoint.directory / _OPTIMIZER), optimizer)


def finish_run(
    run_dir: Path, model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: ModelSource, facts: dict[str, Any]
) -> None:
    """Put the trained student at the root of the run; `run.json`, written last, says that the run is complete."""
    temporary = run_dir / ".final.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_student(temporary, model, weights, tokenizer, facts)
    _sync(temporary)
    for file in sorted(temporary.iterdir()):
        file.replace(run_dir / file.name)
    temporary.rmdir()
    write_atomic(run_dir / "run.json", canonical_json({"complete": True, **facts}))


def _directories(run_dir: Path) -> list[Path]:
    found = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _sync(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
