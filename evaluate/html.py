"""The report as one self-contained page: tables, charts and a browser of examples; it loads nothing from anywhere.

Every text of a person or a model is either escaped here or handed to the page's script as JSON in which no `<` stands,
and shown as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from dpkd.evaluate.buckets import Bucket, buckets_of
from dpkd.evaluate.html_assets import SCRIPT, STYLE
from dpkd.evaluate.report import decoding_text, length_text
from dpkd.evaluate.scoring import ScoredSet
from dpkd.evaluate.scripts import LostText
from dpkd.evaluate.svg import NUM_COLOURS, grouped_bars, length_boxes

#: rows of a set that the browser of examples holds; per_example.parquet has all
MAX_BROWSED_ROWS = 2000

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_COLUMNS = {"Rouge-L": "rouge_l", "Exact match": "exact_match", "Rouge-1": "rouge_1", "Rouge-2": "rouge_2"}


def html_page(report: dict[str, Any], scored_sets: Sequence[ScoredSet]) -> str:
    """The whole page as text."""
    sets = {data: [scored for scored in scored_sets if scored.eval_set.name == data] for data in report["data"]}
    body = "".join(_set_section(report, data, found) for data, found in sets.items())
    examples = json.dumps({"sets": [_browsed(data, found) for data, found in sets.items()]}, ensure_ascii=True)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>Evaluation</title><style>{STYLE}</style></head><body><main><h1>Evaluation</h1>"
        f'<p class="note">{escape(_introduction(report))}</p>{body}{_BROWSER}</main>'
        f'<script type="application/json" id="examples">{_inert(examples)}</script><script>{SCRIPT}</script>'
        "</body></html>\n"
    )


def _inert(text: str) -> str:
    """JSON in which nothing can end or open an element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _introduction(report: dict[str, Any]) -> str:
    template = f"Template {report['settings']['template']}; " if report["identities"].get("models") else ""
    return (
        f"{template}{decoding_text(report)}. Scores from 0 to 100, each row's averaged over seeds, with 95% bootstrap "
        f"intervals over rows. Buckets go by the {length_text(report)}."
    )


_BROWSER = """<section id="browser"><h2>Examples</h2>
<p class="note">The answers of each model's first seed. Keys: / searches, j and k turn the pages.</p>
<noscript><p>The browser of examples needs JavaScript; per_example.parquet has the same rows.</p></noscript>
<div class="controls"><label>Data set <select id="set"></select></label>
<label>Sort by Rouge-L <select id="sort"></select></label>
<label>Length <select id="bucket"></select></label>
<label>Search <input id="search" type="search"></label>
<button id="before" type="button">Previous</button><button id="after" type="button">Next</button>
<span id="place" role="status" aria-live="polite"></span></div><div id="list"></div></section>"""


