"""Checkpoints: Hugging Face directories with the optimiser beside them, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpkd.distill.gathering import spread_optimizer
from dpkd.distill.students import copy_tokenizer
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.files import write_atomic
from dpkd.teacher_cache.identity import canonical_json, file_sha256
from dpkd.teacher_cache.models import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: its directory and the number of steps behind it."""

    directory: Path
    step: int


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
) -> Checkpoint:
    """Write `checkpoint-STEP`, of gathered weights and moments, and remove all but the `keep` newest."""
    target = run_dir / f"checkpoint-{step}"
    temporary = run_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_student(temporary, model, weights, tokenizer, facts)
    save_file(moments, temporary / _OPTIMIZER)
    files = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
    (temporary / _STATE).write_bytes(canonical_json({"step": step, "files": files}))
    _sync(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    for old in _directories(run_dir)[:-keep]:
        shutil.rmtree(old)
    return Checkpoint(target, step)


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint, checked; `UserError` when it is not what was written."""
    found = _directories(run_dir)
    if not found:
        return None
    directory = found[-1]
    try:
        state = json.loads((directory / _STATE).read_bytes())
        step, files = int(state["step"]), dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(directory, _STATE) from None
    for name, digest in files.items():
        if not (directory / name).is_file() or file_sha256(directory / name) != digest:
            raise _damaged(directory, name)
    return Checkpoint(directory, step)


def _damaged(directory: Path, name: str) -> UserError:
    return UserError(
        f"the checkpoint's {name} is not what was written",
        where=directory,
        advice="Delete this checkpoint to go on from the one before it",
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
