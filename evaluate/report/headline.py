"""What a report says first: one sentence per data set, what to be careful about, and the models in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpkd.evaluate.metrics.buckets import Bucket
from dpkd.evaluate.metrics.inference import ALPHA, FEW_ROWS
from dpkd.evaluate.report.build import summaries_of
from dpkd.evaluate.report.cells import Cell, Row, Table, difference_of, interval_cell, p_value_text
from dpkd.evaluate.report.tables import lost_text

_CUT_OFF = 0.1  # share of answers from which on the report warns
_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


class Ranked(NamedTuple):
    """One model on one data set, for the table that comes first.

    `share` is its Rouge-L over the teacher's; `difference` is to the baseline. Both are None where there is none.
    """

    name: str
    role: str
    score: dict[str, Any]
    difference: dict[str, Any] | None
    size: str
    share: float | None


def ranked(report: Mapping[str, Any], data: str) -> list[Ranked]:
    """The models of a set, the best Rouge-L first."""
    summaries, roles = summaries_of(report, data), report["roles"]
    teacher = summaries.get(roles["teacher"])
    of_teacher = teacher["rouge_l"]["mean"] if teacher else None
    found = []
    for name, summary in sorted(summaries.items(), key=lambda item: -item[1]["rouge_l"]["mean"]):
        role = next((role for role, named in roles.items() if named == name), "")
        share = summary["rouge_l"]["mean"] / of_teacher if of_teacher and role != "teacher" else None
        difference = difference_of(report, data, name, roles["baseline"])
        size = size_text(report["models"][name]["num_parameters"])
        found.append(Ranked(name, role, summary["rouge_l"], difference, size, share))
    return found


def ranked_table(report: Mapping[str, Any], data: str) -> Table:
    """The same as a table."""
    rows = ranked(report, data)
    columns = {"Rouge-L": [interval_cell(row.score) for row in rows]}
    columns |= ranked_columns(rows, {key: name or "" for key, name in report["roles"].items()}, "Parameters", "-")
    lines: list[Row] = [((row.name,), [cells[index] for cells in columns.values()]) for index, row in enumerate(rows)]
    return Table(f"Models by Rouge-L: {data}", list(columns), lines)


def ranked_columns(rows: Sequence[Ranked], roles: Mapping[str, str], size: str, missing: str) -> dict[str, list[Cell]]:
    """What is known of the models besides the score, by title; columns that say nothing are left out.

    `roles` are the names of `teacher` and `baseline` in titles, `size` is the title of the sizes, and `missing` stands
    for what is not known of one model.
    """
    columns: dict[str, list[Cell | None]] = {
        f"over {roles['baseline']}": [
            interval_cell(row.difference, sign="+") if row.difference else None for row in rows
        ],
        f"of {roles['teacher']}": [None if row.share is None else Cell(f"{row.share:.0%}") for row in rows],
        size: [Cell(row.size) if row.size else None for row in rows],
    }
    return {title: [cell or Cell(missing) for cell in cells] for title, cells in columns.items() if any(cells)}


def headline(report: Mapping[str, Any], data: str) -> str:
    """The message of one data set in a sentence, with names in backticks."""
    rows = ranked(report, data)
    best = next((row for row in rows if not row.role), rows[0])
    teacher = next((row for row in rows if row.role == "teacher"), None)
    score = f"{best.score['mean']:.2f}"
    if teacher is not None and best.share is not None:
        text = f"{_named(best)} keeps {best.share:.0%} of {_named(teacher)}: Rouge-L {score} against "
        text += f"{teacher.score['mean']:.2f}"
    elif len(rows) > 1:
        highest = all(best.score["mean"] > row.score["mean"] for row in rows if row is not best)
        text = f"{_named(best)} has {'the highest Rouge-L,' if highest else 'Rouge-L'} {score}"
    else:
        ends = interval_cell(best.score).interval
        return f"{_named(best)} has Rouge-L {score} {ends}".rstrip() + f" on {_rows(report['data'][data]['n'])}."
    other = report["roles"]["baseline"]
    if other is None or best.difference is None:
        other = next((row.name for row in rows if row.name != best.name and row.role != "teacher"), None)
    difference = difference_of(report, data, best.name, other)
    return f"{text}{_over(difference, other)}."


def cautions(report: Mapping[str, Any], data: str) -> list[str]:
    """What limits the message: answers cut off, one seed, few rows, contamination, text that Rouge loses."""
    about, summaries = report["data"][data], summaries_of(report, data)
    found = []
    for limit, names in _cut_off(report, summaries).items():
        found.append(f"Answers were cut off at {limit} tokens: {', '.join(names)}.")
    thinking = [name for name, summary in summaries.items() if summary.get("share_with_thinking")]
    if thinking:
        found.append(f"Thinking was stripped before scoring: {', '.join(f'`{name}`' for name in thinking)}.")
    sampled = [name for name in summaries if (report["models"][name]["decoding"] or {}).get("temperature", 0) > 0]
    if sampled and all(len(summaries[name]["seeds"]) == 1 for name in sampled):
        found.append("One seed: how much other samples would differ is not known.")
    if about["n"] < FEW_ROWS:
        found.append(f"Few rows: {about['n']} in all.")
    else:
        found += [f"Few rows: {', '.join(parts)}."] if (parts := few_rows(summaries)) else []
    for key, what in (("overlap", "training cache"), ("duplicates", "training data")):
        rows = (report.get(key) or {"rows": {}})["rows"].get(data, [])
        found += [f"{_rows(len(rows), 'prompt')} also in the {what}."] if rows else []
    if skipped := report["skipped"][data]:
        found.append(f"{_rows(len(skipped))} left out.")
    if lost := lost_text(report, data):
        found.append(f"Rouge loses text here: {lost}.")
    return found


def few_rows(summaries: Mapping[str, Any]) -> list[str]:
    """The length buckets with few rows, as `25 in [30,70)`."""
    buckets = next(iter(summaries.values()))["buckets"]
    few = [part for part in buckets if 0 < part["n"] < FEW_ROWS]
    return [f"{part['n']} in {Bucket(part['low'], part['high']).label}" for part in few]


def size_text(num_parameters: int | None) -> str:
    """57M, 1.5B; empty if it is unknown."""
    for unit, letter in _UNITS:
        if num_parameters is not None and num_parameters >= unit:
            value = num_parameters / unit
            return f"{value:.1f}{letter}" if value < 10 else f"{value:.0f}{letter}"
    return "" if num_parameters is None else str(num_parameters)


def _named(row: Ranked) -> str:
    return f"`{row.name}` ({row.size})" if row.size else f"`{row.name}`"


def _over(difference: Mapping[str, Any] | None, other: str | None) -> str:
    if difference is None or difference["mean"] is None:
        return ""
    cell = interval_cell(difference, sign="+")
    p_value = difference["p_holm"]
    unclear = "" if p_value is None or p_value < ALPHA else f", which may be chance (p = {p_value_text(p_value)})"
    return f"; {cell} {'over' if difference['mean'] >= 0 else 'against'} `{other}`{unclear}"


def _cut_off(report: Mapping[str, Any], summaries: Mapping[str, Any]) -> dict[int, list[str]]:
    """By the longest answer, the models many of whose answers reached it."""
    found: dict[int, list[str]] = {}
    for name, summary in summaries.items():
        if (share := summary["share_unfinished"] or 0) >= _CUT_OFF:
            limit = report["models"][name]["decoding"]["max_new_tokens"]
            found.setdefault(limit, []).append(f"{share:.0%} of `{name}`")
    return found


def _rows(number: int, what: str = "row") -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def plain(texts: Iterable[str]) -> str:
    """The sentences as one paragraph without backticks, for a terminal."""
    return " ".join(texts).replace("`", "")
