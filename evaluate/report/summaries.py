"""What `report.json` holds of one model: scores by length bucket and seed, perplexity, divergence from the teacher."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpkd.core.prompts.thinking import has_thinking
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.metrics.buckets import buckets_of
from dpkd.evaluate.metrics.inference import (
    COUNTS,
    SCORES,
    Interval,
    mean_intervals,
    ratio_interval,
    share_intervals,
    smallest_resolvable,
)
from dpkd.evaluate.metrics.scores import distinct

_REFERENCE_KEYS = ("perplexity", "reference_nll", "bits_per_byte", "num_references")
_LARGEST_EXPONENT = 700.0  # exp of more overflows float64


def summarise(scored: ScoredSet) -> dict[str, Any]:
    """Scores of one model's answers to one set, overall and by bucket."""
    answers = [answer for answers_N in scored.answers_SN for answer in answers_N]
    num_tokens = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
    reasons = [answer.finish_reason for answer in answers if answer.finish_reason is not None]
    everywhere_SN = np.full(scored.bucket_SN.shape, True)
    summary: dict[str, Any] = {
        "n": len(scored.eval_set.examples),
        **_intervals(scored, everywhere_SN),
        **_reference_summary(scored, None),
        "seeds": _seeds(scored, everywhere_SN),
        "buckets": [],
        "categories": [],
    }
    for index, bucket in enumerate(buckets_of(scored.eval_set.edges)):
        in_bucket_SN = scored.bucket_SN == index
        summary["buckets"].append(
            {
                **bucket._asdict(),
                "n": int(in_bucket_SN.any(axis=0).sum()),
                "num_answers": int(in_bucket_SN.sum()),
                **_intervals(scored, in_bucket_SN),
                **_reference_summary(scored, index),
                "seeds": _seeds(scored, in_bucket_SN),
            }
        )
    for category, indices in scored.eval_set.categories().items():
        (interval,) = mean_intervals(scored.scores["rouge_l"][None, :, indices], SCORES)
        summary["categories"].append({"category": category, "n": len(indices), "rouge_l": interval._asdict()})
    # for two models with unrelated scores; rows scored by both usually resolve smaller differences
    resolvable = smallest_resolvable(scored.scores["rouge_l"].mean(axis=0))
    summary["smallest_resolvable_unpaired"] = None if resolvable is None else math.sqrt(2) * resolvable
    for size in (1, 2):
        by_seed = [distinct((answer.answer for answer in answers_N), size) for answers_N in scored.answers_SN]
        summary[f"distinct_{size}"] = _mean([value for value in by_seed if value is not None])
    summary["mean_response_tokens"] = _mean(num_tokens)
    summary["share_with_thinking"] = _mean([has_thinking(answer.response) for answer in answers])
    summary["share_unfinished"] = _mean([reason == "length" for reason in reasons])
    return summary


def _mean(values: list[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def _intervals(scored: ScoredSet, counted_SN: np.ndarray) -> dict[str, Any]:
    intervals = {}
    for metric, values_SN in scored.scores.items():
        values_KSN = np.where(counted_SN, values_SN, np.nan)[None]
        if metric == "exact_match":
            (interval,) = share_intervals(values_KSN)
        else:
            (interval,) = mean_intervals(values_KSN, COUNTS if metric == "num_words" else SCORES)
        intervals[metric] = interval._asdict()
    return intervals


def _seeds(scored: ScoredSet, counted_SN: np.ndarray) -> list[dict[str, Any]]:
    """The means of each seed over the answers that count; None if it has none."""
    return [
        {
            "seed": seed,
            **{
                metric: float(values_SN[index][counted_SN[index]].mean()) if counted_SN[index].any() else None
                for metric, values_SN in scored.scores.items()
            },
        }
        for index, seed in enumerate(scored.seeds)
    ]


def _reference_summary(scored: ScoredSet, bucket: int | None) -> dict[str, Any]:
    """Perplexity of the gold responses over all rows (`bucket` None) or those in one bucket; null if not measured.

    Means are over sums, so long responses weigh more. Also null if the answers of a row are in different buckets.
    """
    references, bucket_SN = scored.references, scored.bucket_SN
    if references is None or (bucket is not None and bool((bucket_SN != bucket_SN[0]).any())):
        return dict.fromkeys(_REFERENCE_KEYS)
    nll_N = references.nll_N if bucket is None else np.where(bucket_SN[0] == bucket, references.nll_N, np.nan)
    by_token = ratio_interval(nll_N, references.num_tokens_N)
    by_byte = ratio_interval(nll_N / math.log(2), references.num_bytes_N)
    values = (_exp(by_token)._asdict(), by_token._asdict(), by_byte._asdict(), int((~np.isnan(nll_N)).sum()))
    return dict(zip(_REFERENCE_KEYS, values, strict=True))


def teacher_summary(values: dict[str, list[float]] | None) -> dict[str, Any] | None:
    """Divergence from the teacher of a cache; `values` as in `ModelMetrics.to_teacher`.

    `kl` is KL(teacher || model) and `rkld` the reverse, in nats a token; `perplexity` is that of the cached responses.
    """
    if values is None:
        return None
    tokens_N = np.array(values["tokens"])
    ones_N = np.ones_like(tokens_N)

    def interval(name: str, weights_N: np.ndarray) -> Interval:
        return ratio_interval(np.array(values[name]), weights_N)

    return {
        "num_rows": len(tokens_N),
        "num_tokens": int(tokens_N.sum()),
        "kl": interval("kld", tokens_N)._asdict(),
        "rkld": interval("rkld", tokens_N)._asdict(),
        "kld_first": interval("kld_first", ones_N)._asdict(),
        "rkld_first": interval("rkld_first", ones_N)._asdict(),
        "top1_agreement": interval("top1_agreement", tokens_N)._asdict(),
        "perplexity": _exp(interval("nll", tokens_N))._asdict(),
    }


def _exp(interval: Interval) -> Interval:
    return Interval(*(None if end is None else math.exp(min(end, _LARGEST_EXPONENT)) for end in interval))
