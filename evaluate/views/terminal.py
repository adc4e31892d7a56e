"""The report on standard output: tables drawn for a terminal, Markdown for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from dpkd.evaluate.report.cells import BEST_MARK, Cell, Table
from dpkd.evaluate.report.headline import cautions, headline, plain, ranked_table
from dpkd.evaluate.report.provenance import data_text
from dpkd.evaluate.report.tables import no_match_text, power_note, set_tables, teacher_table
from dpkd.evaluate.views.charts import shortened
from dpkd.evaluate.views.markdown import introduction, report_markdown

_PADDING = 2  # between the columns of a table
_NAME_SHARE = 0.35  # of the width, at most


def print_report(report: dict[str, Any]) -> None:
    """Print `report` to standard output: with `rich` on a terminal, otherwise the text of `report.md`.

    Either way the headline comes last, where you look first.
    """
    if sys.stdout.isatty():
        draw_report(report, Console())
    else:
        print(report_markdown(report))
        print("\n".join(plain([headline(report, data)]) for data in report["data"]))


def draw_report(report: dict[str, Any], console: Console) -> None:
    """Draw every table on `console` with its best means marked; markup in texts is shown, not interpreted."""
    _say(console, introduction(report))
    for data in report["data"]:
        console.rule(Text(f"{data}: {data_text(report, data)}"), style="dim", align="left")
        for table in (*set_tables(report, data), ranked_table(report, data)):
            _draw(console, table)
        if none := no_match_text(report, data):
            _say(console, none)
        if not report["comparisons"][data]:
            _say(console, power_note(report, data))
    if (teacher := teacher_table(report)) is not None:
        _draw(console, teacher)
    for data in report["data"]:
        console.rule(Text(data), style="dim", align="left")
        _say(console, plain(cautions(report, data)), "yellow")
        _say(console, plain([headline(report, data)]), "bold")


def _draw(console: Console, table: Table) -> None:
    """Draw a table; one that is too wide in several parts, each with the names."""
    widest = max(16, int(console.width * _NAME_SHARE))
    names = [_name(names, widest) for names, _ in table.rows]
    first = max(len(part) for text in (table.first_column, *names) for part in text.split("\n"))
    columns = [shortened(column, widest).replace(" (", "\n(") for column in table.columns]
    room, start = console.width - first - _PADDING, 0
    while start < len(columns):
        end, left = start, room
        while end < len(columns):
            of_column = [_lines(cells[end]) for _, cells in table.rows]
            needed = max(len(line) for lines in (*of_column, columns[end].split("\n")) for line in lines) + _PADDING
            if needed > left and end > start:
                break
            left, end = left - needed, end + 1
        title = Text(table.title) if start == 0 else None
        drawn = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        drawn.add_column(Text(table.first_column), overflow="fold")
        for column in columns[start:end]:
            drawn.add_column(Text(column), justify="right", overflow="fold")
        for name, (_, cells) in zip(names, table.rows, strict=True):
            drawn.add_row(Text(name), *map(_cell, cells[start:end]))
        console.print(drawn)
        start = end
    if table.note:
        _say(console, table.note)


def _name(names: Sequence[str], widest: int) -> str:
    """The name of a row, or the two of a difference, within the width."""
    if len(names) == 1 or sum(map(len, names)) + 3 <= widest:
        return shortened(" - ".join(names), widest)
    return "\n- ".join(shortened(name, widest - 2) for name in names)


def _lines(cell: Cell) -> list[str]:
    return [f"{cell.value} {BEST_MARK}" if cell.best else cell.value, cell.interval]


def _cell(cell: Cell) -> Any:
    value, interval = _lines(cell)
    text = Text(value, style="bold cyan" if cell.best else "")
    # below the mean, so that the columns fit a terminal of usual width
    return text.append(f"\n{interval}", style="not bold dim") if interval else text


def _say(console: Console, text: str, style: str = "dim") -> None:
    if text:
        console.print(Text(text, style=style))
