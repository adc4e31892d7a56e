"""A judging as Markdown tables, for `judge.md` and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpkd.core.markdown import markdown_table
from dpkd.evaluate.report.cells import difference_cells, interval_cell, number_text, p_value_text
from dpkd.evaluate.report.provenance import SHOWN_DIGITS, decoding_text, model_text, software_text
from dpkd.evaluate.report.tables import bucket_labels


def judge_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: what was asked, a section for each data set, unparsable replies, the cost."""
    # the server chose its name: no HTML comes from it
    parts = ["# Judge\n", judge_text(report).replace("<", "&lt;") + "\n"]
    for data, about in report["data"].items():
        parts.append(f"## {data} ({about['n']} of {about['num_rows']} rows)\n")
        parts += _pairwise_parts(report, data) if report["mode"] == "pairwise" else _pointwise_parts(report, data)
    parts += ["## Replies\n", _unparsable(report["unparsable"]), tokens_text(report) + "\n"]
    parts.append(f"{made_text(report)} Made by `{report['command']}`.\n")
    return "\n".join(parts)


def judge_text(report: Mapping[str, Any]) -> str:
    """Who judged and what was asked, in a few sentences."""
    judge, settings = report["judge"], report["settings"]
    names = ", ".join(f"{' '.join(name.split())} ({count} replies)" for name, count in judge["models_said"].items())
    asked = {
        "pairwise": "pairs of answers in both orders; a win needs both orders to agree, otherwise it is a tie",
        "pointwise": "a grade from 1 to 10 for each answer"
        + (" and for the reference in the same reply" if settings["grade_reference"] else ""),
    }[report["mode"]]
    which = "the first seed's answers" if settings["answer_seeds"] == "first" else "the answers of all seeds"
    seeds = f"{which} ({', '.join(map(str, _seeds(report)))})"
    prompt = f"{judge['prompt']['name']} (sha256 {judge['prompt']['sha256'][:SHOWN_DIGITS]})"
    return (
        f"{judge['model']} at {judge['url']}, which calls itself {names or 'unknown'}, was asked for {asked}: {seeds}, "
        f"prompt {prompt}. In brackets: 95% intervals over rows."
    )


def _seeds(report: Mapping[str, Any]) -> list[int]:
    """The seeds of the judged answers, in ascending order."""
    if report["mode"] == "pairwise":
        rows = [seed for pairs in report["pairs"].values() for row in pairs for seed in row["seeds"]]
        return sorted({row[key] for row in rows for key in ("seed", "other_seed")})
    summaries = [summary for model in report["models"].values() for summary in model["data"].values()]
    return sorted({row["seed"] for summary in summaries for row in summary["seeds"]})


def made_text(report: Mapping[str, Any]) -> str:
    """Which answers were judged, how they were drawn, and the software."""
    judged = {"models": report["judged"]}
    models = ", ".join(f"{name} {model_text(model)}" for name, model in report["judged"].items())
    return f"Answers of {models}: {decoding_text(judged)}. Software: {software_text(dict(report))}."


def tokens_text(report: Mapping[str, Any]) -> str:
    """Requests, tokens and cost in one sentence."""
    tokens = report["tokens"]
    text = f"{tokens['num_requests']} requests: {tokens['prompt']} prompt and {tokens['completion']} completion tokens"
    if tokens["num_without_usage"]:
        text += f" ({tokens['num_without_usage']} replies without a count)"
    return text + ("." if tokens["cost"] is None else f", cost {tokens['cost']:.2f}.")


def _pointwise_parts(report: Mapping[str, Any], data: str) -> list[str]:
    summaries = {name: model["data"][data] for name, model in report["models"].items() if data in model["data"]}
    metrics = {"Grade": "grade"}
    if report["settings"]["grade_reference"]:
        metrics |= {"Reference's grade": "reference_grade", "Answer / reference, %": "ratio"}
    labels = bucket_labels(summaries)
    parts = [
        markdown_table(
            ["Model", title, *labels],
            [
                [f"`{name}`", *(interval_cell(score[metric]) for score in (summary, *summary["buckets"]))]
                for name, summary in summaries.items()
            ],
        )
        for title, metric in metrics.items()
    ]
    if comparisons := report["comparisons"][data]:
        header = ["Difference", "Grade", "p", "p (Holm)", "won / tied / lost", "resolvable"]
        rows = [[f"`{row['model']}` - `{row['baseline']}`", *difference_cells(row)] for row in comparisons]
        parts.append(markdown_table(header, rows))
    return parts


def _pairwise_parts(report: Mapping[str, Any], data: str) -> list[str]:
    pairs = {f"`{row['model']}` against `{row['baseline']}`": row for row in report["pairs"][data]}
    if not pairs:
        return ["No two models have answered this set.\n"]
    header = ["Pair", "won %", "tied %", "lost %", "won / tied / lost / undecided", "won - lost", "p", "p (Holm)"]
    rows = [
        [
            pair,
            *(interval_cell(row[share], places=1) for share in ("win", "tie", "loss")),
            " / ".join(str(row[f"num_{what}"]) for what in ("wins", "ties", "losses", "undecided")),
            interval_cell(row["net"], sign="+", places=1),
            p_value_text(row["p_value"]),
            p_value_text(row["p_holm"]),
        ]
        for pair, row in pairs.items()
    ]
    parts = [markdown_table(header, rows)]
    if all("buckets" in row for row in pairs.values()):
        by_length = [
            [pair, *(interval_cell(bucket["net"], sign="+", places=1) for bucket in row["buckets"])]
            for pair, row in pairs.items()
        ]
        parts.append(markdown_table(["won - lost", *bucket_labels(pairs)], by_length))
    header = ["Order", "pairs", "orders agree %", "first twice", "second twice", "first - second, %"]
    rows = [
        [
            pair,
            position["num_pairs"],
            number_text(position["share_agreeing"], 1, 100),
            *(position[f"num_{which}_twice"] for which in ("first", "second")),
            interval_cell(position["first_less_second"], sign="+", places=1),
        ]
        for pair, position in ((pair, row["position"]) for pair, row in pairs.items())
    ]
    return [*parts, markdown_table(header, rows)]


def _unparsable(by_model: Mapping[str, Any]) -> str:
    header = ["About", "questions", "unparsable", "share %", "of these cut off", "asked again", "refused"]
    rows = [
        [
            f"`{name}`",
            *(count[f"num_{what}"] for what in ("questions", "unparsable")),
            number_text(count["share"], 1, 100),
            *(count[f"num_{what}"] for what in ("cut_off", "asked_again", "refused")),
        ]
        for name, count in by_model.items()
    ]
    note = "Means leave out questions without a verdict. If their share differs between models, the means may mislead."
    return f"{markdown_table(header, rows)}\n{note}\n"
