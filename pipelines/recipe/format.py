"""Recipes: TOML files that list commands as steps.

A recipe looks like this:

    [[steps]]
    command = "cache-teacher"   # then the command's options, as in its own --config file
    ...

Give options that several steps of a command share once; a step's own options override them:

    [defaults.train]
    batch_size = 8

`include = ["other.toml"]` runs the steps of other recipes first. Name a file relative to this one, or a shipped recipe
(`"paper/start-tiny"`). A step that is included twice runs once, at its first position. Defaults apply to their own file
only.

Inputs are values that you can replace on the command line: `dpkd run RECIPE --set teacher=DIR`. Steps refer to them as
`{teacher}`:

    [inputs]
    teacher = "OWNER/MODEL"

A recipe can alternate between sampling from the student and training on the samples:

    [rounds]
    count = 2                        # rounds 0 and 1
    student = "runs/x/student"       # the student of round 0

    [[steps]]                        # a step without `repeat` runs once, before or after the rounds
    ...

    [[steps]]
    repeat = "rounds"                # adjacent steps with `repeat` run once per round, in order
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

It can repeat the rounds with other options, each variant starting from the first student:

    [variants.plain]                 # `{variant}` is "plain" in the repeated steps
    [variants.smooth]
    label_smoothing = 0.1            # options of the variant's train steps

A lower-case word in braces is a placeholder. In repeated steps, `{round}` is the round's number, from 0, and `{next}`
the next one. `{student}` is the student at the start of the round: that of `[rounds]` in round 0, then the `out` of the
last train step of the previous round. Steps before the rounds get the first student, and steps after them the final
one if there is only one variant. `{recipes}` and `{examples}` are the folders of the recipes and data that ship with
dpkd.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.settings import read_toml
from dpkd.pipelines.recipe.shipped import find_recipe, shipped_folders, shipped_recipes
from dpkd.pipelines.recipe.steps import OWN_PLACEHOLDERS, PLACEHOLDER, Recipe, RoundsConfig, Step, Table, expand

_KEYS = ("steps", "rounds", "variants", "defaults", "include", "inputs", "reproduce")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_recipe(recipe: str | Path, inputs: Mapping[str, str] | None = None) -> list[Step]:
    """The validated steps, in order, of a shipped recipe or of a TOML file; `inputs` replace values of its [inputs].

    Raises `UserError` for everything in the recipe that a step would reject, and for an input that it does not have.
    """
    given, declared = dict(inputs or {}), set[str]()
    steps = _read(find_recipe(recipe), (), given, declared)
    for name in given:
        if name not in declared:
            raise UserError(
                f"the recipe has no input {name!r}", expected=", ".join(sorted(declared)) or "no inputs", where=recipe
            )
    return steps


def _read(path: Path, including: tuple[Path, ...], given: dict[str, str], declared: set[str]) -> list[Step]:
    if path.resolve() in including:
        raise UserError("the recipe includes itself", where=path, advice="Remove it from `include`")
    content = read_toml(path)
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        known = "[[steps]], [rounds], [variants], [defaults], [inputs], include and [reproduce]"
        raise UserError(f"unknown key {unknown[0]!r}", expected=known, where=path)
    included = content.get("include", [])
    if not _all_are(included, str):
        raise UserError("`include` is not a list of recipes", expected='include = ["other.toml"]', where=path)
    steps = []
    for name in included:
        file = find_recipe(name) if name in shipped_recipes() else path.parent / name
        steps += _read(file, (*including, path.resolve()), given, declared)
    tables = content.get("steps", [] if included else None)
    if not _all_are(tables, dict) or not (tables or included):
        advice = "`dpkd recipes quickstart` prints an example"
        raise UserError("the recipe has no [[steps]]", where=path, advice=advice)
    inputs = _inputs(content, path)
    declared |= set(inputs)
    if tables:
        values = shipped_folders() | inputs | {name: given[name] for name in inputs if name in given}
        steps += expand(_recipe_of(path, tables, content, values))
    return [step for index, step in enumerate(steps) if step not in steps[:index]]


def _all_are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _inputs(content: Table, path: Path) -> dict[str, str]:
    inputs = content.get("inputs", {})
    if not isinstance(inputs, dict) or not _all_are(list(inputs.values()), str):
        raise UserError("`inputs` is not a table of texts", expected='[inputs] with NAME = "VALUE"', where=path)
    for name in inputs:
        if name in OWN_PLACEHOLDERS or not PLACEHOLDER.fullmatch(f"{{{name}}}"):
            raise UserError(
                "an input cannot have this name",
                found=repr(name),
                expected=f"a lower-case word other than {', '.join(OWN_PLACEHOLDERS)}",
                where=f"{path}, [inputs]",
            )
    return dict(inputs)


def _recipe_of(path: Path, tables: list[Table], content: Table, values: dict[str, str]) -> Recipe:
    for key in ("rounds", "variants", "defaults"):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"`{key}` is not a table", expected=f"[{key}]", where=path)
    for key in ("variants", "defaults"):
        if not _all_are(list(content.get(key, {}).values()), dict):
            raise UserError(f"`{key}` contains something other than tables", expected=f"[{key}.NAME]", where=path)
    rounds = RoundsConfig.parse(content["rounds"], where=f"{path}, [rounds]") if "rounds" in content else None
    variants, defaults = content.get("variants", {}), content.get("defaults", {})
    if variants and rounds is None:
        raise UserError("[variants] without [rounds]: there are no rounds to repeat", where=path)
    for name in variants:
        if not _NAME.fullmatch(name):
            raise UserError("a variant's name cannot be part of a path", found=repr(name), where=f"{path}, [variants]")
    for command in defaults:
        if all(table.get("command") != command for table in tables):
            raise UserError(
                "[defaults] for a command that no step runs",
                found=repr(command),
                expected=", ".join(dict.fromkeys(str(table.get("command")) for table in tables)),
                where=f"{path}, [defaults]",
            )
    return Recipe(path, tables, values, rounds, variants or {None: {}}, defaults)
