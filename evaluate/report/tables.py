"""The tables of a report, as rows of cells: `report.md`, the page and the terminal show the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpkd.evaluate.metrics.buckets import Bucket
from dpkd.evaluate.report.build import length_text, summaries_of

#: after the best cell of a column
BEST_MARK = "\u2605"


@dataclass(frozen=True, slots=True)
class Cell:
    """A value as text, its interval as text where it has one, and whether it is the best of its column."""

    value: str
    interval: str = ""
    best: bool = False

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


@dataclass(frozen=True, slots=True)
class Table:
    """`columns` head the cells; each row has the model it is of, or the two whose difference it is."""

    title: str
    columns: list[str]
    rows: list[tuple[tuple[str, ...], list[Cell]]]
    first_column: str = "Model"
    note: str = ""


def set_tables(report: dict[str, Any], data: str) -> list[Table]:
    """Rouge-L and exact match by length, further measures, and differences where there are two models."""
    tables = [
        length_table(report, data, "Rouge-L", "rouge_l"),
        length_table(report, data, "Exact match", "exact_match"),
    ]
    tables.append(further_table(report, data))
    if report["comparisons"][data]:
        tables.append(difference_table(report, data))
    return tables


def length_table(report: dict[str, Any], data: str, title: str, metric: str) -> Table:
    """A table of the shape of the paper's Tables 4 (exact match) and 5 (Rouge-L), with the whole set first."""
    summaries = summaries_of(report, data)
    columns = [
        _intervals(title, {name: summary[metric] for name, summary in summaries.items()}),
        *(
            _intervals(label, {name: summary["buckets"][place][metric] for name, summary in summaries.items()})
            for place, label in enumerate(bucket_labels(summaries))
        ),
    ]
    return _joined(f"{title}, overall and by {length_text(report)}: {data}", columns)


def bucket_labels(summaries: Mapping[str, Any]) -> list[str]:
    """The buckets with their numbers of rows, where all models have the same rows in them."""
    buckets = next(iter(summaries.values()))["buckets"]
    labels = [Bucket(bucket["low"], bucket["high"]).label for bucket in buckets]
    # buckets of the answers' own lengths hold other rows for every model
    if all([b["n"] for b in summary["buckets"]] == [b["n"] for b in buckets] for summary in summaries.values()):
        return [f"{label} (n={bucket['n']})" for label, bucket in zip(labels, buckets, strict=True)]
    return labels


def further_table(report: dict[str, Any], data: str) -> Table:
    """The other measures; those that no model has (perplexity without a model, say) have no column."""
    summaries = summaries_of(report, data)

    def values(key: str) -> dict[str, Any]:
        return {name: summary.get(key) for name, summary in summaries.items()}

    columns = [_intervals("Rouge-1", values("rouge_1")), _intervals("Rouge-2", values("rouge_2"))]
    columns += [
        _numbers("Words", {name: summary["num_words"]["mean"] for name, summary in summaries.items()}),
        _numbers("Tokens", values("mean_response_tokens")),
        _numbers("Unfinished %", values("share_unfinished"), 100),
        _numbers("Distinct-1", values("distinct_1")),
        _numbers("Distinct-2", values("distinct_2")),
        _numbers("Self-repetition", {name: summary["self_repetition"]["mean"] for name, summary in summaries.items()}),
    ]
    note = ""
    if any(value is not None for value in values("perplexity").values()):
        # none is marked: tokens of two tokenizers are not the same thing
        columns += [
            _intervals("Perplexity", values("perplexity"), best=None),
            _intervals("Bits a byte", values("bits_per_byte"), best=min),
        ]
        note = (
            "Perplexity is that of the gold responses, a token of each model's own tokenizer; where tokenizers differ, "
            "compare bits a byte."
        )
    return replace(_joined(f"Further measures: {data}", columns), note=note)


