"""The report as Markdown, for `report.md` and for a pipe."""

from __future__ import annotations

from typing import Any

from dpkd.core.markdown import markdown_table
from dpkd.evaluate.report.build import length_text
from dpkd.evaluate.report.cells import Table
from dpkd.evaluate.report.headline import cautions, headline, ranked_table
from dpkd.evaluate.report.provenance import data_text, decoding_text, how_made
from dpkd.evaluate.report.tables import no_match_text, power_note, set_tables, slice_tables, teacher_table


def report_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: tables of scores, lengths and differences for each data set. Ends with a line break."""
    parts = ["# Evaluation\n", f"{introduction(report)}\n"]
    for data in report["data"]:
        parts.append(f"## {data} ({data_text(report, data)})\n")
        parts.append(f"**{headline(report, data)}**\n")
        if found := cautions(report, data):
            parts.append("".join(f"- {caution}\n" for caution in found))
        parts += [_table(table) for table in (ranked_table(report, data), *set_tables(report, data))]
        parts += [_table(table) for table in slice_tables(report, data)]
        if none := no_match_text(report, data):
            parts.append(f"{none}\n")
        if not report["comparisons"][data]:
            parts.append(f"{power_note(report, data)}\n")
    if (teacher := teacher_table(report)) is not None:
        parts += [f"## {teacher.title}\n", _table(teacher)]
    parts += ["## How this was made\n", "".join(f"- {what}: `{_code(text)}`\n" for what, text in how_made(report))]
    return "\n".join(parts)


def introduction(report: dict[str, Any]) -> str:
    """What the numbers are, and how the answers were drawn."""
    tokenizer = report["settings"]["rouge_tokenizer"]
    tokens = "" if tokenizer == "default" else f" (tokens: {tokenizer})"
    return (
        f"Answers: {decoding_text(report)}. Rouge{tokens} and exact match run from 0 to 100; each row's score is "
        "averaged over seeds. In brackets: 95% intervals over rows. Columns such as [0,30) are ranges of the "
        f"{length_text(report)}."
    )


def _table(table: Table) -> str:
    rows = [[" - ".join(f"`{_code(name)}`" for name in names), *cells] for names, cells in table.rows]
    return markdown_table([table.first_column, *table.columns], rows) + (f"\n{table.note}\n" if table.note else "")


def _code(text: str) -> str:
    """`text` for a code span, which a backtick would end."""
    return " ".join(text.split()).replace("`", "'")
