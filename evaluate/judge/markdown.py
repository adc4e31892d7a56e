"""A judging as Markdown tables, for `judge.md` and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpkd.evaluate.metrics.buckets import Bucket
from dpkd.evaluate.report.provenance import SHOWN_DIGITS, decoding_text, model_text, software_text


def judge_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: what was asked, a section for each data set, what could not be read, the cost."""
    parts = ["# Judge\n", judge_text(report) + "\n"]
    for data, about in report["data"].items():
        parts.append(f"## {data} ({about['n']} of {about['num_rows']} rows)\n")
        parts += _pairwise_parts(report, data) if report["mode"] == "pairwise" else _pointwise_parts(report, data)
    parts += ["## Replies\n", _unparsable(report["unparsable"]), tokens_text(report) + "\n"]
    parts.append(f"{made_text(report)} Made by `{report['command']}`.\n")
    return "\n".join(parts)


def judge_text(report: Mapping[str, Any]) -> str:
    """Who judged and what was asked, in a few sentences."""
    judge, settings = report["judge"], report["settings"]
    said = ", ".join(f"{name} ({count} replies)" for name, count in judge["models_said"].items())
    asked = {
        "pairwise": "pairs of answers in both orders; a win counts where both orders agree, else it is a tie",
        "pointwise": "a grade from 1 to 10 for each answer"
        + (" and for the reference in the same reply" if settings["grade_reference"] else ""),
    }[report["mode"]]
    which = "the first seed's answers" if settings["answer_seeds"] == "first" else "the answers of all seeds"
    seeds = f"{which} ({', '.join(map(str, _seeds(report)))})"
    prompt = f"{judge['prompt']['name']} (sha256 {judge['prompt']['sha256'][:SHOWN_DIGITS]})"
    return (
        f"{judge['model']} at {judge['url']}, by its own name {said or 'unknown'}, was asked for {asked}: {seeds}, "
        f"prompt {prompt}. In brackets 95% bootstrap intervals over rows."
    )


def _seeds(report: Mapping[str, Any]) -> list[int]:
    """The seeds of the judged answers, rising."""
    if report["mode"] == "pairwise":
        rows = [seed for pairs in report["pairs"].values() for row in pairs for seed in row["seeds"]]
        return sorted({row[key] for row in rows for key in ("seed", "other_seed")})
    summaries = [summary for model in report["models"].values() for summary in model["data"].values()]
    return sorted({row["seed"] for summary in summaries for row in summary["seeds"]})


def made_text(report: Mapping[str, Any]) -> str:
    """Which answers were judged, how they were drawn, and the software, in two sentences."""
    judged = {"models": report["judged"]}
    models = ", ".join(f"{name} {model_text(model)}" for name, model in report["judged"].items())
    return f"Answers of {models}: {decoding_text(judged)}. Software: {software_text(dict(report))}."


def tokens_text(report: Mapping[str, Any]) -> str:
    """Requests, tokens and cost in one sentence."""
    tokens = report["tokens"]
    text = f"{tokens['num_requests']} requests: {tokens['prompt']} prompt and {tokens['completion']} completion tokens"
    if tokens["num_without_usage"]:
        text += f" ({tokens['num_without_usage']} replies came without a count)"
    return text + ("." if tokens["cost"] is None else f", cost {tokens['cost']:.2f}.")


def _pointwise_parts(report: Mapping[str, Any], data: str) -> list[str]:
    summaries = {name: model["data"][data] for name, model in report["models"].items() if data in model["data"]}
    parts = [_by_length(summaries, "Grade", "grade")]
    if report["settings"]["grade_reference"]:
        parts.append(_by_length(summaries, "Reference's grade", "reference_grade"))
        parts.append(_by_length(summaries, "Answer / reference, %", "ratio"))
    comparisons = report["comparisons"][data]
    if comparisons:
        header = ["Difference", "Grade", "p", "p (Holm)", "won / tied / lost", "resolvable"]
        rows = [
            [
                f"`{row['model']}` - `{row['baseline']}`",
                interval_text(row, sign="+"),
                _p_value(row["p_value"]),
                _p_value(row["p_holm"]),
                f"{row['wins']} / {row['ties']} / {row['losses']}",
                "-" if row["smallest_resolvable"] is None else f"{row['smallest_resolvable']:.2f}",
            ]
            for row in comparisons
        ]
        parts.append(_table(header, rows))
    return parts


