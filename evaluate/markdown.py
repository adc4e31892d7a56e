"""The report as Markdown tables, for `report.md` and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dpkd.evaluate.buckets import Bucket
from dpkd.evaluate.report import decoding_text, length_text
from dpkd.evaluate.scripts import LostText


def markdown_table(report: dict[str, Any]) -> str:
    """The report as Markdown: for each data set tables of scores, lengths and differences. Ends with a line break."""
    settings = report["settings"]
    asked = f"Template {settings['template']}; {decoding_text(report)}. " if report["identities"].get("models") else ""
    tokens = "" if settings["rouge_tokenizer"] == "default" else f" (tokens: {settings['rouge_tokenizer']})"
    parts = [
        "# Evaluation\n",
        f"{asked}Rouge{tokens} and exact match from 0 to 100, each row's score averaged over seeds; in brackets the "
        f"95% bootstrap interval over rows. Columns such as [0,30) go by the {length_text(report)}.\n",
    ]
    for data in report["data"]:
        parts += [f"## {data} ({_rows_text(report, data)})\n", *_set_parts(report, data)]
    return "\n".join(parts)


def _rows_text(report: dict[str, Any], data: str) -> str:
    about = report["data"][data]
    text = f"{about['n']} rows"
    if num_skipped := len(report["skipped"][data]):
        text += f", {num_skipped} left out"
    if about["num_without_reference"]:
        text += f", {about['num_without_reference']} of them without a reference"
    if report.get("overlap"):
        text += f", {len(report['overlap']['rows'][data])} of the prompts also in the training cache"
    if report.get("duplicates"):
        text += f", {len(report['duplicates']['rows'][data])} of the prompts also in the training data"
    return text


def _set_parts(report: dict[str, Any], data: str) -> list[str]:
    summaries = {name: model["data"][data] for name, model in report["models"].items()}
    parts = []
    if message := LostText(**report["data"][data]["lost_text"]).message:
        parts.append(f"**Rouge loses text here:** {message}.\n")
    parts += [_by_length(summaries, "Rouge-L", "rouge_l"), _by_length(summaries, "Exact match", "exact_match")]
    parts.append(_further(summaries))
    if report["comparisons"][data]:
        parts += [_differences(report, data), _power_note(report, data)]
    else:
        parts.append(_unpaired_note(report, data, next(iter(summaries.values()))))
    return parts


def _by_length(summaries: dict[str, Any], title: str, metric: str) -> str:
    """A table of the shape of the paper's Tables 4 (exact match) and 5 (Rouge-L), with the whole set first."""
    buckets = next(iter(summaries.values()))["buckets"]
    labels = [Bucket(bucket["low"], bucket["high"]).label for bucket in buckets]
    # buckets of the answers' own lengths hold other rows for every model
    if all([b["n"] for b in summary["buckets"]] == [b["n"] for b in buckets] for summary in summaries.values()):
        labels = [f"{label} (n={bucket['n']})" for label, bucket in zip(labels, buckets, strict=True)]
    rows = [
        [f"`{name}`", _interval(summary[metric]), *(_interval(bucket[metric]) for bucket in summary["buckets"])]
        for name, summary in summaries.items()
    ]
    return _table(["Model", title, *labels], rows)


def _further(summaries: dict[str, Any]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "Rouge-1": lambda summary: _interval(summary["rouge_1"]),
        "Rouge-2": lambda summary: _interval(summary["rouge_2"]),
        "Words": lambda summary: _number(summary["num_words"]["mean"], 1),
        "Tokens": lambda summary: _number(summary["mean_response_tokens"], 1),
        "Unfinished %": lambda summary: _number(summary["share_unfinished"], 1, 100),
        "Distinct-1": lambda summary: _number(summary["distinct_1"], 1),
        "Distinct-2": lambda summary: _number(summary["distinct_2"], 1),
        "Self-repetition": lambda summary: _number(summary["self_repetition"]["mean"], 1),
    }
    rows = [[f"`{name}`", *(cell(summary) for cell in columns.values())] for name, summary in summaries.items()]
    return _table(["Model", *columns], rows)


def _differences(report: dict[str, Any], data: str) -> str:
    header = [
        "Difference", "Rouge-L", "p", "p (Holm)", "won / tied / lost", "resolvable", "Exact match", "p (Holm)",
    ]  # fmt: skip
    rows = []
    for row in report["comparisons"][data]:
        rouge, exact = row["rouge_l"], row["exact_match"]
        rows.append(
            [
                f"`{row['model']}` - `{row['baseline']}`",
                _interval(rouge, sign="+"),
                _p_value(rouge["p_value"]),
                _p_value(rouge["p_holm"]),
                f"{rouge['wins']} / {rouge['ties']} / {rouge['losses']}",
                _number(rouge["smallest_resolvable"], 2),
                _interval(exact, sign="+"),
                _p_value(exact["p_holm"]),
            ]
        )
    return _table(header, rows)


def _power_note(report: dict[str, Any], data: str) -> str:
    found = [row["rouge_l"]["smallest_resolvable"] for row in report["comparisons"][data]]
    known = [value for value in found if value is not None]
    significance = report["significance"]
    text = (
        "Differences are paired by row; p is the two-sided bootstrap's, Holm's is for all pairs of this set together; "
        "won, tied and lost rows are those of Rouge-L. "
    )
    if not known:
        return text + "One row resolves no difference.\n"
    span = f"{min(known):.2f}" if len(known) == 1 else f"{min(known):.2f} to {max(known):.2f}"
    return text + (
        f"Resolvable: with {report['data'][data]['n']} rows that scatter as these do, a true difference of {span} in "
        f"Rouge-L is found at the level of {significance['alpha']:.0%} in {significance['power']:.0%} of repetitions; "
        "smaller ones mostly are not.\n"
    )


def _unpaired_note(report: dict[str, Any], data: str, summary: dict[str, Any]) -> str:
    resolvable = summary["smallest_resolvable_unpaired"]
    if resolvable is None:
        return "One row resolves no difference.\n"
    significance = report["significance"]
    return (
        f"With {report['data'][data]['n']} rows that scatter as these do, a true difference of {resolvable:.2f} in "
        f"Rouge-L to a model whose scores are unrelated would be found at the level of {significance['alpha']:.0%} in "
        f"{significance['power']:.0%} of repetitions; give both models to one evaluation to have them compared row by "
        "row, which resolves less.\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _interval(interval: dict[str, Any], sign: str = "") -> str:
    if interval["mean"] is None:
        return "-"
    return f"{interval['mean']:{sign}.2f} [{interval['low']:{sign}.2f}, {interval['high']:{sign}.2f}]"


def _number(value: float | None, places: int, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:.{places}f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
