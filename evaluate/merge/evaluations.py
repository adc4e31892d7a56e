"""A finished evaluation, read from its directory: its report, and each model's answers with their scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.core.errors import UserError
from dpkd.core.identity import file_sha256
from dpkd.core.json_lines import loads
from dpkd.core.prompts.examples import Example, Message
from dpkd.evaluate.answers.answers import Answer
from dpkd.evaluate.answers.perplexity import References
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.metrics.buckets import buckets_of
from dpkd.evaluate.metrics.rouge import RougeTokenizer, find_lost_text
from dpkd.evaluate.metrics.scores import Scores
from dpkd.evaluate.options.eval import check_name
from dpkd.evaluate.report.build import FORMAT_VERSION
from dpkd.evaluate.views.output import REPORT, ROWS

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The evaluation in `directory`: the name given to it, its report, and the sha256 of its rows."""

    directory: Path
    name: str | None
    report: dict[str, Any]
    rows_sha256: str

    def renamed(self, name: str) -> str:
        """The name in the merged report of the model or run `name` of this evaluation."""
        if self.name is None:
            return name
        alone = {*self.report["models"]} == {name}
        return self.name if alone else f"{self.name}.{name}"

    def rows(self, model: str, data: str) -> dict[int, dict[str, Row]]:
        """The rows of one model and set: by seed, then by example id, in the set's order."""
        return self._by_part[model, data]

    @cached_property
    def _by_part(self) -> dict[tuple[str, str], dict[int, dict[str, Row]]]:
        found: dict[tuple[str, str], dict[int, dict[str, Row]]] = {}
        for row in pq.read_table(self.directory / ROWS).to_pylist():
            found.setdefault((row["model"], row["data"]), {}).setdefault(row["seed"], {})[row["example_id"]] = row
        return found

    def parts(self) -> Iterator[tuple[str, str]]:
        """Each evaluated (model, set)."""
        for model, about in self.report["models"].items():
            for data in about["data"]:
                yield model, data


def open_evaluation(text: str) -> Evaluation:
    """The evaluation at DIR or NAME=DIR; raises `UserError` if it is not finished or has another format."""
    name, equals, place = text.partition("=")
    if not equals or Path(text).is_dir():
        name, place = "", text
    elif name:
        try:
            check_name(name)
        except ValueError as error:
            raise UserError(str(error), where=text, advice="Give DIR or NAME=DIR") from None
    folder = Path(place)
    report = _read_report(folder)
    rows_path = folder / ROWS
    if not rows_path.is_file():
        raise UserError(f"the evaluation has no {ROWS}", where=folder, advice="Delete its report.json and run it again")
    evaluation = Evaluation(folder, name or None, report, file_sha256(rows_path))
    _check_rows(evaluation)
    return evaluation


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    if not path.is_file():
        raise UserError(
            "the directory holds no finished evaluation",
            found="no such directory" if not folder.is_dir() else f"no {REPORT}",
            where=folder,
            advice="Give the --out directory of a finished `dpkd eval`",
        )
    try:
        report: dict[str, Any] = loads(path.read_text(encoding="utf-8"))
        version = report["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the report cannot be read: {type(error).__name__} {error}", where=path) from None
    if version != FORMAT_VERSION:
        raise UserError(
            "the evaluation's report has another format",
            found=version,
            expected=FORMAT_VERSION,
            where=path,
            advice="Run its dpkd.toml again with a new --out; --generations reuses its answers",
        )
    return report


def _check_rows(evaluation: Evaluation) -> None:
    """Raise `UserError` if the rows are not those of the report."""
    path = evaluation.directory / ROWS
    try:
        table = pq.read_table(path, columns=["model", "data"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the evaluation's rows cannot be read: {error}", where=path) from None
    counts = Counter((row["model"], row["data"]) for row in table.to_pylist())
    for model, data in evaluation.parts():
        summary = evaluation.report["models"][model]["data"][data]
        expected = summary["n"] * len(summary["seeds"])
        if (found := counts[model, data]) != expected:
            raise UserError(
                f"the evaluation's rows do not match its report: model {model}, data {data}",
                found=f"{found} rows",
                expected=expected,
                where=path,
                advice=f"Delete its {REPORT} and run it again",
            )


def read_set(
    rows: dict[int, dict[str, Row]],
    name: str,
    about: dict[str, Any],
    ids: list[str],
    tokenizer: RougeTokenizer,
) -> EvalSet:
    """The set `name` from the rows of one model, with the examples `ids`; `about` is the report's entry for it."""
    first = next(iter(rows.values()))
    examples = [
        Example(
            example_id,
            line=0,  # not known from the rows
            references=tuple(first[example_id]["references"]),
            messages=tuple(Message(**turn) for turn in first[example_id]["messages"]),
            category=first[example_id]["category"],
        )
        for example_id in ids
    ]
    return EvalSet(
        name,
        {},
        examples,
        prompts={},
        skipped=[],
        num_rows=about["num_rows"],
        edges=tuple(about["edges"]),
        lost=find_lost_text([example.references for example in examples], tokenizer),
    )


def scored_set(rows: dict[int, dict[str, Row]], model: str, eval_set: EvalSet) -> ScoredSet:
    """One model's answers to the examples of `eval_set`."""
    ids = [example.example_id for example in eval_set.examples]
    rows_SN = [[by_id[example_id] for example_id in ids] for by_id in rows.values()]
    labels = [bucket.label for bucket in buckets_of(eval_set.edges)]
    return ScoredSet(
        model,
        eval_set,
        tuple(rows),
        [[row["prompt"] for row in rows_N] for rows_N in rows_SN],
        [[_answer(row) for row in rows_N] for rows_N in rows_SN],
        {name: np.array([[row[name] for row in rows_N] for rows_N in rows_SN]) for name in Scores._fields},
        np.array([[labels.index(row["bucket"]) for row in rows_N] for rows_N in rows_SN]),
        _references(rows_SN[0]),
    )


def _answer(row: Row) -> Answer:
    # only the number of ids is known, and no more is needed here
    return Answer(row["example_id"], row["response"], [0] * (row["num_tokens"] or 0), row["finish_reason"])


def _references(rows_N: list[Row]) -> References | None:
    if all(row["reference_nll"] is None for row in rows_N):
        return None
    nll_N = [
        math.nan if row["reference_nll"] is None else row["reference_nll"] * row["reference_tokens"] for row in rows_N
    ]
    return References(
        np.array(nll_N),
        np.array([row["reference_tokens"] or 0 for row in rows_N]),
        np.array([len(row["references"][0].encode()) for row in rows_N]),
    )
