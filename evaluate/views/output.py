"""The directory that a report goes into: what it may hold before, and all that it holds in the end."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.files import write_text
from dpkd.core.identity import differences, fingerprint
from dpkd.core.settings import Settings
from dpkd.evaluate.answers.scoring import ScoredSet, write_per_example
from dpkd.evaluate.report.build import write_report
from dpkd.evaluate.views.markdown import markdown_table
from dpkd.evaluate.views.page.page import html_page
from dpkd.evaluate.views.plots import write_plots

REPORT, ROWS, OPTIONS = "report.json", "per_example.parquet", "dpkd.toml"
_ADVICE = "Give another --out (with --generations its answers are used again); nothing was overwritten"


def write_all(out: Path, report: dict[str, Any], scored_sets: Sequence[ScoredSet]) -> Path:
    """Write the report in every form; `report.json`, whose path is returned, comes last and says that all are there."""
    write_per_example(out / ROWS, scored_sets)
    write_text(out / "report.md", markdown_table(report))
    write_text(out / "report.html", html_page(report, scored_sets))
    write_plots(report, scored_sets, out)
    write_report(out / REPORT, report)
    return out / REPORT


def check_options(config: Settings, out: Path, free: frozenset[str], advice: str = _ADVICE) -> None:
    """Refuse an output directory that a command with other options has begun to fill; `free` ones may differ."""
    path = out / OPTIONS
    if out.exists() and not out.is_dir():
        raise UserError("the output directory is a file", where=out, advice="Give another --out")
    if not path.exists():
        if (out / REPORT).exists():
            raise _other_run(out, [f"{REPORT} is there without the {OPTIONS} of its options"], advice)
        return
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the output directory's options cannot be read: {error}", where=path) from None
    ours = tomllib.loads(config.to_toml())
    for options in (found, ours):
        for key in free:
            options.pop(key, None)
    if changed := differences(found, ours):
        raise _other_run(out, changed, advice)


def save_options(config: Settings, out: Path) -> None:
    """Write the resolved options beside the report."""
    try:
        write_text(out / OPTIONS, config.to_toml())
    except OSError as error:
        raise UserError(f"the output directory cannot be written: {error}", where=out) from None


def is_complete(report_path: Path, identity: dict[str, Any], advice: str = _ADVICE) -> bool:
    """Whether the report is there; raises `UserError` for one of other models or data at the same paths."""
    if not report_path.exists():
        return False
    try:
        found = json.loads(report_path.read_text(encoding="utf-8"))
        theirs = {
            "format_version": found["format_version"],
            "settings": found["settings"],
            **found["identities"],
        }
        same = found["fingerprint"] == fingerprint(identity)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the report cannot be read: {type(error).__name__} {error}",
            where=report_path,
            advice="Delete it to write it again from the answers beside it",
        ) from None
    if not same:
        raise _other_run(report_path.parent, differences(theirs, identity) or ["fingerprint"], advice)
    return True


def _other_run(out: Path, changed: Sequence[str], advice: str) -> UserError:
    return UserError("the output directory holds another run", found="; ".join(changed), where=out, advice=advice)