def _by_length(summaries: Mapping[str, Any], title: str, metric: str) -> str:
    labels = _labels([summary["buckets"] for summary in summaries.values()])
    rows = [
        [f"`{name}`", interval_text(summary[metric]), *(interval_text(bucket[metric]) for bucket in summary["buckets"])]
        for name, summary in summaries.items()
    ]
    return _table(["Model", title, *labels], rows)


def _labels(buckets: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The ranges of the buckets, with their rows where every line of the table has the same."""
    labels = [Bucket(bucket["low"], bucket["high"]).label for bucket in buckets[0]]
    counts = {tuple(bucket["n"] for bucket in line) for line in buckets}
    if len(counts) > 1:
        return labels
    return [f"{label} (n={n})" for label, n in zip(labels, next(iter(counts)), strict=True)]


def _pairwise_parts(report: Mapping[str, Any], data: str) -> list[str]:
    pairs = report["pairs"][data]
    if not pairs:
        return ["No pair of models has answered this set.\n"]
    header = ["Pair", "won %", "tied %", "lost %", "won / tied / lost / undecided", "won - lost", "p", "p (Holm)"]
    rows = [
        [
            _pair(row),
            *(interval_text(row[share], places=1) for share in ("win", "tie", "loss")),
            " / ".join(str(row[f"num_{what}"]) for what in ("wins", "ties", "losses", "undecided")),
            interval_text(row["net"], sign="+", places=1),
            _p_value(row["p_value"]),
            _p_value(row["p_holm"]),
        ]
        for row in pairs
    ]
    parts = [_table(header, rows)]
    if "buckets" in pairs[0]:
        labels = _labels([row["buckets"] for row in pairs])
        by_length = [
            [_pair(row), *(interval_text(bucket["net"], sign="+", places=1) for bucket in row["buckets"])]
            for row in pairs
        ]
        parts.append(_table(["won - lost", *labels], by_length))
    header = ["Order", "pairs", "orders agree %", "first place twice", "second place twice", "first - second, %"]
    rows = [
        [
            _pair(row),
            str(position["num_pairs"]),
            "-" if position["share_agreeing"] is None else f"{100 * position['share_agreeing']:.1f}",
            str(position["num_first_twice"]),
            str(position["num_second_twice"]),
            interval_text(position["first_less_second"], sign="+", places=1),
        ]
        for row in pairs
        for position in [row["position"]]
    ]
    return [*parts, _table(header, rows)]


def _pair(row: Mapping[str, Any]) -> str:
    return f"`{row['model']}` against `{row['baseline']}`"


def _unparsable(by_model: Mapping[str, Any]) -> str:
    columns: dict[str, Callable[[Any], str]] = {
        "questions": lambda count: str(count["num_questions"]),
        "unparsable": lambda count: str(count["num_unparsable"]),
        "share %": lambda count: f"{100 * count['share']:.1f}",
        "of them cut off": lambda count: str(count["num_cut_off"]),
        "asked again": lambda count: str(count["num_asked_again"]),
        "refused": lambda count: str(count["num_refused"]),
    }
    rows = [[f"`{name}`", *(cell(count) for cell in columns.values())] for name, count in by_model.items()]
    note = (
        "Questions without a verdict count in no mean: where their share differs between models, means may mislead.\n"
    )
    return _table(["About", *columns], rows) + "\n" + note


def interval_text(interval: Mapping[str, Any], sign: str = "", places: int = 2) -> str:
    """A mean with its interval in brackets; a dash where there is none."""
    if interval["mean"] is None:
        return "-"
    mean, low, high = (f"{interval[key]:{sign}.{places}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
