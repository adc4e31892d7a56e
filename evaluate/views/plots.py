"""The report as figures, PNG and SVG: scores by length (paper, Fig. 5), lengths of answers, training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.plotting import COLOURS, GRID, caption_text, frame_figure, grouped_bars, new_figure, save_figure
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.report.build import length_text, summaries_of
from dpkd.evaluate.report.curves import LOGS, METRICS, thinning_text
from dpkd.evaluate.report.provenance import SHOWN_DIGITS, decoding_text, model_text, software_text
from dpkd.evaluate.report.tables import bucket_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_INCHES, _PANEL_INCHES, _CAPTION_CHARACTERS = 8.0, 3.6, 150


def write_plots(report: dict[str, Any], scored_sets: Sequence[ScoredSet], out: Path) -> None:
    """Write every plot of `report` to `out` as PNG and SVG; curves only if there are runs."""
    _plot_by_bucket(report, "rouge_l", "Rouge-L", out / "rouge_by_bucket")
    _plot_by_bucket(report, "exact_match", "Exact match", out / "exact_match_by_bucket")
    _plot_lengths(report, scored_sets, out / "response_lengths")
    if any(run[kind] for run in report["runs"].values() for kind in LOGS):
        _plot_curves(report, out / "training_curves")


def _plot_by_bucket(report: dict[str, Any], metric: str, title: str, path: Path) -> None:
    """One panel for each data set, one bar for each model and bucket."""
    figure, panels = _panels(report, len(report["data"]))
    colours = {name: index for index, name in enumerate(report["models"])}
    for panel, data in zip(panels, report["data"], strict=True):
        summaries = summaries_of(report, data)
        scores = {name: [bucket[metric] for bucket in summary["buckets"]] for name, summary in summaries.items()}
        labels = [label.replace(" (", "\n(") for label in bucket_labels(summaries)]
        grouped_bars(panel, scores, labels, colours)
        # if no model has a hit, matplotlib would draw a range around 0
        has_height = any(score["high"] for values in scores.values() for score in values)
        panel.set_ylim(0, None if has_height else 1)
        panel.set_xlabel(length_text(report))
        panel.set_ylabel(f"{title} (0 to 100)")
        panel.set_title(f"{data}: {report['data'][data]['n']} rows", fontsize=10)
    _save(figure, panels, f"{title} by length, with 95% intervals", report, path)


def _plot_lengths(report: dict[str, Any], scored_sets: Sequence[ScoredSet], path: Path) -> None:
    """Words of the gold responses and of each model's answers: 90% of them, the middle half, the median."""
    figure, panels = _panels(report, len(report["data"]))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(report["models"])}
    for panel, data in zip(panels, report["data"], strict=True):
        of_set = [scored for scored in scored_sets if scored.eval_set.name == data]
        gold = [len(example.references[0].split()) for example in of_set[0].eval_set.examples]
        values = [gold, *(scored.scores["num_words"].ravel().tolist() for scored in of_set)]
        names = ["gold response", *(scored.model for scored in of_set)]
        boxes = panel.boxplot(values, orientation="horizontal", whis=(5, 95), showfliers=False, patch_artist=True)
        for box, name in zip(boxes["boxes"], names, strict=True):
            box.set_facecolor(colours.get(name, "#FFFFFF"))
        for median in boxes["medians"]:
            median.set_color("#000000")
        panel.set_yticks(range(1, len(names) + 1), names)
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.set_xlabel("words")
        panel.set_title(f"{data}: {report['data'][data]['n']} rows", fontsize=10)
        panel.grid(axis="x", color=GRID, linewidth=0.8)
    _save(figure, panels, "Words of the answers: 90% of them, the middle half, the median", report, path)


def _plot_curves(report: dict[str, Any], path: Path) -> None:
    """A panel for each metric that a run has, by step; validations are dashed with dots."""
    runs = report["runs"]
    metrics = [metric for metric in METRICS if any(metric in run[kind] for run in runs.values() for kind in LOGS)]
    figure, panels = _panels(report, len(metrics))
    names = list(dict.fromkeys([*report["models"], *runs]))  # a run has the colour of the model of its name
    for panel, metric in zip(panels, metrics, strict=True):
        for name, run in runs.items():
            for kind in LOGS:
                if metric in run[kind]:
                    curve = run[kind][metric]
                    style = "--o" if kind == "validation" else "-"
                    colour = COLOURS[names.index(name) % len(COLOURS)]
                    label = f"{name}, {kind}"
                    panel.plot(curve["steps"], curve["values"], style, color=colour, label=label, markersize=3)
        panel.set_title(METRICS[metric], fontsize=10)
        panel.set_xlabel("step")
        panel.grid(color=GRID, linewidth=0.8)
    _save(figure, panels, f"Training by step. {thinning_text(runs)}".strip(), report, path)


def _caption(report: dict[str, Any]) -> str:
    """The provenance of a plot in a few lines; `report.json` has all of it."""
    rows = ", ".join(f"{data} {about['n']} rows" for data, about in report["data"].items())
    models = ", ".join(f"{name} = {model_text(model)}" for name, model in report["models"].items())
    runs = ", ".join(f"{name} = {run['directory']}" for name, run in report["runs"].items())
    lines = [
        f"Data: {rows}. Answers: {decoding_text(report)}.",
        f"Models: {models}.",
        *([f"Runs: {runs}."] if runs else []),
        f"Software: {software_text(report)}. Evaluation {report['fingerprint'][:SHOWN_DIGITS]}, made by",
    ]
    return caption_text(lines, report["command"], "report.json", _CAPTION_CHARACTERS)


def _panels(report: dict[str, Any], num_panels: int) -> tuple[Figure, list[Axes]]:
    below_inches = 0.14 * len(_caption(report).splitlines()) + 0.3 * len(report["models"]) / 2
    return new_figure(_WIDTH_INCHES, _PANEL_INCHES * num_panels + below_inches + 0.5, num_panels)


def _save(figure: Figure, panels: Sequence[Axes], title: str, report: dict[str, Any], path: Path) -> None:
    frame_figure(figure, panels, _caption(report), title)
    save_figure(figure, path, _caption(report))
