"""The steps of a recipe: rounds and variants expanded, placeholders filled in, options validated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dpkd.core.errors import UserError
from dpkd.core.option_errors import did_you_mean
from dpkd.core.settings import Settings
from dpkd.pipelines.commands.registry import STEPS

_STEPS = {command.name: command for command in STEPS}
PLACEHOLDER = re.compile(r"\{([a-z]+)\}")
OWN_PLACEHOLDERS = ("student", "round", "next", "variant", "recipes", "examples")

Table = dict[str, Any]


class RoundsConfig(Settings):
    """The `[rounds]` of a recipe."""

    count: int = Field(ge=1, description="rounds")
    student: str = Field(description="student of round 0: a checkpoint directory or a hub name")


@dataclass(frozen=True)
class Step:
    """One command of a recipe with its validated options, and its `round` and `variant`, if any."""

    command: str
    config: Settings
    round: int | None = None
    variant: str | None = None

    @property
    def title(self) -> str:
        """The command, and variant and round if it has them."""
        names = [self.command, self.variant, None if self.round is None else f"round {self.round}"]
        return ", ".join(name for name in names if name is not None)

    @property
    def out(self) -> str:
        """Its output: a path, or the URL of a cache."""
        return str(self.config.out)  # type: ignore[attr-defined]

    @property
    def output_name(self) -> str:
        """What identifies its output: `out`, and the round of a cache."""
        cache_round = getattr(self.config, "round", None) if self.command == "cache-teacher" else None
        return f"{self.out}, round {cache_round}" if cache_round else self.out


@dataclass(frozen=True)
class Recipe:
    """The tables of one file; `variants` has the single key None if no variant is named."""

    path: Path
    steps: list[Table]
    values: dict[str, str]
    rounds: RoundsConfig | None
    variants: dict[str | None, Table]
    defaults: dict[str, Table]


def _repeated(recipe: Recipe) -> range:
    """Indices of the steps of a round, empty if there are none."""
    path, tables = recipe.path, recipe.steps
    indices = [index for index, table in enumerate(tables) if "repeat" in table]
    for index in indices:
        if tables[index]["repeat"] != "rounds":
            value = repr(tables[index]["repeat"])
            raise UserError("unknown `repeat`", found=value, expected="'rounds'", where=f"{path}, step {index + 1}")
    if recipe.rounds is None:
        if indices:
            raise UserError(
                "a step is repeated, but the recipe has no [rounds]",
                where=f"{path}, step {indices[0] + 1}",
                advice="Add [rounds] with `count` and `student`",
            )
        return range(0)
    if not indices:
        raise UserError("no step is repeated", where=path, advice='Mark the steps of a round with repeat = "rounds"')
    repeated = range(indices[0], indices[-1] + 1)
    if len(indices) != len(repeated):
        gap = next(index for index in repeated if index not in indices)
        raise UserError(
            "a step that runs once is between the steps of a round",
            where=f"{path}, step {gap + 1}",
            advice="Move it before or after them",
        )
    if not any(tables[index].get("command") == "train" for index in repeated):
        raise UserError("a round has no train step, so its student would stay the same", where=path)
    return repeated


def expand(recipe: Recipe) -> list[Step]:
    """The steps before the rounds, those of each variant and round, and those after them."""
    repeated = _repeated(recipe)
    if recipe.rounds is None:
        return [_read_step(recipe, index, {}) for index in range(len(recipe.steps))]
    first = final = {"student": _filled(recipe.rounds.student, recipe.values, f"{recipe.path}, [rounds]")}
    steps = [_read_step(recipe, index, first) for index in range(repeated.start)]
    outputs: dict[tuple[int, str], str] = {}
    for variant in recipe.variants:
        of_variant, final = _repeat(recipe, repeated, variant, first, outputs)
        steps += of_variant
    after = final if len(recipe.variants) == 1 else {}
    return steps + [_read_step(recipe, index, after) for index in range(repeated.stop, len(recipe.steps))]


def _repeat(
    recipe: Recipe, repeated: range, variant: str | None, student: Table, outputs: dict[tuple[int, str], str]
) -> tuple[list[Step], dict[str, str]]:
    """The steps of all rounds of `variant`, and the student after them; `outputs` collects what the steps write."""
    assert recipe.rounds is not None
    named = {} if variant is None else {"variant": variant}
    steps = []
    for number in range(recipe.rounds.count):
        values = student | named | {"round": str(number), "next": str(number + 1)}
        for index in repeated:
            step = _read_step(recipe, index, values, number, variant)
            current = str(number) if variant is None else f"{number} of {variant}"
            earlier = outputs.setdefault((index, step.output_name), current)
            if earlier != current:
                raise UserError(
                    f"the step writes the same output in rounds {earlier} and {current}",
                    found=step.output_name,
                    where=f"{recipe.path}, step {index + 1}, round {number}",
                    advice="Put {round} (and {variant}) into its `out`, or into the `round` of cache-teacher",
                )
            steps.append(step)
            if step.command == "train":
                student = {"student": step.out}
    return steps, student


def _read_step(
    recipe: Recipe, index: int, values: Mapping[str, str], number: int | None = None, variant: str | None = None
) -> Step:
    table = recipe.steps[index]
    where = f"{recipe.path}, step {index + 1}" + ("" if number is None else f", round {number}")
    name = table.get("command")
    command = _STEPS.get(str(name))
    if command is None:
        advice = did_you_mean(str(name), _STEPS) or f"Choose one of {', '.join(_STEPS)}"
        raise UserError("unknown command of a step", found=repr(name), where=where, advice=advice)
    layers = [recipe.defaults.get(command.name, {})]
    layers += [{key: value for key, value in table.items() if key not in ("command", "repeat")}]
    if number is not None and command.name == "train":
        layers += [recipe.variants[variant]]
    options_class = command.options_class()
    options = options_class.layered(*_filled(layers, {**values, **recipe.values}, where))
    return Step(command.name, options_class.parse(options, where=where), number, variant)


def _filled(value: Any, values: Mapping[str, str], where: str) -> Any:
    """`value` with the placeholders in its texts replaced; raises `UserError` for one without a value here."""
    if isinstance(value, dict):
        return {key: _filled(item, values, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, values, where) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            known = ", ".join(f"{{{name}}}" for name in values)
            raise UserError(f"the placeholder {match[0]} has no value here", expected=known, where=where)
        return values[match[1]]

    return PLACEHOLDER.sub(fill, value)
