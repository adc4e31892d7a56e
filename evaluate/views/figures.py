"""The charts of a report, for the page and as SVG files: scores by length, lengths of answers, training curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpkd.core.files import write_text
from dpkd.core.plotting import caption_text
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.metrics.buckets import Bucket
from dpkd.evaluate.report.build import length_text, summaries_of
from dpkd.evaluate.report.curves import LOGS, METRICS, thinning_text
from dpkd.evaluate.report.headline import ranked
from dpkd.evaluate.report.provenance import SHOWN_DIGITS, decoding_text, model_text, software_text
from dpkd.evaluate.views.charts import Line, dot_plot, length_boxes, line_chart, standalone

_CAPTION_CHARACTERS = 120
_STYLE = Path(__file__).parent / "page" / "charts.css"


class Figure(NamedTuple):
    """A title and its chart."""

    title: str
    svg: str


def colours_of(report: dict[str, Any]) -> dict[str, int]:
    """The number of each model's colour, the same in every chart; a run has that of the model of its name."""
    return {name: index for index, name in enumerate(dict.fromkeys([*report["models"], *report["runs"]]))}


def by_length(report: dict[str, Any], data: str, metric: str = "rouge_l", title: str = "Rouge-L") -> Figure:
    """A dot with its interval for each model: over all rows, then by length; the best model comes first."""
    summaries, colours = summaries_of(report, data), colours_of(report)
    names = [row.name for row in ranked(report, data)]
    groups = [(f"all rows\nn = {report['data'][data]['n']}", [(name, summaries[name]) for name in names])]
    for index, bucket in enumerate(summaries[names[0]]["buckets"]):
        label = f"{Bucket(bucket['low'], bucket['high']).label}\nn = {bucket['n']}"
        groups.append((label, [(name, summaries[name]["buckets"][index]) for name in names]))
    rows = [(label, [(name, colours[name], scores[metric]) for name, scores in found]) for label, found in groups]
    heading = f"{title} by {length_text(report)}"
    return Figure(heading, dot_plot(rows, f"{heading}: {data}", f"{title}, 0 to 100, with 95% intervals"))


def lengths(report: dict[str, Any], data: str, scored_sets: Sequence[ScoredSet]) -> Figure:
    """Words of the gold responses and of each model's answers: 90% of them, the middle half, the median."""
    colours = colours_of(report)
    of_set = [scored for scored in scored_sets if scored.eval_set.name == data]
    gold = [float(len(example.references[0].split())) for example in of_set[0].eval_set.examples]
    rows: list[tuple[str, Sequence[float], int | None]] = [("gold response", gold, None)]
    rows += [(scored.model, scored.scores["num_words"].ravel().tolist(), colours[scored.model]) for scored in of_set]
    title = "Words of the answers: 90% of them, the middle half, the median"
    return Figure(title, length_boxes(rows, f"{title}: {data}", "words"))


def curves(report: dict[str, Any]) -> list[Figure]:
    """A chart for each metric that a run has, by step; validations are dotted."""
    colours, found = colours_of(report), []
    for metric, title in METRICS.items():
        lines = [
            Line(f"{name}, {kind}", colours[name], kind == "validation", curve["steps"], curve["values"])
            for name, run in report["runs"].items()
            for kind in LOGS
            if (curve := run[kind].get(metric))
        ]
        if lines:
            found.append(Figure(title, line_chart(lines, f"{title} by step", "step")))
    return found


def write_figures(report: dict[str, Any], scored_sets: Sequence[ScoredSet], out: Path) -> None:
    """Write the charts to `out` as SVG with their provenance; curves only if there are runs."""
    sets = list(report["data"])
    files = {
        "rouge_by_length": [(data, by_length(report, data)) for data in sets],
        "exact_match_by_length": [(data, by_length(report, data, "exact_match", "Exact match")) for data in sets],
        "answer_lengths": [(data, lengths(report, data, scored_sets)) for data in sets],
        "training_curves": [(thinning_text(report["runs"]), figure) for figure in curves(report)],
    }
    # the classes of a file are coloured by the light half of the page's style
    style = _STYLE.read_text(encoding="utf-8")
    for name, found in files.items():
        if found:
            charts = [(". ".join(filter(None, (figure.title, about))), figure.svg) for about, figure in found]
            write_text(out / f"{name}.svg", standalone(charts, resolved(style), _caption(report)))


def resolved(style: str) -> str:
    """`style` with its variables replaced by their values in the light mode: not every viewer of SVG knows them."""
    light, _, rest = style.partition("@media")
    values = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light))
    rules = light.partition("}")[2] + rest.partition("} }")[2]
    return re.sub(r"var\(--(\w+)\)", lambda match: values[match[1]], rules)


def _caption(report: dict[str, Any]) -> list[str]:
    """The provenance of a file in a few lines; `report.json` has all of it."""
    rows = ", ".join(f"{data} {about['n']} rows" for data, about in report["data"].items())
    models = ", ".join(f"{name} = {model_text(model)}" for name, model in report["models"].items())
    runs = ", ".join(f"{name} = {run['directory']}" for name, run in report["runs"].items())
    texts = [
        f"Data: {rows}. Answers: {decoding_text(report)}.",
        f"Models: {models}.",
        *([f"Runs: {runs}."] if runs else []),
        f"Software: {software_text(report)}. Evaluation {report['fingerprint'][:SHOWN_DIGITS]}, made by",
    ]
    return caption_text(texts, report["command"], "report.json", _CAPTION_CHARACTERS).split("\n")
