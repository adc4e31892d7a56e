"""The report as one self-contained page: tables, charts and a browser of examples; it loads nothing from anywhere.

Every text of a person or a model is either escaped here or handed to the page's script as JSON in which no `<` stands,
and shown as text. Should a text slip through as markup all the same, the page's policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.metrics.scripts import LostText
from dpkd.evaluate.report.browsed import browsed_set
from dpkd.evaluate.report.build import length_text, summaries_of
from dpkd.evaluate.report.curves import LOGS, METRICS, thinning_text
from dpkd.evaluate.report.measures_tables import teacher_table
from dpkd.evaluate.report.provenance import data_text, how_made
from dpkd.evaluate.report.tables import (
    BEST_MARK,
    Cell,
    Table,
    bucket_labels,
    difference_table,
    further_table,
    length_table,
    power_note,
)
from dpkd.evaluate.views.markdown import introduction
from dpkd.evaluate.views.page.assets import BROWSER, SCRIPT, STYLE
from dpkd.evaluate.views.page.svg import NUM_COLOURS, Line, grouped_bars, length_boxes, line_chart

_MINUS = " \u2212 "


def html_page(report: dict[str, Any], scored_sets: Sequence[ScoredSet]) -> str:
    """The whole page as text."""
    sets = {data: [scored for scored in scored_sets if scored.eval_set.name == data] for data in report["data"]}
    body = "".join(_set_section(report, data, found) for data, found in sets.items())
    if (found := teacher_table(report)) is not None:
        body += f"<section><h2>{escape(found.title)}</h2>{_table(found)}</section>"
    examples = json.dumps({"sets": [browsed_set(data, found) for data, found in sets.items()]}, ensure_ascii=True)
    title = f"Evaluation: {', '.join(report['models'])} on {', '.join(report['data'])}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        '<nav aria-label="Sections"><a href="#scores">Scores</a><a href="#browser">Examples</a>'
        '<a href="#made">How this was made</a></nav>'
        f'<main><h1>Evaluation</h1><p class="note">{escape(introduction(report))}</p>'
        f'<div id="scores">{body}{_runs_section(report)}</div>{BROWSER}{_made_section(report)}</main>'
        f'<script type="application/json" id="examples">{_inert(examples)}</script><script>{SCRIPT}</script>'
        "</body></html>\n"
    )


def _policy() -> str:
    """Nothing is loaded, and only this style and this script count."""
    style, script = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (STYLE, SCRIPT)
    )
    return f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"


def _inert(text: str) -> str:
    """JSON in which nothing can end or open an element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _set_section(report: dict[str, Any], data: str, scored_sets: Sequence[ScoredSet]) -> str:
    summaries = summaries_of(report, data)
    parts = [f'<section><h2>{escape(data)}</h2><p class="note">{escape(data_text(report, data))}.</p>']
    if message := LostText(**report["data"][data]["lost_text"]).message:
        parts.append(f'<p class="warning">Rouge loses text here: {escape(message)}.</p>')
    if len(summaries) > 1:
        parts.append(f'<p class="note">{BEST_MARK} marks the best mean of a column.</p>')
    # a model has one colour on the whole page
    colours = {name: place for place, name in enumerate(report["models"])}
    for title, metric in (("Rouge-L", "rouge_l"), ("Exact match", "exact_match")):
        parts.append(_table(length_table(report, data, title, metric)))
        series = [
            (name, colours[name], [bucket[metric] for bucket in summary["buckets"]])
            for name, summary in summaries.items()
        ]
        labels = (length_text(report), f"{title} (0 to 100)")
        chart = grouped_bars(bucket_labels(summaries), series, f"{title} by length, {data}", labels)
        parts.append(
            _figure(f"{title} by length, with 95% intervals: {data}", chart, _legend(list(summaries), colours))
        )
    parts.append(_table(further_table(report, data)))
    lengths: list[tuple[str, Sequence[float], int | None]] = [
        (scored.model, scored.scores["num_words"].ravel().tolist(), colours[scored.model]) for scored in scored_sets
    ]
    gold = [float(len(example.references[0].split())) for example in scored_sets[0].eval_set.examples]
    boxes = length_boxes([("gold response", gold, None), *lengths], f"Words of the answers, {data}", "words")
    parts.append(_figure(f"Words of the answers (90%, the middle half, the median): {data}", boxes))
    if report["comparisons"][data]:
        parts.append(_table(difference_table(report, data)))
    else:
        parts.append(_note(power_note(report, data)))
    return "".join(parts) + "</section>"


def _runs_section(report: dict[str, Any]) -> str:
    runs = report["runs"]
    if not runs:
        return ""
    colours = _run_colours(report)
    parts = [
        "<section><h2>Training</h2>"
        f'<p class="note">By step; dotted lines are validations. Losses of different objectives do not compare. '
        f"{escape(thinning_text(runs))}</p>{_legend(list(runs), colours)}"
    ]
    for metric, title in METRICS.items():
        lines = [
            Line(f"{name}, {kind}", colours[name], kind == "validation", curve["steps"], curve["values"])
            for name, run in runs.items()
            for kind in LOGS
            if (curve := run[kind].get(metric))
        ]
        if lines:
            parts.append(_figure(f"{title} by step", line_chart(lines, f"{title} by step", ("step", title))))
    return "".join(parts) + "</section>"


def _run_colours(report: dict[str, Any]) -> dict[str, int]:
    """A run has the colour of the model of its name; others follow."""
    models = list(report["models"])
    others = [name for name in report["runs"] if name not in models]
    return {name: place for place, name in enumerate([*models, *others])}


def _made_section(report: dict[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(what)}</dt><dd><code>{escape(text)}</code></dd>" for what, text in how_made(report)
    )  # fmt: skip
    return (
        '<section id="made"><h2>How this was made</h2><p class="note">Of every table and figure above; the numbers of '
        "each seed are in report.json, those of each answer in per_example.parquet. In brackets the first digits of "
        f"sha256 sums.</p><dl>{items}</dl></section>"
    )


def _figure(title: str, svg: str, legend: str = "") -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption>{legend}<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(title)}">{svg}</div></figure>'
    )


def _legend(names: Sequence[str], colours: dict[str, int]) -> str:
    items = [
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true"><rect class="s{colours[name] % NUM_COLOURS}" width="10" '
        f'height="10"/></svg> {escape(name)}</li>'
        for name in names
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{escape(title)}</th>' for title in (table.first_column, *table.columns))
    rows = "".join(
        f'<tr><th scope="row">{escape(_MINUS.join(names))}</th>{"".join(map(_cell, cells))}</tr>'
        for names, cells in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}"><table>'
        f"<caption><span>{escape(table.title)}</span></caption><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"{_note(table.note)}"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _cell(cell: Cell) -> str:
    interval = f" <small>{escape(cell.interval)}</small>" if cell.interval else ""
    if not cell.best:
        return f"<td>{escape(cell.value)}{interval}</td>"
    return f'<td class="best">{escape(cell.value)} <span aria-label="best">{BEST_MARK}</span>{interval}</td>'
