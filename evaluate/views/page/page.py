"""The report as one self-contained page: tables, charts and a browser of examples; it loads nothing from anywhere.

The template escapes every text of a person or a model. The page's script gets the examples as JSON without `<` and
shows them as text. If a text became markup all the same, the page's content security policy would not run it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.metrics.buckets import buckets_of
from dpkd.evaluate.report.build import length_text, summaries_of
from dpkd.evaluate.report.curves import LOGS, METRICS, thinning_text
from dpkd.evaluate.report.provenance import data_text, how_made
from dpkd.evaluate.report.tables import (
    BEST_MARK,
    bucket_labels,
    difference_table,
    further_table,
    length_table,
    lost_text,
    power_note,
    teacher_table,
)
from dpkd.evaluate.views.markdown import introduction
from dpkd.evaluate.views.page.svg import NUM_COLOURS, Line, grouped_bars, length_boxes, line_chart

#: rows of a set that the browser of examples shows; per_example.parquet has all
MAX_ROWS = 2000

_FOLDER = Path(__file__).parent


class _Figure(NamedTuple):
    title: str
    svg: str
    legend: list[tuple[str, int]] | None = None  # names with the number of their colour


def html_page(report: dict[str, Any], scored_sets: Sequence[ScoredSet]) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    sets = {data: [scored for scored in scored_sets if scored.eval_set.name == data] for data in report["data"]}
    # a model has one colour on the whole page, and so has the run of its name
    names = dict.fromkeys([*report["models"], *report["runs"]])
    colours = {name: index % NUM_COLOURS for index, name in enumerate(names)}
    return environment.get_template("page.html.j2").render(
        title=f"Evaluation: {', '.join(report['models'])} on {', '.join(report['data'])}",
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        introduction=introduction(report),
        best_mark=BEST_MARK,
        sections=[_section(report, data, found, colours) for data, found in sets.items()],
        teacher=teacher_table(report),
        curves=list(_curves(report, colours)),
        runs=[(name, colours[name]) for name in report["runs"]],
        thinning=thinning_text(report["runs"]),
        how_made=how_made(report),
        examples={"sets": [_examples(data, found) for data, found in sets.items()]},
    )


def _digest(text: str) -> str:
    """The source expression by which a content security policy allows exactly `text`."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(
    report: dict[str, Any], data: str, scored_sets: Sequence[ScoredSet], colours: dict[str, int]
) -> dict[str, Any]:
    summaries = summaries_of(report, data)
    legend = [(name, colours[name]) for name in summaries]
    scores = []
    for title, metric in (("Rouge-L", "rouge_l"), ("Exact match", "exact_match")):
        series = [
            (name, colours[name], [bucket[metric] for bucket in summary["buckets"]])
            for name, summary in summaries.items()
        ]
        labels = (length_text(report), f"{title} (0 to 100)")
        bars = grouped_bars(bucket_labels(summaries), series, f"{title} by length, {data}", labels)
        figure = _Figure(f"{title} by length, with 95% intervals: {data}", bars, legend)
        scores.append((length_table(report, data, title, metric), figure))
    lengths: list[tuple[str, Sequence[float], int | None]] = [
        (scored.model, scored.scores["num_words"].ravel().tolist(), colours[scored.model]) for scored in scored_sets
    ]
    gold = [float(len(example.references[0].split())) for example in scored_sets[0].eval_set.examples]
    boxes = length_boxes([("gold response", gold, None), *lengths], f"Words of the answers, {data}", "words")
    return {
        "name": data,
        "rows": f"{data_text(report, data)}.",
        "lost_text": lost_text(report, data),
        "has_best": len(summaries) > 1,
        "scores": scores,
        "further": further_table(report, data),
        "lengths": _Figure(f"Words of the answers (90%, the middle half, the median): {data}", boxes),
        "differences": difference_table(report, data) if report["comparisons"][data] else None,
        "power": power_note(report, data),
    }


def _curves(report: dict[str, Any], colours: dict[str, int]) -> Iterable[_Figure]:
    for metric, title in METRICS.items():
        lines = [
            Line(f"{name}, {kind}", colours[name], kind == "validation", curve["steps"], curve["values"])
            for name, run in report["runs"].items()
            for kind in LOGS
            if (curve := run[kind].get(metric))
        ]
        if lines:
            yield _Figure(f"{title} by step", line_chart(lines, f"{title} by step", ("step", title)))


def _examples(data: str, scored_sets: Sequence[ScoredSet]) -> dict[str, Any]:
    """The rows of one set with every model's answer of its first seed, as the page's script reads them."""
    eval_set = scored_sets[0].eval_set
    buckets = [bucket.label for bucket in buckets_of(eval_set.edges)]
    num_shown = min(len(eval_set.examples), MAX_ROWS)
    return {
        "name": data if num_shown == len(eval_set.examples) else f"{data} (first {num_shown} rows)",
        "models": [scored.model for scored in scored_sets],
        "buckets": buckets,
        "rows": [
            {
                "id": example.example_id,
                "category": example.category,
                "question": eval_set.question(row),
                "prompt": eval_set.prompt_text(scored_sets[0].model, row),
                "references": list(example.references),
                "answers": [_answer(scored, row, buckets[scored.bucket_SN[0, row]]) for scored in scored_sets],
            }
            for row, example in enumerate(eval_set.examples[:num_shown])
        ],
    }


def _answer(scored: ScoredSet, row: int, bucket: str) -> dict[str, Any]:
    answer = scored.answers_SN[0][row]
    return {
        "text": answer.response,
        "rouge_l": round(float(scored.scores["rouge_l"][0, row]), 2),
        "exact_match": float(scored.scores["exact_match"][0, row]),
        "num_words": int(scored.scores["num_words"][0, row]),
        "bucket": bucket,
        "unfinished": answer.finish_reason == "length",
    }
