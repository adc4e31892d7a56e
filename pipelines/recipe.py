"""Recipes: the steps of a TOML file in order, each a `dpkd` process of its own, each skipped when complete.

A recipe is

    [[steps]]
    command = "cache-teacher"   # then the command's options, as in its own --config file
    ...

Every command recognises its own finished output, so running a recipe again goes on where it stopped.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.distill.config import InitStudentConfig, TrainConfig
from dpkd.evaluate.config import EvalConfig
from dpkd.pipelines.process import EXIT_INTERRUPTED, EXIT_SET_ASIDE, StepFailed, Terminated
from dpkd.teacher_cache.config import CacheConfig
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.progress import say
from dpkd.teacher_cache.settings import Settings, read_toml

CONFIGS: dict[str, type[Settings]] = {
    "cache-teacher": CacheConfig,
    "init-student": InitStudentConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}


@dataclass(frozen=True)
class Step:
    """One command of a recipe with its checked options."""

    command: str
    config: Settings


def read_recipe(path: Path) -> list[Step]:
    """The checked steps of a recipe; raises `UserError` for anything that a step would refuse as an option."""
    content = read_toml(path)
    unknown = [key for key in content if key != "steps"]
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}", expected="[[steps]]", where=path)
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise UserError("the recipe has no [[steps]]", where=path, advice="See configs/quickstart.toml")
    return [_read_step(values, f"{path}, step {place}") for place, values in enumerate(steps, start=1)]


def _read_step(values: dict[str, Any], where: str) -> Step:
    options = dict(values)
    command = options.pop("command", None)
    if command not in CONFIGS:
        raise UserError("a step's command is not known", found=repr(command), expected=", ".join(CONFIGS), where=where)
    return Step(command, CONFIGS[command].parse(options, where=where))


def run_recipe(path: Path, *, dry_run: bool = False) -> None:
    """Run every step; raises `StepFailed` with the first failing step's status.

    A step that set rows aside is no failure: the recipe goes on, and ends with that status.
    """
    steps = read_recipe(path)
    started_s = time.monotonic()
    set_aside = False
    for place, step in enumerate(steps, start=1):
        say(f"== step {place} of {len(steps)}: dpkd {step.command} -> {step.config.out}")  # type: ignore[attr-defined]
        if dry_run:
            print(f"# {step.command}\n{step.config.to_toml()}")
            continue
        step_started_s = time.monotonic()
        status = _run_step(step)
        set_aside |= status == EXIT_SET_ASIDE
        if status not in (0, EXIT_SET_ASIDE):
            raise StepFailed(status)
        say(f"== step {place} took {time.monotonic() - step_started_s:.0f} s")
    if not dry_run:
        say(f"== the recipe {path} is complete: {time.monotonic() - started_s:.0f} s")
    if set_aside:
        raise StepFailed(EXIT_SET_ASIDE)


def _run_step(step: Step) -> int:
    with tempfile.NamedTemporaryFile("wb", suffix=".toml") as file:
        file.write(step.config.to_toml().encode())
        file.flush()
        command = [sys.executable, "-m", "dpkd.pipelines.cli", step.command, "--config", file.name]
        return _wait(subprocess.Popen(command))


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the step, whatever interrupts this process: the step ends in its own orderly way.

    Ctrl-C reaches the step from the terminal; a termination of this process alone is handed on.
    """
    interrupted = False
    while True:
        try:
            status = process.wait()
        except Terminated:
            interrupted = True
            process.terminate()
        except KeyboardInterrupt:
            interrupted = True
        else:
            return EXIT_INTERRUPTED if interrupted or status < 0 else status
