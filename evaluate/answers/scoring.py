"""Scores of every answer, by model and data set, and the table with one row per answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.core.files import replacing
from dpkd.core.progress import Progress
from dpkd.evaluate.answers.answers import Answer, ModelAnswers
from dpkd.evaluate.answers.perplexity import ModelMetrics, References
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.metrics.buckets import bucket_index, buckets_of, num_words
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

    `prompts_SN` are as the model got them: later turns follow its own answers, which differ by seed. `scores` has the
    values [S, N] of each field of `Scores` (nothing before scoring), `bucket_SN` each answer's length bucket: its
    example's or its own. `references` are the gold responses under the model; None if not measured.
    """

    model: str
    eval_set: EvalSet
    seeds: tuple[int, ...]
    prompts_SN: list[list[str]]
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
            given = answered_set(config, eval_set, model, answers_of[eval_set.name])
            values = []
            for answers_N in given.answers_SN:
                pairs = zip(answers_N, eval_set.examples, strict=True)
                values.append([score(one.answer, row.references, config.rouge_tokenizer) for one, row in pairs])
                progress.advance(len(answers_N))
            values_SNK = np.array(values, dtype=np.float64)
            scores = {name: values_SNK[:, :, index] for index, name in enumerate(Scores._fields)}
            references = metrics[model].references.get(eval_set.name) if model in metrics else None
            scored_sets.append(replace(given, scores=scores, references=references))
    return scored_sets


def answered_set(config: EvalConfig, eval_set: EvalSet, model: str, by_seed: Mapping[int, list[Answer]]) -> ScoredSet:
    """The answers of `model` to `eval_set`, without scores."""
    answers_SN = list(by_seed.values())
    texts_SN = [[answer.answer for answer in answers_N] for answers_N in answers_SN]
    prompts_SN = [[eval_set.prompt_text(model, row, texts) for row in range(len(texts))] for texts in texts_SN]
    bucket_SN = _bucket_indices(eval_set, answers_SN, config)
    return ScoredSet(model, eval_set, tuple(by_seed), prompts_SN, answers_SN, {}, bucket_SN)


def _bucket_indices(eval_set: EvalSet, answers_SN: Sequence[Sequence[Answer]], config: EvalConfig) -> np.ndarray:
    """The length bucket of each answer [S, N], as an index into `buckets_of(eval_set.edges)`."""

    def length(answer: Answer, row: int) -> int:
        if config.bucket_of == "reference":
            return eval_set.lengths[row]
        if config.bucket_by == "words":
            return num_words([answer.answer])
        assert answer.num_tokens is not None  # predictions are refused before
        return answer.num_tokens

    return np.array(
        [
            [bucket_index(length(answer, row), eval_set.edges) for row, answer in enumerate(answers_N)]
            for answers_N in answers_SN
        ]
    )


def write_per_example(path: Path, scored_sets: Sequence[ScoredSet]) -> None:
    """Write one row per model, data set, seed and example to `path` (Parquet), a row group per model, set and seed."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
        for scored in scored_sets:
            for index in range(len(scored.seeds)):
                writer.write_table(pa.Table.from_pylist(_rows(scored, index), schema=_SCHEMA))


def _rows(scored: ScoredSet, seed_index: int) -> list[dict[str, Any]]:
    eval_set = scored.eval_set
    buckets = buckets_of(eval_set.edges)
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
            "prompt": scored.prompts_SN[seed_index][row],
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
