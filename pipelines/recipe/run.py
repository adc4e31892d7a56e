"""Recipes: the steps of a TOML file in order, each a `dpkd` process of its own, each skipped when complete.

What a recipe says is in `recipe_format`. Every command recognises its own finished output, so running a recipe again
goes on where it stopped. Every step of every round is checked before the first one starts. As each is a process that
ends before the next begins, teacher and student are never in memory at one time but where a command itself holds both.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from dpkd.core.progress import say
from dpkd.pipelines.process import EXIT_SET_ASIDE, StepFailed
from dpkd.pipelines.recipe.format import Step, read_recipe
from dpkd.pipelines.recipe.step_process import run_command


def run_recipe(path: Path, *, dry_run: bool = False) -> None:
    """Run every step; raises `StepFailed` with the first failing step's status.

    A step that set rows aside is no failure: the recipe goes on, and ends with that status.
    """
    steps = read_recipe(path)
    if not dry_run:
        run_steps(steps, str(path))
        return
    for place, step in enumerate(steps, start=1):
        _announce(step, place, len(steps))
        print(f"# {step.title}\n{step.config.to_toml()}")


def run_steps(steps: list[Step], name: str) -> None:
    """`run_recipe` of steps that are read already; `name` is what they are called."""
    started_s = time.monotonic()
    set_aside = False
    for place, step in enumerate(steps, start=1):
        _announce(step, place, len(steps))
        step_started_s = time.monotonic()
        status = _run_step(step)
        set_aside |= status == EXIT_SET_ASIDE
        if status not in (0, EXIT_SET_ASIDE):
            raise StepFailed(status)
        say(f"== step {place} took {time.monotonic() - step_started_s:.0f} s")
    say(f"== the recipe {name} is complete: {time.monotonic() - started_s:.0f} s")
    if set_aside:
        raise StepFailed(EXIT_SET_ASIDE)


def _announce(step: Step, place: int, of: int) -> None:
    say(f"== step {place} of {of}: dpkd {step.title} -> {step.config.out}")  # type: ignore[attr-defined]


def _run_step(step: Step) -> int:
    with tempfile.NamedTemporaryFile("wb", suffix=".toml") as file:
        file.write(step.config.to_toml().encode())
        file.flush()
        return run_command([step.command, "--config", file.name])