def difference_table(report: dict[str, Any], data: str) -> Table:
    """Every model less each one before it."""
    columns = [
        "Rouge-L", "p", "p (Holm)", "won / tied / lost", "resolvable", "Exact match", "p (Holm)",
    ]  # fmt: skip
    rows: list[tuple[tuple[str, ...], list[Cell]]] = []
    for row in report["comparisons"][data]:
        rouge, exact = row["rouge_l"], row["exact_match"]
        cells = [
            interval_cell(rouge, sign="+"),
            Cell(p_value_text(rouge["p_value"])),
            Cell(p_value_text(rouge["p_holm"])),
            Cell(f"{rouge['wins']} / {rouge['ties']} / {rouge['losses']}"),
            Cell(number_text(rouge["smallest_resolvable"], 2)),
            interval_cell(exact, sign="+"),
            Cell(p_value_text(exact["p_holm"])),
        ]
        rows.append(((row["model"], row["baseline"]), cells))
    return Table(f"Differences, paired by row: {data}", columns, rows, "Difference", power_note(report, data))


def power_note(report: dict[str, Any], data: str) -> str:
    """What differences the set can resolve, between its models or to another one."""
    about, significance = report["data"][data], report["significance"]
    chance = f"at the level of {significance['alpha']:.0%} in {significance['power']:.0%} of repetitions"
    if not report["comparisons"][data]:
        resolvable = next(iter(summaries_of(report, data).values()))["smallest_resolvable_unpaired"]
        if resolvable is None:
            return "One row resolves no difference."
        return (
            f"With {about['n']} rows that scatter as these do, a true difference of {resolvable:.2f} in Rouge-L to a "
            f"model whose scores are unrelated would be found {chance}; give both models to one evaluation to have "
            "them compared row by row, which resolves less."
        )
    text = (
        "Differences are paired by row; p is the two-sided bootstrap's, Holm's is for all pairs of this set together; "
        "won, tied and lost rows are those of Rouge-L. "
    )
    found = [row["rouge_l"]["smallest_resolvable"] for row in report["comparisons"][data]]
    known = [value for value in found if value is not None]
    if not known:
        return text + "One row resolves no difference."
    span = f"{min(known):.2f}" if len(known) == 1 else f"{min(known):.2f} to {max(known):.2f}"
    return text + (
        f"Resolvable: with {about['n']} rows that scatter as these do, a true difference of {span} in Rouge-L is "
        f"found {chance}; smaller ones mostly are not."
    )


_Column = tuple[str, dict[str, Cell]]


def _joined(title: str, columns: list[_Column]) -> Table:
    names = list(columns[0][1])
    return Table(
        title, [head for head, _ in columns], [((name,), [cells[name] for _, cells in columns]) for name in names]
    )


def _intervals(head: str, values: Mapping[str, Any], best: Callable[[list[float]], float] | None = max) -> _Column:
    """A column of means with their intervals, the best marked where there is another to be better than."""
    means = {name: value["mean"] if isinstance(value, dict) else value for name, value in values.items()}
    known = [mean for mean in means.values() if mean is not None]
    marked = best(known) if best is not None and len(known) > 1 and any(known) else None
    return head, {name: interval_cell(value, marked) for name, value in values.items()}


def _numbers(head: str, values: Mapping[str, float | None], scale: float = 1) -> _Column:
    return head, {name: Cell(number_text(value, 1, scale)) for name, value in values.items()}


def interval_cell(value: Any, marked: float | None = None, sign: str = "", places: int = 2) -> Cell:
    """A mean with its interval, or a number; a dash for None. It is the best of its column if it equals `marked`."""
    if not isinstance(value, dict):
        return Cell(number_text(value, places), "", value is not None and value == marked)
    if value["mean"] is None:
        return Cell("-")
    mean, low, high = (f"{value[key]:{sign}.{places}f}" for key in ("mean", "low", "high"))
    return Cell(mean, f"[{low}, {high}]", value["mean"] == marked)


def number_text(value: float | None, places: int, scale: float = 1) -> str:
    """`value` times `scale` with so many decimals; a dash for None."""
    return "-" if value is None else f"{scale * value:.{places}f}"


def p_value_text(value: float | None) -> str:
    """A p-value with three decimals; a dash for None."""
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
