"""The tables of a report as rows of cells: `report.md`, the page and the terminal show the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpkd.evaluate.metrics.buckets import Bucket
from dpkd.evaluate.metrics.inference import FEW_ROWS
from dpkd.evaluate.metrics.rouge import LostText
from dpkd.evaluate.report.build import length_text, summaries_of
from dpkd.evaluate.report.cells import (
    Cell,
    Row,
    Table,
    difference_cells,
    interval_cell,
    number_text,
    p_value_text,
)

# pairs of models whose differences a table by category shows without a baseline
_MOST_PAIRS = 3

# column: key of `to_teacher`, factor
_TEACHER_COLUMNS = {
    "KL": ("kl", 1.0),
    "reverse KL": ("rkld", 1.0),
    "KL, first token": ("kld_first", 1.0),
    "reverse KL, first token": ("rkld_first", 1.0),
    "same likeliest token %": ("top1_agreement", 100.0),
    "perplexity of cached responses": ("perplexity", 1.0),
}


def set_tables(report: Mapping[str, Any], data: str) -> list[Table]:
    """The main tables of a set: Rouge-L by length, exact match if there is any, further metrics, differences."""
    tables = [length_table(report, data, "Rouge-L", "rouge_l")]
    if no_match_text(report, data) is None:
        tables.append(length_table(report, data, "Exact match", "exact_match"))
    tables.append(further_table(report, data))
    if report["comparisons"][data]:
        tables.append(difference_table(report, data))
    return tables


def no_match_text(report: Mapping[str, Any], data: str) -> str | None:
    """What is known of exact match if no answer is one; None if one is."""
    scores = [summary["exact_match"] for summary in summaries_of(report, data).values()]
    if any(score["mean"] for score in scores):
        return None
    text = f"No answer equals a reference (exact match is 0 for {'the model' if len(scores) == 1 else 'all models'})"
    highest = scores[0]["high"]
    return f"{text}." if highest is None else f"{text}; the true share may be up to {highest:.1f}%."


def slice_tables(report: Mapping[str, Any], data: str) -> list[Table]:
    """The paired differences in Rouge-L by length, and scores and differences by category if the rows have several."""
    pairs, summaries = report["comparisons"][data], summaries_of(report, data)
    tables = []
    if pairs and "buckets" in pairs[0]:
        rows: list[Row] = [
            ((row["model"], row["baseline"]), [interval_cell(part["rouge_l"], sign="+") for part in row["buckets"]])
            for row in pairs
        ]
        title = f"Differences in Rouge-L by {length_text(report)}: {data}"
        tables.append(Table(title, bucket_labels(summaries), rows, "Difference"))
    of_first = next(iter(summaries.values()))["categories"]
    if of_first:
        shown = [row for row in pairs if report["roles"]["baseline"] or len(pairs) <= _MOST_PAIRS]
        columns = [*summaries, *(f"{row['model']} - {row['baseline']}" for row in shown)]
        rows = []
        for index, part in enumerate(of_first):
            cells = [interval_cell(summary["categories"][index]["rouge_l"]) for summary in summaries.values()]
            cells += [interval_cell(row["categories"][index]["rouge_l"], sign="+") for row in shown]
            few = ", few rows" if part["n"] < FEW_ROWS else ""
            rows.append(((f"{part['category'] or 'no category'} (n={part['n']}{few})",), cells))
        tables.append(Table(f"Rouge-L by category: {data}", columns, rows, "Category"))
    return tables


def length_table(report: Mapping[str, Any], data: str, title: str, metric: str) -> Table:
    """A table in the form of the paper's Tables 4 (exact match) and 5 (Rouge-L), with the whole set first."""
    summaries = summaries_of(report, data)
    columns = [_intervals(title, {name: summary[metric] for name, summary in summaries.items()})]
    for index, label in enumerate(bucket_labels(summaries)):
        in_bucket = {name: summary["buckets"][index][metric] for name, summary in summaries.items()}
        columns.append(_intervals(label, in_bucket))
    return _table(f"{title}, overall and by {length_text(report)}: {data}", columns)


def bucket_labels(summaries: Mapping[str, Any]) -> list[str]:
    """The buckets, with their numbers of rows if these are the same for all models."""
    buckets = next(iter(summaries.values()))["buckets"]
    labels = [Bucket(bucket["low"], bucket["high"]).label for bucket in buckets]
    # buckets by the answers' own lengths hold different rows for each model
    if all([b["n"] for b in summary["buckets"]] == [b["n"] for b in buckets] for summary in summaries.values()):
        return [
            f"{label} (n={bucket['n']}{', few rows' if 0 < bucket['n'] < FEW_ROWS else ''})"
            for label, bucket in zip(labels, buckets, strict=True)
        ]
    return labels


