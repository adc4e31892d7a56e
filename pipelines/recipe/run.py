"""Recipes: the steps of a TOML file in order, each a `dpkd` process of its own, each skipped when complete.

What a recipe says is in `recipe_format`. Every command recognises its own finished output, so running a recipe again
goes on where it stopped. Every step of every round is checked before the first one starts. As each is a process that
ends before the next begins, teacher and student are never in memory at one time but where a command itself holds both.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.settings import named_values
from dpkd.pipelines.process import EXIT_SET_ASIDE, StepFailed
from dpkd.pipelines.recipe.format import read_recipe
from dpkd.pipelines.recipe.step_process import run_command
from dpkd.pipelines.recipe.steps import Step


def run_recipe(recipe: str | Path, inputs: Sequence[str] = (), *, dry_run: bool = False) -> None:
    """Run every step of a shipped recipe (by name) or of a TOML file; `inputs` are NAME=VALUE for its [inputs].

    Raises `StepFailed` with the exit code of the first step that fails. Failed rows do not stop the recipe, but decide
    its exit code.
    """
    try:
        steps = read_recipe(recipe, named_values(inputs, "NAME=VALUE", "teacher=DIR"))
    except ValueError as error:
        raise UserError(f"--set: {error}", where="the command line") from None
    if not dry_run:
        run_steps(steps, str(recipe))
        return
    for number, step in enumerate(steps, start=1):
        _announce(step, number, len(steps))
        print(f"# {step.title}\n{step.config.to_toml()}")


def run_steps(steps: list[Step], name: str) -> None:
    """Run steps that are already read; `name` is the recipe's in the messages. Raises `StepFailed` as `run_recipe`."""
    started_s = time.monotonic()
    rows_failed = False
    for number, step in enumerate(steps, start=1):
        _announce(step, number, len(steps))
        step_started_s = time.monotonic()
        status = _run_step(step)
        rows_failed |= status == EXIT_SET_ASIDE
        if status not in (0, EXIT_SET_ASIDE):
            raise StepFailed(status)
        say(f"== step {number} took {time.monotonic() - step_started_s:.0f} s")
    say(f"== the recipe {name} is complete: {time.monotonic() - started_s:.0f} s")
    if rows_failed:
        raise StepFailed(EXIT_SET_ASIDE)


def _announce(step: Step, number: int, total: int) -> None:
    say(f"== step {number} of {total}: dpkd {step.title} -> {step.out}")


def _run_step(step: Step) -> int:
    with tempfile.NamedTemporaryFile("wb", suffix=".toml") as file:
        file.write(step.config.to_toml().encode())
        file.flush()
        return run_command([step.command, "--config", file.name])
