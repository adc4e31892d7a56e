"""Recipes: the steps of a TOML file in order, each a `dpkd` process of its own, each skipped when complete.

A recipe is

    [[steps]]
    command = "cache-teacher"   # then the command's options, as in its own --config file
    ...

Every command recognises its own finished output, so running a recipe again goes on where it stopped.

A recipe can alternate between the student's responses and training on them:

    [rounds]
    count = 2                        # rounds 0 and 1
    student = "runs/x/student"       # the student of round 0

    [[steps]]                        # steps without `repeat` run once, where they stand
    ...

    [[steps]]
    repeat = "rounds"                # neighbouring steps with `repeat` run together, once a round
    command = "cache-teacher"
    student = "{student}"
    round = "r{round}"
    ...

    [[steps]]
    repeat = "rounds"
    command = "train"
    student = "{student}"
    round = "r{round}"
    out = "runs/x/round-{round}"
    ...

Text options hold placeholders. `{round}` is the round's number from 0 and `{next}` the one after it, both in repeated
steps alone. `{student}` is the student with which the round begins: that of `[rounds]` in round 0, then the `out` of
the (last) train step of the round before; steps before the rounds have the first student, steps after them the final
one.
A word of small letters in braces is always taken for a placeholder.

Every step of every round is checked before the first one starts. As each is a process that ends before the next begins,
teacher and student are never in memory at one time but where a command itself holds both.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dpkd.distill.config import TrainConfig
from dpkd.distill.student_config import InitStudentConfig
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
_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")


class RoundsConfig(Settings):
    """The `[rounds]` of a recipe."""

    count: int = Field(ge=1, description="rounds")
    student: str = Field(description="student of round 0: a checkpoint directory or a hub name")


@dataclass(frozen=True)
class Step:
    """One command of a recipe with its checked options; `round` is the one that it belongs to."""

    command: str
    config: Settings
    round: int | None = None

    @property
    def title(self) -> str:
        """The command, and the round where there is one."""
        return self.command if self.round is None else f"{self.command}, round {self.round}"


def read_recipe(path: Path) -> list[Step]:
    """The checked steps of a recipe, round by round; raises `UserError` for anything that a step would refuse."""
    content = read_toml(path)
    unknown = [key for key in content if key not in ("steps", "rounds")]
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}", expected="[[steps]] and [rounds]", where=path)
    tables = content.get("steps")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError("the recipe has no [[steps]]", where=path, advice="See configs/quickstart.toml")
    rounds = None
    if "rounds" in content:
        if not isinstance(content["rounds"], dict):
            raise UserError("`rounds` is no table", expected="[rounds]", where=path)
        rounds = RoundsConfig.parse(content["rounds"], where=f"{path}, [rounds]")
    begin, end = _repeated(tables, rounds, path)
    return _expand(tables, begin, end, rounds, path)


def _repeated(tables: list[dict[str, Any]], rounds: RoundsConfig | None, path: Path) -> tuple[int, int]:
    """Where the steps of a round begin and end in the list (0, 0: there are none)."""
    places = [place for place, table in enumerate(tables) if "repeat" in table]
    for place in places:
        if tables[place]["repeat"] != "rounds":
            found = repr(tables[place]["repeat"])
            raise UserError(
                "`repeat` is not known", found=found, expected="'rounds'", where=f"{path}, step {place + 1}"
            )
    if rounds is None:
        if places:
            raise UserError(
                "a step is repeated, and the recipe has no [rounds]",
                where=f"{path}, step {places[0] + 1}",
                advice="Add [rounds] with `count` and `student`",
            )
        return 0, 0
    if not places:
        raise UserError("no step is repeated", where=path, advice='Mark the steps of a round with repeat = "rounds"')
    begin, end = places[0], places[-1] + 1
    if len(places) != end - begin:
        gap = next(place for place in range(begin, end) if place not in places)
        raise UserError(
            "a step that runs once stands between the steps of a round",
            where=f"{path}, step {gap + 1}",
            advice="Put it before or after them",
        )
    if not any(table.get("command") == "train" for table in tables[begin:end]):
        raise UserError("a round has no train step, so its student would stay the same", where=path)
    return begin, end


def _expand(tables: list[dict[str, Any]], begin: int, end: int, rounds: RoundsConfig | None, path: Path) -> list[Step]:
    """The steps before the rounds, those of each round, and those after them."""
    student = {} if rounds is None else {"student": rounds.student}
    steps = [_read_step(tables[place], student, f"{path}, step {place + 1}") for place in range(begin)]
    seen: dict[tuple[int, str], int] = {}
    for number in range(0 if rounds is None else rounds.count):
        values = student | {"round": str(number), "next": str(number + 1)}
        for place in range(begin, end):
            where = f"{path}, step {place + 1}, round {number}"
            step = _read_step(tables[place], values, where, number)
            output = _output(step.config)
            if (place, output) in seen:
                raise UserError(
                    f"the step writes the same output in rounds {seen[place, output]} and {number}",
                    found=output,
                    where=where,
                    advice="Put {round} into its `out`, or into the `round` of cache-teacher",
                )
            seen[place, output] = number
            steps.append(step)
            if isinstance(step.config, TrainConfig):
                student = {"student": str(step.config.out)}
    return steps + [
        _read_step(tables[place], student, f"{path}, step {place + 1}") for place in range(end, len(tables))
    ]


def _output(config: Settings) -> str:
    """What names the step's output."""
    name = str(config.out)  # type: ignore[attr-defined]
    return f"{name}, round {config.round}" if isinstance(config, CacheConfig) else name


def _read_step(table: dict[str, Any], values: Mapping[str, str], where: str, number: int | None = None) -> Step:
    options = {key: value for key, value in table.items() if key not in ("command", "repeat")}
    command = table.get("command")
    if command not in CONFIGS:
        raise UserError("a step's command is not known", found=repr(command), expected=", ".join(CONFIGS), where=where)
    return Step(command, CONFIGS[command].parse(_filled(options, values, where), where=where), number)


def _filled(value: Any, values: Mapping[str, str], where: str) -> Any:
    """`value` with the placeholders of its texts filled in; raises `UserError` for one that has no value here."""
    if isinstance(value, dict):
        return {key: _filled(item, values, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, values, where) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(
                f"the placeholder {match[0]} has no value here",
                expected=", ".join(f"{{{name}}}" for name in values) or "none: the recipe has no [rounds]",
                where=where,
            )
        return values[match[1]]

    return _PLACEHOLDER.sub(fill, value)


def run_recipe(path: Path, *, dry_run: bool = False) -> None:
    """Run every step; raises `StepFailed` with the first failing step's status.

    A step that set rows aside is no failure: the recipe goes on, and ends with that status.
    """
    steps = read_recipe(path)
    started_s = time.monotonic()
    set_aside = False
    for place, step in enumerate(steps, start=1):
        say(f"== step {place} of {len(steps)}: dpkd {step.title} -> {step.config.out}")  # type: ignore[attr-defined]
        if dry_run:
            print(f"# {step.title}\n{step.config.to_toml()}")
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
