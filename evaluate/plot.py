"""Rouge-L by length bucket as a picture: grouped bars with 95% intervals (paper, Fig. 5)."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.evaluate.buckets import Bucket
from dpkd.evaluate.report import decoding_text, length_text
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow (too pale on white) and
# with grey for its black (on which an error bar does not show)
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
_HATCHES = ("", "//", "..", "xx")  # a second sign, for the eighth model on and for print in grey
_WIDTH_INCHES, _PANEL_INCHES, _DPI = 8.0, 3.6, 150
_LEGEND_CHARACTERS = 110


def require_matplotlib() -> None:
    """Raise `UserError` when matplotlib is missing; called before the first answer is generated."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "matplotlib is not installed, which draws the report's plot",
            advice="Install dpkd[report]: pip install 'dpkd[report]'",
        )


def plot_rouge_by_bucket(report: dict[str, Any], path: Path) -> None:
    """Draw `report` to `path` (PNG, 1200 pixels wide): one panel a data set, one bar a model and bucket."""
    # the object API keeps no global state: the caller's own figures and backend stay as they are
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = list(report["data"])
    # as many legend entries in a line as fit, so that long names do not run over the edge
    num_columns = max(1, min(4, len(report["models"]), _LEGEND_CHARACTERS // (max(map(len, report["models"])) + 6)))
    legend_inches = 0.3 * -(-len(report["models"]) // num_columns)
    figure = Figure(
        figsize=(_WIDTH_INCHES, _PANEL_INCHES * len(names) + legend_inches + 0.5),
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for panel, data in zip(panels, names, strict=True):
        _draw_panel(panel, report, data)
    decoding = "\n".join(textwrap.wrap(decoding_text(report), 95))
    figure.suptitle(f"Rouge-L by length, with 95% intervals\n{decoding}", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)


def _draw_panel(panel: Axes, report: dict[str, Any], data: str) -> None:
    summaries = {name: model["data"][data] for name, model in report["models"].items()}
    buckets = next(iter(summaries.values()))["buckets"]
    width = 0.8 / len(summaries)
    for place, (name, summary) in enumerate(summaries.items()):
        shift = (place - (len(summaries) - 1) / 2) * width
        scores = [bucket["rouge_l"] for bucket in summary["buckets"]]
        # an empty bucket keeps its place and has no bar
        drawn = [(index + shift, score) for index, score in enumerate(scores) if score["mean"] is not None]
        means = [score["mean"] for _, score in drawn]
        panel.bar(
            [x for x, _ in drawn],
            means,
            width * 0.92,
            # rounding may put an end of the interval a hair on the wrong side of the mean
            yerr=[
                [max(0.0, score["mean"] - score["low"]) for _, score in drawn],
                [max(0.0, score["high"] - score["mean"]) for _, score in drawn],
            ],
            label=name,
            color=_COLOURS[place % len(_COLOURS)],
            hatch=_HATCHES[place // len(_COLOURS) % len(_HATCHES)],
            edgecolor="white",
            error_kw={"elinewidth": 1.0, "capsize": 2.5, "ecolor": "#333333"},
        )
    panel.set_xticks(
        range(len(buckets)),
        [f"{Bucket(bucket['low'], bucket['high']).label}\nn = {bucket['n']}" for bucket in buckets],
    )
    panel.set_xlim(-0.6, len(buckets) - 0.4)
    panel.set_ylim(bottom=0)
    panel.set_title(f"{data}: {report['data'][data]['n']} rows", fontsize=10)
    panel.set_xlabel(length_text(report))
    panel.set_ylabel("Rouge-L (0 to 100)")
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
