"""Finding data: sets by name in a data directory, and rows whose fields have other names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.prompts.sources import ExampleSource, open_examples, raw_rows
from dpkd.evaluate.options.eval import KNOWN_SETS, SET_PREFIX, EvalConfig

DATA_VARIABLE = "DPKD_DATA"


def resolve_sets(config: EvalConfig) -> dict[str, str]:
    """The data of `config` with known names replaced by their files; raises `UserError` for a missing one."""
    return {
        name: str(_find(place.removeprefix(SET_PREFIX), config.data_dir)) if place.startswith(SET_PREFIX) else place
        for name, place in config.data.items()
    }


def _find(name: str, data_dir: Path | None) -> Path:
    if name not in KNOWN_SETS:
        raise UserError("no set has this name", found=repr(name), expected=", ".join(KNOWN_SETS), where="--data")
    given = data_dir or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if given is None:
        raise UserError(
            f"there is no data directory for the set {name!r}",
            where="--data",
            advice=f"Give --data-dir DIR, set the environment variable {DATA_VARIABLE}, or give --data {name}=FILE",
        )
    for file in KNOWN_SETS[name]:
        if (given / file).is_file():
            return given / file
    there = sorted(path.name for path in given.iterdir())[:8] if given.is_dir() else None
    raise UserError(
        f"the set {name!r} is not in the data directory",
        found=", ".join(there) or "an empty directory" if there is not None else "no such directory",
        expected=" or ".join(KNOWN_SETS[name]),
        where=given,
        advice=f"Put the file there, or give --data {name}=FILE",
    )


def open_set(place: str, fields: dict[str, str]) -> ExampleSource:
    """The source at `place` with renamed fields: `fields[name]` is the name of the field in the rows."""
    source = open_examples(place)
    if not fields:
        return source
    rows = (row for _, row in raw_rows(source, fields.values()))
    return ExampleSource(source.name, source.identity, dataset=list(_rename(rows, fields, source.name)))


def _rename(rows: Iterable[Any], fields: dict[str, str], name: str) -> Iterator[Any]:
    found: set[str] = set()
    keys: list[str] = []
    for row in rows:
        if not isinstance(row, dict):
            yield row  # refused later, with its line
            continue
        keys = keys or [str(key) for key in row]
        renamed = {key: value for key, value in row.items() if key not in fields.values()}
        for ours, theirs in fields.items():
            renamed.pop(ours, None)
            if theirs in row:
                found.add(theirs)
                renamed[ours] = row[theirs]
        yield renamed
    if missing := [theirs for theirs in fields.values() if theirs not in found]:
        raise UserError(
            "no row has the field given by --field",
            found=", ".join(keys) or "no field",
            expected=missing[0],
            where=name,
            advice="Give --field NAME=FIELD with a field that the rows have",
        )
