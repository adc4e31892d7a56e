"""What a judge said of each answer, read from the directory of a finished `dpkd judge`, for the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.core.errors import UserError
from dpkd.core.identity import file_sha256
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.views.page.examples import Grades

VERDICTS = "per_verdict.parquet"
_COLUMNS = ["data", "example_id", "model", "seed", "other", "other_seed", "swapped", "reply", "read"]


def read_grades(folders: Sequence[str], scored_sets: Sequence[ScoredSet]) -> Grades:
    """The verdicts of all `folders` about the answers of `scored_sets`; several about one answer are joined.

    Raises `UserError` for a directory without verdicts, and for one whose verdicts are about none of the answers.
    """
    known = {(scored.eval_set.name, scored.model) for scored in scored_sets}
    said: dict[tuple[str, str, int, str], list[tuple[str, str]]] = {}
    for folder in folders:
        rows = [row for row in _rows(Path(folder)) if (row["data"], row["model"]) in known]
        if not rows:
            raise UserError(
                "the judging is about none of the answers of this report",
                found=folder,
                expected="the same names of models and data sets",
                where="--judge",
                advice="Judge the same evaluations, or leave out NAME= in front of them",
            )
        for row in rows:
            reply = row["reply"] or "(refused)"
            key = (row["data"], row["model"], row["seed"], row["example_id"])
            said.setdefault(key, []).append((_read(row, second=row["swapped"]), reply))
            if row["other"] is not None:
                key = (row["data"], row["other"], row["other_seed"], row["example_id"])
                turned = row | {"other": row["model"]}
                said.setdefault(key, []).append((_read(turned, second=not row["swapped"]), reply))
    return {
        key: (", ".join(read for read, _ in found), "\n\n".join(reply for _, reply in found))
        for key, found in said.items()
    }


def grades_identity(folders: Sequence[str]) -> list[str]:
    """The sha256 of the verdicts of each folder; raises `UserError` for a folder without any."""
    return [file_sha256(_path(Path(folder))) for folder in folders]


def _path(folder: Path) -> Path:
    if not (folder / VERDICTS).is_file():
        raise UserError(
            "the directory holds no finished judging",
            found=f"no {VERDICTS}" if folder.is_dir() else "no such directory",
            where=folder,
            advice="Give the --out directory of a finished `dpkd judge`",
        )
    return folder / VERDICTS


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = _path(folder)
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=_COLUMNS).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the verdicts cannot be read: {error}", where=path) from None
    return rows


def _read(row: dict[str, Any], *, second: bool) -> str:
    """A grade from 1 to 10, or the outcome against the other model; `second`: the answer came second, as B."""
    parts = (row["read"] or "unreadable").split()
    if row["other"] is None:
        return str(parts[int(second)] if len(parts) > 1 else parts[0])
    outcome = {"tie": "tied with", "A" if not second else "B": "better than", "B" if not second else "A": "worse than"}
    return f"{outcome.get(parts[0], 'unreadable against')} {row['other']}"
