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

from dpkd.core.errors import UserError
from dpkd.core.files import write_atomic
from dpkd.core.identity import canonical_json, file_sha256, fingerprint
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.distill.run.adapters import Adapters
from dpkd.distill.run.gathering import spread_optimizer
from dpkd.distill.student.init import copy_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: its directory, the number of steps behind it, and what else the loop has to know."""

    directory: Path
    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class StudentFiles:
    """How a student is written: class and config of `model`, the tokenizer of `source`, adapters where it has any."""

    model: PreTrainedModel
    source: ModelSource
    adapters: Adapters | None = None
    merged: bool = True

    def is_kept(self, name: str) -> bool:
        """Whether a checkpoint needs this weight: of a student with adapters, theirs alone."""
        return self.adapters is None or self.adapters.is_adapter(name)

    def save(self, directory: Path, weights: dict[str, Tensor], facts: dict[str, Any], card: str | None = None) -> None:
        """The student for use: `weights`, tokenizer, generation config, `facts` (dpkd.json), the model card."""
        if self.adapters is None:
            self.model.save_pretrained(directory, state_dict=weights)
        elif self.merged:
            self.model.save_pretrained(directory, state_dict=self.adapters.merge(weights))
        else:
            self.adapters.save(directory, weights)
        self._save_rest(directory, facts)
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")

    def save_to_go_on(self, directory: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The same for a checkpoint: adapters stay adapters, so that training goes on with the very numbers."""
        if self.adapters is None:
            self.model.save_pretrained(directory, state_dict=weights)
        else:
            self.adapters.save(directory, weights)
        self._save_rest(directory, facts)

    def _save_rest(self, directory: Path, facts: dict[str, Any]) -> None:
        copy_tokenizer(self.source, directory)
        (directory / "dpkd.json").write_bytes(canonical_json(facts))


def save_checkpoint(
    run_dir: Path,
    step: int,
    student: StudentFiles,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    facts: dict[str, Any],
    keep: int,
    state: dict[str, Any],
) -> None:
    """Write `checkpoint-STEP`, of gathered weights and moments, and remove all but the `keep` newest.

    `state` is JSON and comes back as it is. Raises `UserError` when it cannot be written.
    """
    target = run_dir / f"checkpoint-{step}"
    with _writing(target) as temporary:
        student.save_to_go_on(temporary, weights, facts)
        save_file(moments, temporary / _OPTIMIZER)
        files = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
        record = {"step": step, "files": files, "state": state}
        (temporary / _STATE).write_bytes(canonical_json(record | {"sha256": fingerprint(record)}))
    for old in _directories(run_dir)[:-keep]:
        shutil.rmtree(old)


def save_student(
    directory: Path, student: StudentFiles, weights: dict[str, Tensor], facts: dict[str, Any], card: str | None = None
) -> None:
    """A student for use, in place of what stands in `directory`; raises `UserError` when it cannot be written."""
    with _writing(directory) as temporary:
        student.save(temporary, weights, facts, card)


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
    run_dir: Path, student: StudentFiles, weights: dict[str, Tensor], facts: dict[str, Any], card: str
) -> None:
    """Put the trained student at the root of the run; `run.json`, written last, says that the run is complete."""
    temporary = run_dir / ".final"
    save_student(temporary, student, weights, facts, card)
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
