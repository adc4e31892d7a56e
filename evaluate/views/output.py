"""The directory of a report: whether it is free, complete or another command's, and all files written to it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.files import write_json, write_text
from dpkd.core.identity import differences, fingerprint
from dpkd.core.json_lines import loads
from dpkd.core.outputs import output_exists
from dpkd.core.settings import SAVED_OPTIONS, Settings
from dpkd.evaluate.answers.scoring import ScoredSet, write_per_example
from dpkd.evaluate.views.figures import write_figures
from dpkd.evaluate.views.markdown import report_markdown
from dpkd.evaluate.views.page.examples import Grades
from dpkd.evaluate.views.page.page import html_page

REPORT, ROWS = "report.json", "per_example.parquet"
_ADVICE = "Choose another --out (--generations reuses the answers of this one); nothing was overwritten"


def write_all(
    out: Path, report: dict[str, Any], scored_sets: Sequence[ScoredSet], grades: Grades | None = None
) -> Path:
    """Write the report in every form; returns the path of `report.json`, which comes last and marks the end.

    `grades` are those of a judge, for the page.
    """
    write_per_example(out / ROWS, scored_sets)
    write_text(out / "report.md", report_markdown(report))
    write_text(out / "report.html", html_page(report, scored_sets, grades))
    write_figures(report, scored_sets, out)
    write_json(out / REPORT, report)
    return out / REPORT


def check_options(config: Settings, out: Path, free: frozenset[str], result: str, advice: str = _ADVICE) -> None:
    """Raise `UserError` if a command with other options has written to `out`; those in `free` may differ."""
    options = tomllib.loads(config.to_toml())
    output_exists(out, SAVED_OPTIONS, options, "report", ignore=free, result=result, advice=advice)


def save_options(config: Settings, out: Path) -> None:
    """Write the resolved options beside the report."""
    try:
        write_text(out / SAVED_OPTIONS, config.to_toml())
    except UserError as error:
        reason = f"the output directory cannot be written: {error.__cause__}"
        raise UserError(reason, where=out, advice="Choose another --out") from None


def is_complete(path: Path, identity: dict[str, Any], advice: str = _ADVICE) -> bool:
    """Whether the report at `path` exists; raises `UserError` if the same paths now hold other models or data."""
    if not path.exists():
        return False
    try:
        report = loads(path.read_text(encoding="utf-8"))
        theirs = {"format_version": report["format_version"], "settings": report["settings"], **report["identities"]}
        same = report["fingerprint"] == fingerprint(identity)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the report cannot be read: {type(error).__name__} {error}",
            where=path,
            advice="Delete it and run the same command again: the answers are kept",
        ) from None
    if not same:
        changed = "; ".join(differences(theirs, identity)) or "fingerprint"
        raise UserError(
            f"the output directory holds another report; differing: {changed}", where=path.parent, advice=advice
        )
    return True
