"""The report as pictures, PNG and SVG: scores by length (paper, Fig. 5), lengths of answers, training curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.files import replacing
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.report.build import length_text, summaries_of
from dpkd.evaluate.report.curves import LOGS, METRICS, thinning_text
from dpkd.evaluate.report.provenance import SHOWN_DIGITS, decoding_text, model_text, software_text
from dpkd.evaluate.report.tables import bucket_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow (too pale on white) and
# with grey for its black (on which an error bar does not show)
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
_HATCHES = ("", "//", "..", "xx")  # a second sign, for the eighth model on and for print in grey
_WIDTH_INCHES, _PANEL_INCHES, _DPI = 8.0, 3.6, 150
_LEGEND_CHARACTERS, _CAPTION_CHARACTERS, _COMMAND_CHARACTERS = 110, 150, 360
FORMATS = ("png", "svg")


def require_matplotlib() -> None:
    """Raise `UserError` when matplotlib is missing; called before the first answer is generated."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "matplotlib is not installed, which draws the report's plots",
            advice="Install dpkd[report]: pip install 'dpkd[report]'",
        )


def write_plots(report: dict[str, Any], scored_sets: Sequence[ScoredSet], out: Path) -> None:
    """Write every plot of `report` to `out`, each in all `FORMATS`; curves only where runs are known."""
    plot_by_bucket(report, "rouge_l", "Rouge-L", out / "rouge_by_bucket")
    plot_by_bucket(report, "exact_match", "Exact match", out / "exact_match_by_bucket")
    plot_lengths(report, scored_sets, out / "response_lengths")
    if any(run[kind] for run in report["runs"].values() for kind in LOGS):
        plot_curves(report, out / "training_curves")


def plot_by_bucket(report: dict[str, Any], metric: str, title: str, path: Path) -> None:
    """Draw one panel a data set, one bar a model and bucket; `path` is without suffix."""
    figure, panels = _panels(report, len(report["data"]))
    for panel, data in zip(panels, report["data"], strict=True):
        _draw_bars(panel, report, data, metric)
        panel.set_xlabel(length_text(report))
        panel.set_ylabel(f"{title} (0 to 100)")
        panel.set_title(f"{data}: {report['data'][data]['n']} rows", fontsize=10)
    _save(figure, f"{title} by length, with 95% intervals", _unique_handles(panels), report, path)


def plot_lengths(report: dict[str, Any], scored_sets: Sequence[ScoredSet], path: Path) -> None:
    """Draw the words of the gold responses and of each model's answers: 90% of them, the middle half, the median."""
    sets = {data: [scored for scored in scored_sets if scored.eval_set.name == data] for data in report["data"]}
    figure, panels = _panels(report, len(sets))
    places = {name: place for place, name in enumerate(report["models"])}
    for panel, (data, found) in zip(panels, sets.items(), strict=True):
        gold = [len(example.references[0].split()) for example in found[0].eval_set.examples]
        values = [gold, *(scored.scores["num_words"].ravel().tolist() for scored in found)]
        names = ["gold response", *(scored.model for scored in found)]
        boxes = panel.boxplot(values, orientation="horizontal", whis=(5, 95), showfliers=False, patch_artist=True)
        for box, name in zip(boxes["boxes"], names, strict=True):
            box.set_facecolor(_COLOURS[places[name] % len(_COLOURS)] if name in places else "#FFFFFF")
        for median in boxes["medians"]:
            median.set_color("#000000")
        panel.set_yticks(range(1, len(names) + 1), names)
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.set_xlabel("words")
        panel.set_title(f"{data}: {report['data'][data]['n']} rows", fontsize=10)
        panel.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        panel.set_axisbelow(True)
    _save(figure, "Words of the answers: 90% of them, the middle half, the median", {}, report, path)


def plot_curves(report: dict[str, Any], path: Path) -> None:
    """Draw a panel for each figure that a run has, by step; validations are dashed with dots."""
    runs = report["runs"]
    metrics = [metric for metric in METRICS if any(metric in run[kind] for run in runs.values() for kind in LOGS)]
    figure, panels = _panels(report, len(metrics))
    models = list(report["models"])
    names = [*models, *(name for name in runs if name not in models)]
    for panel, metric in zip(panels, metrics, strict=True):
        for name, run in runs.items():
            for kind in LOGS:
                if metric in run[kind]:
                    curve = run[kind][metric]
                    style = "--o" if kind == "validation" else "-"
                    colour = _COLOURS[names.index(name) % len(_COLOURS)]
                    label = f"{name}, {kind}"
                    panel.plot(curve["steps"], curve["values"], style, color=colour, label=label, markersize=3)
        panel.set_title(METRICS[metric], fontsize=10)
        panel.set_xlabel("step")
        panel.grid(color="#DDDDDD", linewidth=0.8)
    _save(figure, f"Training by step. {thinning_text(runs)}".strip(), _unique_handles(panels), report, path)