def further_table(report: Mapping[str, Any], data: str) -> Table:
    """The other metrics; perplexity has columns only if a model was measured."""
    summaries = summaries_of(report, data)

    def values(key: str) -> dict[str, Any]:
        return {name: summary.get(key) for name, summary in summaries.items()}

    def means(key: str) -> dict[str, Any]:
        return {name: summary[key]["mean"] for name, summary in summaries.items()}

    columns = [
        _intervals("Rouge-1", values("rouge_1")),
        _intervals("Rouge-2", values("rouge_2")),
        _numbers("Words", means("num_words")),
        _numbers("Tokens", values("mean_response_tokens")),
        _numbers("Unfinished %", values("share_unfinished"), 100),
        _numbers("Distinct-1", values("distinct_1")),
        _numbers("Distinct-2", values("distinct_2")),
        _numbers("Self-repetition", means("self_repetition")),
    ]
    note = ""
    if any(value is not None for value in values("perplexity").values()):
        # none is marked as best: tokens of two tokenizers do not compare
        columns += [
            _intervals("Perplexity", values("perplexity"), best=None),
            _intervals("Bits per byte", values("bits_per_byte"), best=min),
        ]
        note = (
            "Perplexity is that of the gold responses, per token of each model's own tokenizer. If tokenizers differ, "
            "compare bits per byte."
        )
    return _table(f"Further metrics: {data}", columns, note)


def difference_table(report: Mapping[str, Any], data: str) -> Table:
    """Every model minus each one before it."""
    columns = ["Rouge-L", "p", "p (Holm)", "won / tied / lost", "resolvable"]
    has_matches = no_match_text(report, data) is None
    columns += ["Exact match", "p (Holm)"] if has_matches else []
    rows: list[Row] = []
    for row in report["comparisons"][data]:
        cells, exact = difference_cells(row["rouge_l"]), row["exact_match"]
        cells += [interval_cell(exact, sign="+"), Cell(p_value_text(exact["p_holm"]))] if has_matches else []
        rows.append(((row["model"], row["baseline"]), cells))
    return Table(f"Differences, paired by row: {data}", columns, rows, "Difference", power_note(report, data))


def teacher_table(report: Mapping[str, Any]) -> Table | None:
    """The divergence of each model from the teacher of the cache; None if none was measured."""
    measured = {name: model["to_teacher"] for name, model in report["models"].items() if model.get("to_teacher")}
    if not measured:
        return None
    columns = _TEACHER_COLUMNS.values()
    rows: list[Row] = [
        ((name,), [interval_cell(values[key], places=3, scale=scale) for key, scale in columns])
        for name, values in measured.items()
    ]
    counts = sorted({(values["num_rows"], values["num_tokens"]) for values in measured.values()})
    over = "; ".join(f"{num_rows} rows, {num_tokens} tokens" for num_rows, num_tokens in counts)
    note = (
        f"Over cached responses ({over}). KL(teacher || model) and the reverse are in nats per token and treat all "
        "tokens in the tail as one outcome. In brackets: 95% intervals over rows."
    )
    return Table("Divergence from the teacher of the cache", list(_TEACHER_COLUMNS), rows, note=note)


def lost_text(report: Mapping[str, Any], data: str) -> str | None:
    """What Rouge loses of the references of a set; None if it loses little."""
    return LostText(**report["data"][data]["lost_text"]).message


def power_note(report: Mapping[str, Any], data: str) -> str:
    """Which differences the set can resolve, between its models or to another one."""
    about, significance = report["data"][data], report["significance"]
    chance = f"at the {significance['alpha']:.0%} level in {significance['power']:.0%} of repetitions"
    comparisons = report["comparisons"][data]
    if not comparisons:
        resolvable = next(iter(summaries_of(report, data).values()))["smallest_resolvable_unpaired"]
        if resolvable is None:
            return "One row resolves no difference."
        return (
            f"With {about['n']} rows that vary like these, a true difference of {resolvable:.2f} in Rouge-L to a "
            f"model with unrelated scores would be found {chance}. To resolve smaller differences, evaluate both "
            "models together: they are then compared row by row."
        )
    text = (
        "Differences are paired by row. p is of a two-sided sign-flip test; Holm's adjustment is over the comparisons "
        "of this set. Rows are won, tied and lost in Rouge-L. "
    )
    known = [value for row in comparisons if (value := row["rouge_l"]["smallest_resolvable"]) is not None]
    if not known:
        return text + "One row resolves no difference."
    span = f"{min(known):.2f}" if len(known) == 1 else f"{min(known):.2f} to {max(known):.2f}"
    return text + (
        f"Resolvable: with {about['n']} rows that vary like these, a true difference of {span} in Rouge-L is found "
        f"{chance}; smaller ones are mostly missed."
    )


_Column = tuple[str, dict[str, Cell]]


def _table(title: str, columns: list[_Column], note: str = "") -> Table:
    rows: list[Row] = [((name,), [cells[name] for _, cells in columns]) for name in columns[0][1]]
    return Table(title, [header for header, _ in columns], rows, note=note)


def _intervals(header: str, values: Mapping[str, Any], best: Callable[[list[float]], float] | None = max) -> _Column:
    """A column of means with their intervals; the best is marked if there are several and not all are 0."""
    means = {name: value["mean"] if isinstance(value, dict) else value for name, value in values.items()}
    known = [mean for mean in means.values() if mean is not None]
    marked = best(known) if best is not None and len(known) > 1 and any(known) else None
    return header, {name: interval_cell(value, marked) for name, value in values.items()}


def _numbers(header: str, values: Mapping[str, float | None], scale: float = 1) -> _Column:
    return header, {name: Cell(number_text(value, 1, scale)) for name, value in values.items()}
