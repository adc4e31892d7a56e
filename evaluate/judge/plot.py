"""A judge's report as a figure (paper, Fig. 1): grades by model, or wins, ties and losses by pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.plotting import COLOURS, caption_text, frame_figure, grouped_bars, new_figure, save_figure
from dpkd.evaluate.judge.markdown import judge_text, made_text
from dpkd.evaluate.report.cells import interval_cell
from dpkd.evaluate.report.provenance import SHOWN_DIGITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OUTCOMES = {"win": ("won", COLOURS[0]), "tie": ("tied", "#CCCCCC"), "loss": ("lost", COLOURS[1])}
_WIDTH_INCHES = 8.0
_CAPTION_CHARACTERS = 125


def plot_judge(report: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw `report` to `path`, which has no suffix, as PNG and SVG; returns the paths."""
    caption = _caption(report)
    pairwise = report["mode"] == "pairwise"
    num_pairs = sum(map(len, report["pairs"].values())) if pairwise else 0
    height = (0.45 * num_pairs + 1.2 if pairwise else 3.6) + 0.14 * caption.count("\n") + 1.0
    figure, (panel,) = new_figure(_WIDTH_INCHES, height)
    if pairwise:
        _draw_pairs(panel, report)
    else:
        _draw_grades(panel, report)
    frame_figure(figure, [panel], caption)
    return save_figure(figure, path, caption)


def _draw_grades(panel: Axes, report: Mapping[str, Any]) -> None:
    """A bar for each model and data set: the mean grade, or its ratio to the reference's grade if there is one."""
    metric = "ratio" if report["settings"]["grade_reference"] else "grade"
    sets = list(report["data"])
    scores = {
        name: [model["data"][data][metric] if data in model["data"] else None for data in sets]
        for name, model in report["models"].items()
    }
    grouped_bars(panel, scores, [f"{data}\n{_graded(report, data)}" for data in sets])
    if metric == "grade":
        panel.set_ylim(1, 10)
        panel.set_ylabel("mean grade (1 to 10), with 95% intervals")
    else:
        panel.set_ylim(bottom=0)
        panel.set_ylabel("grade of the answer / of the reference, %")


def _graded(report: Mapping[str, Any], data: str) -> str:
    """How many rows, and how many grades of each model could be read: that many are in a mean."""
    counts = [model["data"][data]["num_grades"] for model in report["models"].values() if data in model["data"]]
    span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{report['data'][data]['n']} rows, {span} grades a model"


def _draw_pairs(panel: Axes, report: Mapping[str, Any]) -> None:
    """A bar for each pair and data set, split into the shares won, tied and lost, with the number of decided pairs."""
    rows = [(data, row) for data, pairs in report["pairs"].items() for row in pairs if row["win"]["mean"] is not None]
    left = [0.0] * len(rows)
    for outcome, (label, colour) in _OUTCOMES.items():
        shares = [row[outcome]["mean"] for _, row in rows]
        panel.barh(range(len(rows)), shares, 0.7, left=left, label=label, color=colour, edgecolor="white")
        for index, share in enumerate(shares):
            if share >= 6:  # a narrower bar is too small for a number
                panel.text(left[index] + share / 2, index, f"{share:.0f}", ha="center", va="center", fontsize=8)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    panel.set_yticks(
        range(len(rows)),
        [
            f"{data}: {row['model']} against {row['baseline']}\n"
            f"n = {row['num_wins'] + row['num_ties'] + row['num_losses']}, won - lost "
            f"{interval_cell(row['net'], sign='+', places=1)}"
            for data, row in rows
        ],
        fontsize=8,
        parse_math=False,
    )
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    panel.set_xlabel("% of the pairs with a verdict in both orders")


def _caption(report: Mapping[str, Any]) -> str:
    """The provenance of the figure in a few lines; `judge.json` has all of it."""
    rows = ", ".join(f"{data} {about['n']} of {about['num_rows']} rows" for data, about in report["data"].items())
    unread = ", ".join(
        f"{name} {100 * count['share']:.1f}%" + (f" ({count['num_refused']} refused)" if count["num_refused"] else "")
        for name, count in report["unparsable"].items()
    )
    lines = [
        judge_text(report),
        f"Data: {rows}. Unparsable replies: {unread}. {made_text(report)}",
        f"Judging {report['fingerprint'][:SHOWN_DIGITS]}, made by",
    ]
    return caption_text(lines, report["command"], "judge.json", _CAPTION_CHARACTERS)
