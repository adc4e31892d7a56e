"""The text of a recipe: from TOML tables to the checked steps that it stands for.

A recipe is

    [[steps]]
    command = "cache-teacher"   # then the command's options, as in its own --config file
    ...

Options that many steps of a command share are said once; a step's own go before them:

    [defaults.train]
    batch_size = 8

`include = ["other.toml"]` puts the steps of other recipes, which lie beside this one, first. A step that is reached by
two ways is there once, at its first place. Defaults hold in their own file alone.

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

and can do so for several objectives, each from the first student on:

    [variants.plain]                 # `{variant}` is "plain" in the repeated steps
    [variants.smooth]
    label_smoothing = 0.1            # options of the variant's train steps

Text options hold placeholders. `{round}` is the round's number from 0 and `{next}` the one after it, both in repeated
steps alone. `{student}` is the student with which the round begins: that of `[rounds]` in round 0, then the `out` of
the (last) train step of the round before; steps before the rounds have the first student, steps after them the final
one, unless there are several variants.
A word of small letters in braces is always taken for a placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dpkd.core.errors import UserError
from dpkd.core.settings import Settings, read_toml
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.options.train import TrainConfig
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.options.merge import MergeConfig
from dpkd.pipelines.commands.noise_options import NoiseConfig
from dpkd.pipelines.commands.prepare_options import PrepareConfig
from dpkd.teacher_cache.options.cache import CacheConfig

CONFIGS: dict[str, type[Settings]] = {
    "prepare-data": PrepareConfig,
    "cache-teacher": CacheConfig,
    "init-student": InitStudentConfig,
    "add-noise": NoiseConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "report": MergeConfig,
    "judge": JudgeConfig,
}
_KEYS = ("steps", "rounds", "variants", "defaults", "include", "reproduce")
_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Table = dict[str, Any]


class RoundsConfig(Settings):
    """The `[rounds]` of a recipe."""

    count: int = Field(ge=1, description="rounds")
    student: str = Field(description="student of round 0: a checkpoint directory or a hub name")


@dataclass(frozen=True)
class Step:
    """One command of a recipe with its checked options; `round` and `variant` are those that it belongs to."""

    command: str
    config: Settings
    round: int | None = None
    variant: str | None = None

    @property
    def title(self) -> str:
        """The command, and variant and round where there are some."""
        parts = [self.command, self.variant, None if self.round is None else f"round {self.round}"]
        return ", ".join(part for part in parts if part is not None)


@dataclass(frozen=True)
class _Recipe:
    """The tables of one file; `variants` has the one None where no variant is named."""

    path: Path
    steps: list[Table]
    rounds: RoundsConfig | None
    variants: dict[str | None, Table]
    defaults: dict[str, Table]


def read_recipe(path: Path) -> list[Step]:
    """The checked steps of a recipe, round by round; raises `UserError` for anything that a step would refuse."""
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> list[Step]:
    if path.resolve() in above:
        raise UserError("the recipe includes itself", where=path, advice="Take it out of `include`")
    content = read_toml(path)
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        known = "[[steps]], [rounds], [variants], [defaults], include and [reproduce]"
        raise UserError(f"unknown key {unknown[0]!r}", expected=known, where=path)
    included = content.get("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise UserError("`include` is no list of recipes", expected='include = ["other.toml"]', where=path)
    steps = [step for name in included for step in _read(path.parent / name, (*above, path.resolve()))]
    tables = content.get("steps", [] if included else None)
    if not isinstance(tables, list) or (not tables and not included) or not _are_tables(tables):
        raise UserError("the recipe has no [[steps]]", where=path, advice="See configs/quickstart.toml")
    if tables:
        steps += _expand(_recipe_of(path, tables, content))
    return [step for place, step in enumerate(steps) if step not in steps[:place]]


def _are_tables(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _recipe_of(path: Path, tables: list[Table], content: Table) -> _Recipe:
    for key in ("rounds", "variants", "defaults"):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"`{key}` is no table", expected=f"[{key}]", where=path)
    for key in ("variants", "defaults"):
        if not _are_tables(list(content.get(key, {}).values())):
            raise UserError(f"`{key}` holds something else than tables", expected=f"[{key}.NAME]", where=path)
    rounds = RoundsConfig.parse(content["rounds"], where=f"{path}, [rounds]") if "rounds" in content else None
    variants, defaults = content.get("variants", {}), content.get("defaults", {})
    if variants and rounds is None:
        raise UserError("there are [variants] and no [rounds] that they would repeat", where=path)
    for name in variants:
        if not _NAME.fullmatch(name):
            raise UserError("a variant's name cannot stand in a path", found=repr(name), where=f"{path}, [variants]")
    for command in defaults:
        if all(table.get("command") != command for table in tables):
            raise UserError(
                "there are defaults for a command that no step has",
                found=repr(command),
                expected=", ".join(dict.fromkeys(str(table.get("command")) for table in tables)),
                where=f"{path}, [defaults]",
            )
    return _Recipe(path, tables, rounds, variants or {None: {}}, defaults)


def _repeated(recipe: _Recipe) -> tuple[int, int]:
    """Where the steps of a round begin and end in the list (0, 0: there are none)."""
    path, tables = recipe.path, recipe.steps
    places = [place for place, table in enumerate(tables) if "repeat" in table]
    for place in places:
        if tables[place]["repeat"] != "rounds":
            found = repr(tables[place]["repeat"])
            raise UserError(
                "`repeat` is not known", found=found, expected="'rounds'", where=f"{path}, step {place + 1}"
            )
    if recipe.rounds is None:
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


def _expand(recipe: _Recipe) -> list[Step]:
    """The steps before the rounds, those of each variant and round, and those after them."""
    begin, end = _repeated(recipe)
    student = {} if recipe.rounds is None else {"student": recipe.rounds.student}
    steps = [_read_step(recipe, place, student) for place in range(begin)]
    seen: dict[tuple[int, str], str] = {}
    final = student
    for variant in recipe.variants if recipe.rounds is not None else []:
        repeated, final = _repeat(recipe, range(begin, end), variant, seen)
        steps += repeated
    after = final if len(recipe.variants) == 1 else {}
    return steps + [_read_step(recipe, place, after) for place in range(end, len(recipe.steps))]


def _repeat(
    recipe: _Recipe, places: range, variant: str | None, seen: dict[tuple[int, str], str]
) -> tuple[list[Step], dict[str, str]]:
    """The steps of all rounds of `variant`, and the student that they end with; `seen` collects what they write."""
    assert recipe.rounds is not None
    student = {"student": recipe.rounds.student}
    named = {} if variant is None else {"variant": variant}
    steps = []
    for number in range(recipe.rounds.count):
        values = student | named | {"round": str(number), "next": str(number + 1)}
        for place in places:
            step = _read_step(recipe, place, values, number, variant)
            turn = str(number) if variant is None else f"{number} of {variant}"
            first = seen.setdefault((place, output_of(step.config)), turn)
            if first != turn:
                raise UserError(
                    f"the step writes the same output in rounds {first} and {turn}",
                    found=output_of(step.config),
                    where=f"{recipe.path}, step {place + 1}, round {number}",
                    advice="Put {round} (and {variant}) into its `out`, or into the `round` of cache-teacher",
                )
            steps.append(step)
            if isinstance(step.config, TrainConfig):
                student = {"student": str(step.config.out)}
    return steps, student


def output_of(config: Settings) -> str:
    """What names a step's output."""
    name = str(config.out)  # type: ignore[attr-defined]
    return f"{name}, round {config.round}" if isinstance(config, CacheConfig) and config.round else name


def _read_step(
    recipe: _Recipe, place: int, values: Mapping[str, str], number: int | None = None, variant: str | None = None
) -> Step:
    table = recipe.steps[place]
    where = f"{recipe.path}, step {place + 1}" + ("" if number is None else f", round {number}")
    command = table.get("command")
    if command not in CONFIGS:
        raise UserError("a step's command is not known", found=repr(command), expected=", ".join(CONFIGS), where=where)
    options = recipe.defaults.get(command, {}) | {k: v for k, v in table.items() if k not in ("command", "repeat")}
    if number is not None and command == "train":
        options |= recipe.variants[variant]
    return Step(command, CONFIGS[command].parse(_filled(options, values, where), where=where), number, variant)


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
