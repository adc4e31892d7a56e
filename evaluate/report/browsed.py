"""What the page's browser of examples holds of each set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.metrics.buckets import buckets_of

#: rows of a set that the browser of examples holds; per_example.parquet has all
MAX_ROWS = 2000


def browsed_set(data: str, scored_sets: Sequence[ScoredSet]) -> dict[str, Any]:
    """The rows of one set with every model's answer of its first seed, as the page's script reads them."""
    eval_set = scored_sets[0].eval_set
    buckets = buckets_of(eval_set.edges)
    num_shown = min(len(eval_set.examples), MAX_ROWS)
    cut = "" if num_shown == len(eval_set.examples) else f" (first {num_shown} rows)"
    return {
        "name": data + cut,
        "models": [scored.model for scored in scored_sets],
        "buckets": [bucket.label for bucket in buckets],
        "rows": [
            {
                "id": example.example_id,
                "category": example.category,
                "question": eval_set.question(row),
                "prompt": eval_set.prompt_text(scored_sets[0].model, row),
                "references": list(example.references),
                "answers": [_answer(scored, row, buckets[scored.bucket_SN[0, row]].label) for scored in scored_sets],
            }
            for row, example in enumerate(eval_set.examples[:num_shown])
        ],
    }


def _answer(scored: ScoredSet, row: int, bucket: str) -> dict[str, Any]:
    answer = scored.answers_SN[0][row]
    return {
        "text": answer.response,
        "rouge_l": round(float(scored.scores["rouge_l"][0, row]), 2),
        "exact_match": float(scored.scores["exact_match"][0, row]),
        "num_words": int(scored.scores["num_words"][0, row]),
        "bucket": bucket,
        "unfinished": answer.finish_reason == "length",
    }
