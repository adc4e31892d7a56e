"""Who an output directory belongs to: a marker file in it records what it is made of."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import differences

ADVICE = "Choose another --out; nothing was overwritten"


def output_exists(
    directory: Path,
    marker: str,
    made_of: Mapping[str, Any],
    what: str,
    *,
    ignore: frozenset[str] = frozenset(),
    result: str | None = None,
    advice: str = ADVICE,
) -> bool:
    """Whether `directory` already belongs to the `what` made of `made_of`; False when it is free.

    Args:
        directory: the output; it may be missing or empty.
        marker: file in it, `.json` or `.toml`, that records what it is made of.
        made_of: the same record for the present command; JSON values.
        what: what the directory holds, in words: "student", "run".
        ignore: top-level keys of the record that may differ, such as paths.
        result: file that must not exist without the marker. None: no file may.
        advice: what to do about another output.

    Raises:
        UserError: the directory holds something else, or the same kind of thing made of something else.
    """
    path = directory / marker
    if directory.exists() and not directory.is_dir():
        raise UserError("the output is a file, not a directory", where=directory, advice=advice)
    if not path.is_file():
        if directory.exists() and ((directory / result).exists() if result else any(directory.iterdir())):
            raise UserError(
                f"the output directory is not empty and holds no {what} of dpkd",
                expected=f"a file {marker}, or an empty directory",
                where=directory,
                advice=advice,
            )
        return False
    try:
        text = path.read_text(encoding="utf-8")
        existing = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        record = {key: value for key, value in existing.items() if key not in ignore}
    except (ValueError, AttributeError) as error:
        raise UserError(f"the record of the output cannot be read: {error}", where=path, advice=advice) from None
    ours = {key: value for key, value in made_of.items() if key not in ignore}
    # JSON knows no tuples, and a TOML file no null
    if changed := differences(record, json.loads(json.dumps(ours))):
        raise UserError(
            f"the output directory holds another {what}; differing: {'; '.join(changed)}",
            where=directory,
            advice=advice,
        )
    return True
