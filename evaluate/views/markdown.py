"""The report as Markdown tables, for `report.md` and for a pipe."""

from __future__ import annotations

from typing import Any

from dpkd.evaluate.metrics.scripts import LostText
from dpkd.evaluate.report.build import length_text
from dpkd.evaluate.report.measures_tables import teacher_table
from dpkd.evaluate.report.provenance import data_text, decoding_text, how_made
from dpkd.evaluate.report.tables import Table, power_note, set_tables


def markdown_table(report: dict[str, Any]) -> str:
    """The report as Markdown: for each data set tables of scores, lengths and differences. Ends with a line break."""
    parts = ["# Evaluation\n", f"{introduction(report)}\n"]
    for data in report["data"]:
        parts += [f"## {data} ({data_text(report, data)})\n"]
        if message := LostText(**report["data"][data]["lost_text"]).message:
            parts.append(f"**Rouge loses text here:** {message}.\n")
        parts += [_table(table) for table in set_tables(report, data)]
        if not report["comparisons"][data]:
            parts.append(f"{power_note(report, data)}\n")
    if (found := teacher_table(report)) is not None:
        parts += [f"## {found.title}\n", _table(found)]
    parts += ["## How this was made\n", "".join(f"- {what}: `{_code(text)}`\n" for what, text in how_made(report))]
    return "\n".join(parts)


def introduction(report: dict[str, Any]) -> str:
    """What the numbers are, and how the answers were drawn."""
    tokenizer = report["settings"]["rouge_tokenizer"]
    tokens = "" if tokenizer == "default" else f" (tokens: {tokenizer})"
    return (
        f"Answers: {decoding_text(report)}. Rouge{tokens} and exact match from 0 to 100, each row's score averaged "
        "over seeds; in brackets the 95% bootstrap interval over rows. Columns such as [0,30) go by the "
        f"{length_text(report)}."
    )


def _table(table: Table) -> str:
    lines = [[table.first_column, *table.columns], ["---", *["---:"] * len(table.columns)]]
    lines += [[" - ".join(f"`{name}`" for name in names), *map(str, cells)] for names, cells in table.rows]
    note = f"\n{table.note}\n" if table.note else ""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + note


def _code(text: str) -> str:
    """Text for a span of code, which a backtick would end."""
    return " ".join(text.split()).replace("`", "'")