def _set_section(report: dict[str, Any], data: str, scored_sets: Sequence[ScoredSet]) -> str:
    summaries = {name: model["data"][data] for name, model in report["models"].items()}
    about = report["data"][data]
    facts = [f"{about['n']} rows", f"{len(report['skipped'][data])} left out"]
    facts += [
        f"{len(report[key]['rows'][data])} prompts also in the {what}"
        for key, what in (("overlap", "training cache"), ("duplicates", "training data"))
        if report[key]
    ]
    parts = [f'<section><h2>{escape(data)}</h2><p class="note">{"; ".join(facts)}.</p>']
    if message := LostText(**about["lost_text"]).message:
        parts.append(f'<p class="warning">Rouge loses text here: {escape(message)}.</p>')
    parts.append(_score_table(summaries))
    buckets = next(iter(summaries.values()))["buckets"]
    labels = [Bucket(bucket["low"], bucket["high"]).label for bucket in buckets]
    if report["settings"]["bucket_of"] == "reference":
        labels = [f"{label} n={bucket['n']}" for label, bucket in zip(labels, buckets, strict=True)]
    parts.append(_legend(list(summaries)))
    for title, metric in (("Rouge-L by length", "rouge_l"), ("Exact match by length", "exact_match")):
        series = [(name, [bucket[metric] for bucket in summary["buckets"]]) for name, summary in summaries.items()]
        parts.append(_figure(title, grouped_bars(labels, series, f"{title}, {data}")))
    lengths: list[tuple[str, Sequence[float], int | None]] = [
        (scored.model, scored.scores["num_words"].ravel().tolist(), place) for place, scored in enumerate(scored_sets)
    ]
    gold = [float(len(example.references[0].split())) for example in scored_sets[0].eval_set.examples]
    boxes = length_boxes([("gold response", gold, None), *lengths], f"Words of the answers, {data}")
    parts.append(_figure("Words of the answers: 90% of them, the middle half, and the median", boxes))
    if report["comparisons"][data]:
        parts.append(_difference_table(report["comparisons"][data]))
    return "".join(parts) + "</section>"


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _legend(names: Sequence[str]) -> str:
    items = [
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true"><rect class="s{place % NUM_COLOURS}" width="10" height="10"/>'
        f"</svg> {escape(name)}</li>"
        for place, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _score_table(summaries: dict[str, Any]) -> str:
    best = {
        metric: max((summary[metric]["mean"] or 0.0 for summary in summaries.values()), default=0.0)
        for metric in _COLUMNS.values()
    }
    rows = []
    for name, summary in summaries.items():
        cells = []
        for metric in _COLUMNS.values():
            is_best = len(summaries) > 1 and summary[metric]["mean"] == best[metric] > 0
            cells.append(f'<td class="best">{_interval(summary[metric])} \u2605</td>' if is_best else
                         f"<td>{_interval(summary[metric])}</td>")  # fmt: skip
        unfinished = summary["share_unfinished"]
        cells.append(f"<td>{summary['num_words']['mean']:.1f}</td>")
        cells.append(f"<td>{'-' if unfinished is None else f'{unfinished:.1%}'}</td>")
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    note = '<p class="note">\u2605 marks the highest mean.</p>' if len(summaries) > 1 else ""
    return _table(("Model", *_COLUMNS, "Words", "Unfinished"), rows) + note


def _difference_table(comparisons: Sequence[dict[str, Any]]) -> str:
    titles = ("Difference in Rouge-L", "Mean", "p", "p (Holm)", "Won / tied / lost", "Resolvable")
    rows = []
    for row in comparisons:
        found = row["rouge_l"]
        cells = (
            _interval(found, "+"),
            "-" if found["p_value"] is None else f"{found['p_value']:.4f}",
            "-" if found["p_holm"] is None else f"{found['p_holm']:.4f}",
            f"{found['wins']} / {found['ties']} / {found['losses']}",
            "-" if found["smallest_resolvable"] is None else f"{found['smallest_resolvable']:.2f}",
        )
        rows.append(
            f'<tr><th scope="row">{escape(row["model"])} \u2212 {escape(row["baseline"])}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return _table(titles, rows) + (
        '<p class="note">Paired by row. Resolvable is the true difference that a set of this size would find at 5% in '
        "80% of repetitions.</p>"
    )


def _table(titles: Sequence[str], rows: Sequence[str]) -> str:
    header = "".join(f'<th scope="col">{title}</th>' for title in titles)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _interval(interval: dict[str, Any], sign: str = "") -> str:
    if interval["mean"] is None:
        return "-"
    return f"{interval['mean']:{sign}.2f} <small>[{interval['low']:{sign}.2f}, {interval['high']:{sign}.2f}]</small>"


def _browsed(data: str, scored_sets: Sequence[ScoredSet]) -> dict[str, Any]:
    eval_set = scored_sets[0].eval_set
    buckets = buckets_of(eval_set.edges)
    num_shown = min(len(eval_set.examples), MAX_BROWSED_ROWS)
    cut = "" if num_shown == len(eval_set.examples) else f" (first {num_shown} rows)"
    return {
        "name": data + cut,
        "models": [scored.model for scored in scored_sets],
        "buckets": [bucket.label for bucket in buckets],
        "rows": [
            {
                "id": example.example_id,
                "category": example.category,
                "prompt": eval_set.prompt_text(scored_sets[0].model, row),
                "references": list(example.references),
                "answers": [
                    {
                        "text": scored.answers_SN[0][row].response,
                        "rouge_l": round(float(scored.scores["rouge_l"][0, row]), 2),
                        "exact_match": float(scored.scores["exact_match"][0, row]),
                        "num_words": int(scored.scores["num_words"][0, row]),
                        "bucket": buckets[scored.bucket_SN[0, row]].label,
                        "unfinished": scored.answers_SN[0][row].finish_reason == "length",
                    }
                    for scored in scored_sets
                ],
            }
            for row, example in enumerate(eval_set.examples[:num_shown])
        ],
    }
