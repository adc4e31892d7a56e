"""Cells of a report's tables: means with their intervals, differences and p-values as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: after the best cell of a column
BEST_MARK = "\u2605"


@dataclass(frozen=True, slots=True)
class Cell:
    """A value and its interval as text, and whether it is the best of its column."""

    value: str
    interval: str = ""
    best: bool = False

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


#: names of models, and the cells about them
Row = tuple[tuple[str, ...], list[Cell]]


@dataclass(frozen=True, slots=True)
class Table:
    """`columns` are the headers of the cells; each row is about one model, or about the difference of two."""

    title: str
    columns: list[str]
    rows: list[Row]
    first_column: str = "Model"
    note: str = ""


def interval_cell(value: Any, marked: float | None = None, sign: str = "", places: int = 2, scale: float = 1) -> Cell:
    """A mean with its interval; a dash for None. It is the best of its column if it equals `marked`."""
    if value is None or value["mean"] is None:
        return Cell("-")
    ends = [f"{scale * value[key]:{sign}.{places}f}" for key in ("low", "high") if value[key] is not None]
    interval = f"[{', '.join(ends)}]" if ends else ""  # one row has none
    return Cell(f"{scale * value['mean']:{sign}.{places}f}", interval, value["mean"] == marked)


def number_text(value: float | None, places: int, scale: float = 1) -> str:
    """`value` times `scale` with that many decimals; a dash for None."""
    return "-" if value is None else f"{scale * value:.{places}f}"


def p_value_text(value: float | None) -> str:
    """A p-value with three decimals; a dash for None."""
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def difference_of(
    report: Mapping[str, Any],
    data: str,
    model: str,
    baseline: str | None,
    metric: str = "rouge_l",
    bucket: int | None = None,
) -> dict[str, Any] | None:
    """The difference of `model` minus `baseline`, over all rows or in one bucket; None if they were not compared."""
    for row in report["comparisons"][data]:
        if {row["model"], row["baseline"]} == {model, baseline}:
            if bucket is not None and "buckets" not in row:
                return None
            found = (row if bucket is None else row["buckets"][bucket])[metric]
            return dict(found) if row["model"] == model else turned(found)
    return None


def turned(difference: Mapping[str, Any]) -> dict[str, Any]:
    """The same comparison with the models exchanged."""
    sources = {"mean": "mean", "low": "high", "high": "low"}
    negated = {key: None if difference[of] is None else 0.0 - difference[of] for key, of in sources.items()}
    return {**difference, **negated, "wins": difference["losses"], "losses": difference["wins"]}


def difference_cells(difference: Mapping[str, Any]) -> list[Cell]:
    """A difference, its p-value and Holm's, the counts of rows, and the smallest resolvable difference."""
    return [
        interval_cell(difference, sign="+"),
        Cell(p_value_text(difference["p_value"])),
        Cell(p_value_text(difference["p_holm"])),
        Cell(f"{difference['wins']} / {difference['ties']} / {difference['losses']}"),
        Cell(number_text(difference["smallest_resolvable"], 2)),
    ]
