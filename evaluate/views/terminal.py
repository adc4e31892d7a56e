"""The report on standard output: tables drawn for a terminal, Markdown for a pipe."""

from __future__ import annotations

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from dpkd.evaluate.report.provenance import data_text
from dpkd.evaluate.report.tables import BEST_MARK, Cell, Table, lost_text, power_note, set_tables, teacher_table
from dpkd.evaluate.views.markdown import introduction, report_markdown


def print_report(report: dict[str, Any]) -> None:
    """Print `report` to standard output: with `rich` on a terminal, otherwise the text of `report.md`."""
    if not sys.stdout.isatty():
        print(report_markdown(report))
        return
    draw_report(report, Console())


def draw_report(report: dict[str, Any], console: Console) -> None:
    """Draw every table on `console` with its best means marked; markup in texts is shown, not interpreted."""
    _say(console, introduction(report))
    for data in report["data"]:
        console.rule(Text(f"{data}: {data_text(report, data)}"), style="dim", align="left")
        if lost := lost_text(report, data):
            _say(console, f"Rouge loses text here: {lost}.", "bold yellow")
        for table in set_tables(report, data):
            _draw(console, table)
        if not report["comparisons"][data]:
            _say(console, power_note(report, data))
    if (teacher := teacher_table(report)) is not None:
        _draw(console, teacher)


def _draw(console: Console, table: Table) -> None:
    drawn = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column(Text(table.first_column), overflow="fold")
    for column in table.columns:
        drawn.add_column(Text(column), justify="right", overflow="fold")
    for names, cells in table.rows:
        drawn.add_row(Text(" - ".join(names)), *map(_cell, cells))
    console.print(drawn)
    if table.note:
        _say(console, table.note)


def _cell(cell: Cell) -> Any:
    text = Text(f"{cell.value} {BEST_MARK}" if cell.best else cell.value, style="bold cyan" if cell.best else "")
    # below the mean, so that the columns fit a terminal of usual width
    return text.append(f"\n{cell.interval}", style="not bold dim") if cell.interval else text


def _say(console: Console, text: str, style: str = "dim") -> None:
    console.print(Text(text, style=style))
