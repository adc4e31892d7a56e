"""Scores of every answer, by model and data set, and the table with one row per answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.core.errors import UserError
from dpkd.core.files import replacing
from dpkd.core.progress import Progress
from dpkd.evaluate.answers.answers import Answer, ModelAnswers
from dpkd.evaluate.answers.perplexity import ModelMetrics, References
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.metrics.buckets import bucket_index, buckets_of
from dpkd.evaluate.metrics.scores import Scores, score
from dpkd.evaluate.options.eval import EvalConfig

_SCHEMA = pa.schema(
    [
        ("model", pa.dictionary(pa.int32(), pa.string())),
        ("data", pa.dictionary(pa.int32(), pa.string())),
        ("seed", pa.int64()),
        ("example_id", pa.string()),
        ("category", pa.string()),
        ("bucket", pa.string()),
        ("question", pa.string()),
        ("messages", pa.list_(pa.field("element", pa.struct([("role", pa.string()), ("content", pa.string())])))),
        ("prompt", pa.string()),
        ("references", pa.list_(pa.field("element", pa.string()))),
        ("response", pa.string()),
        *((name, pa.float64()) for name in Scores._fields),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int32()),
        ("reference_nll", pa.float64()),
        ("reference_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class ScoredSet:
    """One model's answers to one data set: S seeds by N examples.

    `scores` has the values [S, N] of each field of `Scores`, `bucket_SN` each answer's length bucket: its example's or
    its own. `references` are the gold responses under the model; None if not measured.
    """

    model: str
    eval_set: EvalSet
    seeds: tuple[int, ...]
    answers_SN: list[list[Answer]]
    scores: dict[str, np.ndarray]
    bucket_SN: np.ndarray
    references: References | None = None


def score_sets(
    config: EvalConfig,
    eval_sets: Sequence[EvalSet],
    answers: Mapping[str, ModelAnswers],
    progress: Progress,
    metrics: Mapping[str, ModelMetrics],
) -> list[ScoredSet]:
    """The scores of every answer; `metrics` are those of the models themselves, predictions have none."""
    scored_sets = []
    for model, answers_of in answers.items():
        for eval_set in eval_sets:
            by_seed = {seed: answers_N for (data, seed), answers_N in answers_of.items() if data == eval_set.name}
            values = []
            for answers_N in by_seed.values():
                pairs = zip(answers_N, eval_set.examples, strict=True)
                values.append([score(given.answer, row.references, config.rouge_tokenizer) for given, row in pairs])
                progress.advance(len(answers_N))
            values_SNK = np.array(values, dtype=np.float64)
            scores = {name: values_SNK[:, :, index] for index, name in enumerate(Scores._fields)}
            answers_SN = list(by_seed.values())
            bucket_SN = bucket_indices(eval_set, answers_SN, scores["num_words"], config)
            references = metrics[model].references.get(eval_set.name) if model in metrics else None
            scored_sets.append(ScoredSet(model, eval_set, tuple(by_seed), answers_SN, scores, bucket_SN, references))
    return scored_sets


def bucket_indices(
    eval_set: EvalSet, answers_SN: Sequence[Sequence[Answer]], num_words_SN: np.ndarray, config: EvalConfig
) -> np.ndarray:
    """The length bucket of each answer [S, N], as an index into `buckets_of(eval_set.edges)`."""
    if config.bucket_of == "reference":
        lengths_SN = np.tile(np.array(eval_set.lengths, dtype=int), (len(answers_SN), 1))
    elif config.bucket_by == "words":
        lengths_SN = num_words_SN.astype(int)
    else:
        counts = [[answer.num_tokens for answer in answers] for answers in answers_SN]
        if any(count is None for row in counts for count in row):
            raise UserError(
                "buckets by the answers' tokens need answers with known tokens",
                found="predictions, which are text only",
                where="--bucket-by",
                advice="Give --bucket-by words, or --bucket-of reference",
            )
        lengths_SN = np.array(counts, dtype=int)
    return np.vectorize(lambda length: bucket_index(length, eval_set.edges), otypes=[int])(lengths_SN)


def write_per_example(path: Path, scored_sets: Sequence[ScoredSet]) -> None:
    """Write one row per model, data set, seed and example to `path` (Parquet), a row group per model, set and seed."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
        for scored in scored_sets:
            for index in range(len(scored.seeds)):
                writer.write_table(pa.Table.from_pylist(_rows(scored, index), schema=_SCHEMA))


def _rows(scored: ScoredSet, seed_index: int) -> list[dict[str, Any]]:
    eval_set = scored.eval_set
    buckets = buckets_of(eval_set.edges)
    texts = [answer.answer for answer in scored.answers_SN[seed_index]]
    return [
        {
            "model": scored.model,
            "data": eval_set.name,
            "seed": scored.seeds[seed_index],
            "example_id": example.example_id,
            "category": example.category,
            "bucket": buckets[scored.bucket_SN[seed_index, row]].label,
            "question": eval_set.question(row),
            "messages": [{"role": turn.role, "content": turn.content} for turn in eval_set.messages(row)],
            "prompt": eval_set.prompt_text(scored.model, row, texts),
            "references": list(example.references),
            "response": answer.response,
            **{name: values_SN[seed_index, row] for name, values_SN in scored.scores.items()},
            "finish_reason": answer.finish_reason,
            "num_tokens": answer.num_tokens,
            **_of_reference(scored.references, row),
        }
        for row, (example, answer) in enumerate(zip(eval_set.examples, scored.answers_SN[seed_index], strict=True))
    ]


def _of_reference(references: References | None, row: int) -> dict[str, float | int | None]:
    """Nats per token of the gold response, and its tokens with EOS; null if not measured."""
    if references is None or np.isnan(references.nll_N[row]):
        return {"reference_nll": None, "reference_tokens": None}
    num_tokens = int(references.num_tokens_N[row])
    return {"reference_nll": float(references.nll_N[row]) / num_tokens, "reference_tokens": num_tokens}
