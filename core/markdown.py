"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """A table of `header` and `rows`: the first `left` columns to the left, numbers to the right. Ends with a newline.

    A bar or a line break in a cell would end it: the bar is escaped, the line break becomes a space.
    """
    align = [":---" if index < left else "---:" for index in range(len(header))]
    lines = [[_cell(value) for value in header], align, *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    return " ".join(("" if value is None else str(value)).splitlines()).replace("\\|", "|").replace("|", "\\|")
