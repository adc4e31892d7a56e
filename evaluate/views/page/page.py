"""The report as one self-contained page: the message, what it rests on, and the examples; it loads nothing.

The template escapes every text of a person or a model. The page's script gets the examples compressed and shows them as
text. If a text became markup all the same, the page's content security policy would not run it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.report.cells import BEST_MARK, interval_cell
from dpkd.evaluate.report.curves import thinning_text
from dpkd.evaluate.report.headline import cautions, headline, ranked, ranked_columns
from dpkd.evaluate.report.provenance import data_text, how_made
from dpkd.evaluate.report.tables import (
    difference_table,
    further_table,
    length_table,
    no_match_text,
    power_note,
    slice_tables,
    teacher_table,
)
from dpkd.evaluate.views.charts import NUM_COLOURS, interval_bar, shortened
from dpkd.evaluate.views.figures import by_length, colours_of, curves, lengths
from dpkd.evaluate.views.markdown import introduction
from dpkd.evaluate.views.page.examples import Grades, packed_examples

_FOLDER = Path(__file__).parent
_STYLES = ("charts.css", "style.css")
# what the template shows of a set, by the functions' names
_OF_A_SET = (
    *(headline, cautions, data_text, by_length, length_table, no_match_text, further_table, difference_table),
    *(slice_tables, power_note),
)
_HEADER_CHARACTERS = 14  # of a name in the header of a narrow column


def html_page(report: dict[str, Any], scored_sets: Sequence[ScoredSet], grades: Grades | None = None) -> str:
    """The whole page as text; `grades` are shown beside the answers."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["names"] = _with_names
    style = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in _STYLES)
    script = (_FOLDER / "script.js").read_text(encoding="utf-8")
    colours = {name: index % NUM_COLOURS for name, index in colours_of(report).items()}
    return environment.get_template("page.html.j2").render(
        title=f"Evaluation: {', '.join(report['models'])} on {', '.join(report['data'])}",
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        introduction=introduction(report),
        best_mark=BEST_MARK,
        sets=list(report["data"]),
        **{function.__name__: partial(function, report) for function in _OF_A_SET},
        ranked=lambda data: _ranked(report, data, colours),
        lengths=lambda data: lengths(report, data, scored_sets),
        comparisons=report["comparisons"],
        teacher=teacher_table(report),
        curves=curves(report),
        runs=[(name, colours[name]) for name in report["runs"]],
        thinning=thinning_text(report["runs"]),
        how_made=how_made(report),
        examples=packed_examples(report, scored_sets, colours, grades or {}),
    )


def _digest(text: str) -> str:
    """The source expression by which a content security policy allows exactly `text`."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _with_names(text: str) -> Markup:
    """`text` as HTML, the names in backticks as code; no line breaks inside Rouge-L."""
    parts = [escape(part).replace("Rouge-L", "Rouge\u2011L") for part in text.split("`")]
    return Markup("".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts)))  # noqa: S704


def _ranked(report: dict[str, Any], data: str, colours: dict[str, int]) -> dict[str, Any]:
    """The ranked table: for each model its name, role, colour, bar and cells."""
    rows, roles = ranked(report, data), report["roles"]
    top = max(row.score["high"] or row.score["mean"] for row in rows)
    titles = {key: shortened(name or "", _HEADER_CHARACTERS) for key, name in roles.items()}
    columns = ranked_columns(rows, titles, "size", "")
    return {
        "columns": list(columns),
        "rows": [
            {
                "name": row.name,
                "role": row.role,
                "colour": colours[row.name],
                "score": interval_cell(row.score),
                "bar": interval_bar(row.score, top, colours[row.name]),
                "cells": [cells[index] for cells in columns.values()],
            }
            for index, row in enumerate(rows)
        ],
    }
