"""A judging as a picture (paper, Fig. 1): bars of grades by method, or of wins, ties and losses by pair."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.files import replacing
from dpkd.evaluate.judge.markdown import judge_text, made_text
from dpkd.evaluate.report.provenance import SHOWN_DIGITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# those of the other plots: Okabe and Ito's palette without its yellow and its black
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
_HATCHES = ("", "//", "..", "xx")
_OUTCOMES = {"win": ("won", "#0072B2"), "tie": ("tied", "#CCCCCC"), "loss": ("lost", "#E69F00")}
_WIDTH_INCHES, _DPI = 8.0, 150
_CAPTION_CHARACTERS, _COMMAND_CHARACTERS = 125, 360
FORMATS = ("png", "svg")


def plot_judge(report: Mapping[str, Any], path: Path) -> None:
    """Draw `report` to `path`, which is without suffix, in all `FORMATS`."""
    import matplotlib

    # the object API keeps no global state: the caller's own figures and backend stay as they are
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    caption = _caption(report)
    pairwise = report["mode"] == "pairwise"
    num_pairs = sum(map(len, report["pairs"].values())) if pairwise else 0
    height = (0.45 * num_pairs + 1.2 if pairwise else 3.6) + 0.14 * caption.count("\n") + 1.0
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    if pairwise:
        _draw_pairs(panel, report)
    else:
        _draw_grades(panel, report)
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    # names and paths are text: a $ in them begins no formula
    figure.supxlabel(caption, fontsize=6.5, color="#555555", x=0.01, ha="left", parse_math=False)
    described = {"Title": path.name, "Description": caption}
    # texts stay texts in the SVG, and equal reports give equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpkd"}):
        for kind in FORMATS:
            metadata = described | ({"Date": None} if kind == "svg" else {})
            with replacing(path.with_suffix(f".{kind}")) as temporary:
                figure.savefig(temporary, dpi=_DPI, metadata=metadata)


def _draw_grades(panel: Axes, report: Mapping[str, Any]) -> None:
    """A group of bars a data set, a bar a model; the ratio to the reference where it was graded."""
    metric = "ratio" if report["settings"]["grade_reference"] else "grade"
    models, sets = list(report["models"]), list(report["data"])
    width = 0.8 / len(models)
    for place, name in enumerate(models):
        shift = (place - (len(models) - 1) / 2) * width
        found = {data: summary[metric] for data, summary in report["models"][name]["data"].items()}
        drawn = {sets.index(data) + shift: score for data, score in found.items() if score["mean"] is not None}
        panel.bar(
            list(drawn),
            [score["mean"] for score in drawn.values()],
            width * 0.92,
            # rounding may put an end of the interval a hair on the wrong side of the mean
            yerr=[
                [max(0.0, score["mean"] - score["low"]) for score in drawn.values()],
                [max(0.0, score["high"] - score["mean"]) for score in drawn.values()],
            ],
            label=name,
            color=_COLOURS[place % len(_COLOURS)],
            hatch=_HATCHES[place // len(_COLOURS) % len(_HATCHES)],
            edgecolor="white",
            error_kw={"elinewidth": 1.0, "capsize": 2.5, "ecolor": "#333333"},
        )
    panel.set_xticks(range(len(sets)), [f"{data}\nn = {report['data'][data]['n']}" for data in sets])
    panel.set_xlim(-0.6, len(sets) - 0.4)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    if metric == "grade":
        panel.set_ylim(1, 10)
        panel.set_ylabel("mean grade (1 to 10), with 95% intervals")
    else:
        panel.set_ylim(bottom=0)
        panel.set_ylabel("grade of the answer / of the reference, %")


def _draw_pairs(panel: Axes, report: Mapping[str, Any]) -> None:
    """A bar a pair and data set: the shares won, tied and lost, which fill it, with the number of decided pairs."""
    rows = [(data, row) for data, pairs in report["pairs"].items() for row in pairs if row["win"]["mean"] is not None]
    left = [0.0] * len(rows)
    for outcome, (label, colour) in _OUTCOMES.items():
        shares = [row[outcome]["mean"] for _, row in rows]
        panel.barh(range(len(rows)), shares, 0.7, left=left, label=label, color=colour, edgecolor="white")
        for place, share in enumerate(shares):
            if share >= 6:  # narrower ones have no room for a number
                panel.text(left[place] + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    panel.set_yticks(
        range(len(rows)),
        [
            f"{data}: {row['model']} against {row['baseline']}\n"
            f"n = {row['num_wins'] + row['num_ties'] + row['num_losses']}, won - lost "
            f"{row['net']['mean']:+.1f} [{row['net']['low']:+.1f}, {row['net']['high']:+.1f}]"
            for data, row in rows
        ],
        fontsize=8,
        parse_math=False,
    )
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    panel.set_xlabel("per cent of the pairs with a verdict in both orders")


def _caption(report: Mapping[str, Any]) -> str:
    """What the picture says of its making, in a few lines; `judge.json` has all of it."""
    command = report["command"]
    if len(command) > _COMMAND_CHARACTERS:
        command = f"{command[:_COMMAND_CHARACTERS]} ... (all of it in judge.json)"
    rows = ", ".join(f"{data} {about['n']} of {about['num_rows']} rows" for data, about in report["data"].items())
    unread = ", ".join(
        f"{name} {100 * count['share']:.1f}%" + (f" ({count['num_refused']} refused)" if count["num_refused"] else "")
        for name, count in report["unparsable"].items()
    )
    lines = [
        judge_text(report),
        f"Data: {rows}. Unparsable replies: {unread}. {made_text(report)}",
        f"Judging {report['fingerprint'][:SHOWN_DIGITS]}, made by",
        command,
    ]
    return "\n".join("\n".join(textwrap.wrap(line, _CAPTION_CHARACTERS)) for line in lines)
