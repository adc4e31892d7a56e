"""Scores of every answer, by model and data set, and the table that holds them one row an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.evaluate.answers import Answer
from dpkd.evaluate.buckets import bucket_index, buckets_of, num_words
from dpkd.evaluate.eval_sets import EvalSet
from dpkd.evaluate.metrics import exact_match, rouge_l
from dpkd.teacher_cache.files import replacing
from dpkd.teacher_cache.progress import Progress

_SCHEMA = pa.schema(
    [
        ("model", pa.dictionary(pa.int32(), pa.string())),
        ("data", pa.dictionary(pa.int32(), pa.string())),
        ("seed", pa.int64()),
        ("example_id", pa.string()),
        ("category", pa.string()),
        ("bucket", pa.string()),
        ("prompt", pa.string()),
        ("references", pa.list_(pa.field("element", pa.string()))),
        ("response", pa.string()),
        ("rouge_l", pa.float64()),
        ("exact_match", pa.float64()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class ScoredSet:
    """One model's answers to one data set: S seeds by N examples, scores from 0 to 100."""

    model: str
    eval_set: EvalSet
    seeds: tuple[int, ...]
    answers_SN: list[list[Answer]]
    rouge_l_SN: np.ndarray
    exact_match_SN: np.ndarray


def score_answers(
    model: str, eval_set: EvalSet, answers_by_seed: dict[int, list[Answer]], progress: Progress
) -> ScoredSet:
    """Rouge-L and exact match of every answer; `answers_by_seed` is aligned with the set's examples."""
    shape = (len(answers_by_seed), len(eval_set.examples))
    rouge_l_SN, exact_match_SN = np.empty(shape), np.empty(shape)
    for place, answers in enumerate(answers_by_seed.values()):
        for row, (answer, example) in enumerate(zip(answers, eval_set.examples, strict=True)):
            rouge_l_SN[place, row] = rouge_l(answer.response, example.references)
            exact_match_SN[place, row] = exact_match(answer.response, example.references)
            progress.advance()
    return ScoredSet(
        model, eval_set, tuple(answers_by_seed), list(answers_by_seed.values()), rouge_l_SN, exact_match_SN
    )


def bucket_indices(eval_set: EvalSet, edges: Sequence[int]) -> np.ndarray:
    """The length bucket of each of the set's N examples, as an index into `buckets_of(edges)`."""
    return np.array([bucket_index(num_words(example.references), edges) for example in eval_set.examples], dtype=int)


def write_per_example(path: Path, scored_sets: Sequence[ScoredSet], edges: Sequence[int]) -> None:
    """Write one row a model, data set, seed and example to `path` (Parquet), one row group a set and seed."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
        for scored in scored_sets:
            for place in range(len(scored.seeds)):
                writer.write_table(pa.Table.from_pylist(_rows(scored, place, edges), schema=_SCHEMA))


def _rows(scored: ScoredSet, place: int, edges: Sequence[int]) -> list[dict[str, Any]]:
    eval_set = scored.eval_set
    buckets = buckets_of(edges)
    return [
        {
            "model": scored.model,
            "data": eval_set.name,
            "seed": scored.seeds[place],
            "example_id": example.example_id,
            "category": example.category,
            "bucket": buckets[bucket].label,
            "prompt": prompt.text,
            "references": list(example.references),
            "response": answer.response,
            "rouge_l": scored.rouge_l_SN[place, row],
            "exact_match": scored.exact_match_SN[place, row],
            "finish_reason": answer.finish_reason,
            "num_tokens": answer.num_tokens,
        }
        for row, (example, prompt, answer, bucket) in enumerate(
            zip(
                eval_set.examples,
                eval_set.prompts[scored.model],
                scored.answers_SN[place],
                bucket_indices(eval_set, edges),
                strict=True,
            )
        )
    ]
