"""The report for whoever asked for it: tables drawn for a terminal, Markdown for a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from dpkd.evaluate.metrics.scripts import LostText
from dpkd.evaluate.report.measures_tables import teacher_table
from dpkd.evaluate.report.provenance import data_text
from dpkd.evaluate.report.tables import BEST_MARK, Cell, Table, power_note, set_tables
from dpkd.evaluate.views.markdown import introduction, markdown_table

if TYPE_CHECKING:
    from rich.console import Console


def print_report(report: dict[str, Any]) -> None:
    """Print `report` to standard output: with `rich` on a terminal, else as `report.md` has it."""
    if not sys.stdout.isatty():
        print(markdown_table(report))
        return
    from rich.console import Console

    draw_report(report, Console())


def draw_report(report: dict[str, Any], console: Console) -> None:
    """Draw every table on `console`, its best means marked; texts are shown as they are, without markup."""
    from rich.text import Text

    _say(console, introduction(report))
    for data in report["data"]:
        console.rule(Text(f"{data}: {data_text(report, data)}"), style="dim", align="left")
        if message := LostText(**report["data"][data]["lost_text"]).message:
            _say(console, f"Rouge loses text here: {message}.", "bold yellow")
        for table in set_tables(report, data):
            _draw(console, table)
        if not report["comparisons"][data]:
            _say(console, power_note(report, data))
    if (found := teacher_table(report)) is not None:
        _draw(console, found)


def _draw(console: Console, table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

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
    from rich.text import Text

    text = Text(f"{cell.value} {BEST_MARK}" if cell.best else cell.value, style="bold cyan" if cell.best else "")
    # below the mean, so that the columns of a usual terminal hold them
    return text.append(f"\n{cell.interval}", style="not bold dim") if cell.interval else text


def _say(console: Console, text: str, style: str = "dim") -> None:
    from rich.text import Text

    console.print(Text(text, style=style))
