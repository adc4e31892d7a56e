"""Checkpoints and students on disk: Hugging Face directories, written whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.core.files import replacing_directory, sync, write_atomic
from dpkd.core.identity import canonical_json, file_sha256, fingerprint
from dpkd.core.json_lines import loads
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.distill.run.adapters import merge_adapters, save_adapters
from dpkd.distill.run.best import BEST_DIR
from dpkd.distill.student.init import copy_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with correct checksums: its directory, its number of steps, and the loop's own state."""

    directory: Path
    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class StudentFiles:
    """How a student is written: class and config of `model`, the tokenizer of `source`.

    With `adapters`, the student is saved as the adapters alone, or with them `merged` into its weights. Checkpoints
    always hold the adapters alone, so that a resumed run computes exactly the same numbers.
    """

    model: PreTrainedModel
    source: ModelSource
    adapters: PeftModel | None = None
    merged: bool = True

    def save(self, directory: Path, weights: dict[str, Tensor], facts: dict[str, Any], *, merged: bool) -> None:
        """Write the model, the tokenizer and `facts` (dpkd.json); `weights` are those of `StudentState`."""
        if self.adapters is None:
            self.model.save_pretrained(directory, state_dict=weights)
        elif merged:
            merge_adapters(self.adapters, self.source, weights).save_pretrained(directory)
        else:
            save_adapters(self.adapters, directory, weights)
        copy_tokenizer(self.source, directory)
        (directory / "dpkd.json").write_bytes(canonical_json(facts))


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore moments and step counts. Rank zero reads them and broadcasts them, tensor by tensor."""
    several = torch.distributed.is_initialized()
    state: dict[str, Any] = {}
    with safe_open(checkpoint.directory / _OPTIMIZER, framework="pt") as file:
        keys = [key.rpartition(".") for key in file.keys()]  # noqa: SIM118, not a dict
        if not several or torch.distributed.get_rank() == 0:
            for parameter, _, name in keys:
                state.setdefault(parameter, {})[name] = file.get_tensor(f"{parameter}.{name}")
    saved = {parameter for parameter, _, _ in keys}
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]  # creates the state of every parameter
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False)
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)
    for name, weight in model.named_parameters():
        if name not in saved:  # it had no gradient yet, so its count of steps is still 0
            optimizer.state.pop(weight, None)


def save_checkpoint(
    directory: Path,
    student: StudentFiles,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    facts: dict[str, Any],
    state: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Write a checkpoint from gathered weights and moments, then delete all but the `keep` newest of the run.

    `state` is JSON and is returned unchanged by `latest_checkpoint`. Raises `UserError` when it cannot be written.
    """
    with replacing_directory(directory) as temporary:
        student.save(temporary, weights, facts, merged=False)
        save_file(moments, temporary / _OPTIMIZER)
        # safetensors writes its files alone: to hash while writing, all tensors would be in memory a second time. The
        # bytes come from the page cache, not from the disk, in half the time that writing them took
        files = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
        record = {"step": facts["steps"], "files": files, "state": state}
        (temporary / _STATE).write_bytes(canonical_json(record | {"sha256": fingerprint(record)}))
    for old in _directories(directory.parent)[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(run_dir: Path, choice: Literal["latest", "previous"] = "latest") -> Checkpoint | None:
    """The newest checkpoint, or None; raises `UserError` when one of its files is corrupt.

    With `previous` a corrupt checkpoint is renamed to `NAME.damaged`, and the one before it is returned; `UserError`
    when all of them are corrupt.
    """
    corrupt: list[tuple[Path, UserError]] = []
    for directory in reversed(_directories(run_dir)):
        try:
            checkpoint = _verified(directory)
        except UserError as error:
            if choice == "latest":
                raise
            corrupt.append((directory, error))
            continue
        for path, reason in corrupt:
            damaged = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            path.replace(damaged)
            say(f"renamed to {damaged.name}: {reason}")
        return checkpoint
    if not corrupt:
        return None
    # a run that started again would empty its logs
    raise UserError(
        "every checkpoint of the run is corrupt (checksum mismatch), so it cannot resume",
        found=", ".join(path.name for path, _ in corrupt),
        where=run_dir,
        advice="Choose another --out, or delete these checkpoints to start again at step 0",
    )


def _verified(directory: Path) -> Checkpoint:
    try:
        record = loads((directory / _STATE).read_bytes())
        step, files, state, digest = int(record["step"]), dict(record["files"]), record["state"], record.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError):
        raise _corrupt(directory, _STATE, "unreadable", "the record of a checkpoint") from None
    actual = {name: file_sha256(directory / name) if (directory / name).is_file() else "no file" for name in files}
    actual[_STATE] = fingerprint(record)
    for name, expected in {_STATE: digest, **files}.items():
        if actual[name] != expected:
            raise _corrupt(directory, name, actual[name][:12], expected[:12])
    return Checkpoint(directory, step, state)


def _corrupt(directory: Path, name: str, actual: str, expected: str) -> UserError:
    return UserError(
        f"the checkpoint's {name} is corrupt (checksum mismatch)",
        found=actual,
        expected=expected,
        where=directory,
        advice="Give --resume-from previous to resume from the one before it",
    )


def save_student(
    directory: Path, student: StudentFiles, weights: dict[str, Tensor], facts: dict[str, Any], card: str | None = None
) -> None:
    """Replace `directory` by a student ready for use, with its model card; `UserError` when it cannot be written."""
    with replacing_directory(directory) as temporary:
        student.save(temporary, weights, facts, merged=student.merged)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def finish_run(run_dir: Path, student_dir: Path, facts: dict[str, Any]) -> None:
    """Move the student of `student_dir` to the run directory, then write `run.json`: the run is complete.

    The student's files are on the disk before `run.json` is, and `run.json` before the best student is deleted.
    """
    for file in sorted(student_dir.iterdir()):
        file.replace(run_dir / file.name)
    student_dir.rmdir()
    sync(run_dir)
    write_atomic(run_dir / "run.json", canonical_json({"complete": True, **facts}))
    shutil.rmtree(run_dir / BEST_DIR, ignore_errors=True)  # the run directory has it now


def _directories(run_dir: Path) -> list[Path]:
    """Checkpoints by step, the oldest first."""
    paths = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")))
