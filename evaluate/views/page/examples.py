"""The rows of the page: texts, scores and what Rouge compares, small enough for one file and quick to open."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.metrics.buckets import buckets_of
from dpkd.evaluate.metrics.rouge import RougeTokenizer, tokenize
from dpkd.evaluate.report.build import summaries_of

#: rows of a set, and characters of all its answers, that the page shows; per_example.parquet has all
MAX_ROWS, MAX_CHARACTERS = 2000, 16_000_000

_WORD = re.compile(r"[a-z0-9]+")
_SHORTEST_STEMMED = 4  # characters; the library stems no shorter word

#: what a judge said of an answer, by data set, model, seed and example: what was read, and the whole reply
Grades = Mapping[tuple[str, str, int, str], tuple[str, str]]


def packed_examples(
    report: dict[str, Any], scored_sets: Sequence[ScoredSet], colours: Mapping[str, int], grades: Grades
) -> str:
    """All sets as JSON, compressed, in base64: the page's script unpacks it."""
    tokenizer = report["settings"]["rouge_tokenizer"]
    sets = []
    for data in report["data"]:
        of_set = [scored for scored in scored_sets if scored.eval_set.name == data]
        sets.append(_examples(report, data, of_set, colours, grades, tokenizer))
    text = json.dumps({"sets": sets, "roles": report["roles"], "tokenizer": tokenizer}, ensure_ascii=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def _examples(
    report: dict[str, Any],
    data: str,
    of_set: Sequence[ScoredSet],
    colours: Mapping[str, int],
    grades: Grades,
    tokenizer: RougeTokenizer,
) -> dict[str, Any]:
    eval_set = of_set[0].eval_set
    num_rows, num_seeds = _shown(of_set)
    rows = [
        {
            "id": example.example_id,
            "category": example.category,
            "messages": [[turn.role, turn.content] for turn in eval_set.messages(row)],
            "references": list(example.references),
            "answers": [
                [_answer(scored, seed, row, grades) for seed in range(min(num_seeds, len(scored.seeds)))]
                for scored in of_set
            ],
        }
        for row, example in enumerate(eval_set.examples[:num_rows])
    ]
    return {
        "name": data,
        "note": _note(of_set, num_rows, num_seeds),
        "models": [scored.model for scored in of_set],
        "colours": [colours[scored.model] for scored in of_set],
        "seeds": [list(scored.seeds[:num_seeds]) for scored in of_set],
        "order": sorted(range(len(of_set)), key=lambda index: -_mean(report, data, of_set[index].model)),
        "buckets": [bucket.label for bucket in buckets_of(eval_set.edges)],
        "stems": _stems(rows) if tokenizer == "default" else {},
        "rows": rows,
    }


def _mean(report: dict[str, Any], data: str, model: str) -> float:
    return float(summaries_of(report, data)[model]["rouge_l"]["mean"])


def _shown(of_set: Sequence[ScoredSet]) -> tuple[int, int]:
    """How many rows, and how many seeds of each model, fit: first all rows of the first seed, then whole seeds."""
    num_rows = min(len(of_set[0].eval_set.examples), MAX_ROWS)
    most_seeds = max(len(scored.seeds) for scored in of_set)
    used, kept = 0, 0
    for seed in range(most_seeds):
        for row in range(num_rows):
            size = sum(len(scored.answers_SN[seed][row].response) for scored in of_set if seed < len(scored.seeds))
            if used + size > MAX_CHARACTERS and (seed > 0 or row > 0):
                return (num_rows, kept) if kept else (row, 1)
            used += size
        kept += 1
    return num_rows, kept


def _note(of_set: Sequence[ScoredSet], num_rows: int, num_seeds: int) -> str:
    total, seeds = len(of_set[0].eval_set.examples), max(len(scored.seeds) for scored in of_set)
    left_out = []
    if num_rows < total:
        left_out.append(f"the first {num_rows:,} of {total:,} rows")
    if num_seeds < seeds:
        left_out.append(f"{num_seeds} of {seeds} seeds")
    return f"Here are {' and '.join(left_out)}; per_example.parquet has all." if left_out else ""


def _answer(scored: ScoredSet, seed: int, row: int, grades: Grades) -> list[Any]:
    """Text, Rouge-L, exact match, words, bucket, whether it was cut off; then what a judge read and replied, if any."""
    answer = scored.answers_SN[seed][row]
    found = [
        answer.response,
        round(float(scored.scores["rouge_l"][seed, row]), 2),
        int(scored.scores["exact_match"][seed, row] > 0),
        int(scored.scores["num_words"][seed, row]),
        int(scored.bucket_SN[seed, row]),
        int(answer.finish_reason == "length"),
    ]
    grade = grades.get((scored.eval_set.name, scored.model, scored.seeds[seed], answer.example_id))
    return found if grade is None else [*found, *grade]


def _stems(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The stem of each word that has another one: with them, the page marks the words that Rouge-L counts."""
    words: set[str] = set()
    for row in rows:
        for text in row["references"]:
            words.update(_WORD.findall(text.lower()))
        for answers in row["answers"]:
            for answer in answers:
                words.update(_WORD.findall(answer[0].lower()))
    stems = {word: "".join(tokenize(word, "default")) for word in words if len(word) >= _SHORTEST_STEMMED}
    return {word: stem for word, stem in sorted(stems.items()) if stem != word}