def caption(report: dict[str, Any]) -> str:
    """What a plot says of its making, in a few lines; `report.json` has all of it."""
    rows = ", ".join(f"{data} {about['n']} rows" for data, about in report["data"].items())
    models = ", ".join(f"{name} = {model_text(model)}" for name, model in report["models"].items())
    runs = ", ".join(f"{name} = {run['directory']}" for name, run in report["runs"].items())
    command = report["command"]
    if len(command) > _COMMAND_CHARACTERS:
        command = f"{command[:_COMMAND_CHARACTERS]} ... (all of it in report.json)"
    lines = [
        f"Data: {rows}. Answers: {decoding_text(report)}.",
        f"Models: {models}.",
        *([f"Runs: {runs}."] if runs else []),
        f"Software: {software_text(report)}. Evaluation {report['fingerprint'][:SHOWN_DIGITS]}, made by",
        command,
    ]
    wrap = textwrap.TextWrapper(_CAPTION_CHARACTERS, break_on_hyphens=False)
    return "\n".join(wrap.fill(line) for line in lines)


def _panels(report: dict[str, Any], num_panels: int) -> tuple[Figure, list[Axes]]:
    # the object API keeps no global state: the caller's own figures and backend stay as they are
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below_inches = 0.14 * len(caption(report).splitlines()) + 0.3 * len(report["models"]) / 2
    figure = Figure(
        figsize=(_WIDTH_INCHES, _PANEL_INCHES * num_panels + below_inches + 0.5),
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(num_panels, 1, squeeze=False)[:, 0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _draw_bars(panel: Axes, report: dict[str, Any], data: str, metric: str) -> None:
    summaries = summaries_of(report, data)
    models = list(report["models"])
    labels = bucket_labels(summaries)
    width = 0.8 / len(summaries)
    highest = 0.0
    for shown, (name, summary) in enumerate(summaries.items()):
        place = models.index(name)
        shift = (shown - (len(summaries) - 1) / 2) * width
        scores = [bucket[metric] for bucket in summary["buckets"]]
        # an empty bucket keeps its place and has no bar
        drawn = [(index + shift, score) for index, score in enumerate(scores) if score["mean"] is not None]
        highest = max(highest, *(score["high"] for _, score in drawn), 0.0)
        panel.bar(
            [x for x, _ in drawn],
            [score["mean"] for _, score in drawn],
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
        range(len(labels)),
        [label.replace(" (", "\n(") for label in labels],
    )
    panel.set_xlim(-0.6, len(labels) - 0.4)
    # no model with a hit: an axis from 0 to nothing would be drawn around 0
    panel.set_ylim(0, None if highest > 0 else 1)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    panel.set_axisbelow(True)


def _unique_handles(panels: Sequence[Axes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def _save(figure: Figure, title: str, handles: dict[str, Any], report: dict[str, Any], path: Path) -> None:
    import matplotlib

    # names and paths are text: a $ in them begins no formula
    figure.supxlabel(caption(report), fontsize=6.5, color="#555555", x=0.01, ha="left", parse_math=False)
    if handles:
        # as many entries in a line as fit, so that long names do not run over the edge
        num_columns = max(1, min(4, len(handles), _LEGEND_CHARACTERS // (max(map(len, handles)) + 6)))
        # the title is the legend's, as the layout would put a title and a legend above the panels in one place
        figure.legend(
            handles.values(), handles.keys(), loc="outside upper center", ncols=num_columns, frameon=False, fontsize=9,
            title=title, title_fontsize=11,
        )  # fmt: skip
    else:
        figure.suptitle(title, fontsize=11)
    figure.draw_without_rendering()  # lays out once, for all formats
    figure.set_layout_engine("none")
    described = {"Title": path.name, "Description": caption(report)}
    # texts stay texts in the SVG, and equal reports give equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpkd"}):
        for kind in FORMATS:
            metadata = described | ({"Date": None} if kind == "svg" else {})
            with replacing(path.with_suffix(f".{kind}")) as temporary:
                figure.savefig(temporary, dpi=_DPI, metadata=metadata)
