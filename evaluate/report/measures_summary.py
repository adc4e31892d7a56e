"""Perplexity and divergences as the report has them: means over tokens with bootstrap intervals over rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dpkd.evaluate.metrics.bootstrap import Interval, ratio_interval

if TYPE_CHECKING:
    from dpkd.evaluate.answers.perplexity import References

#: what a summary (and each bucket of one) has of the gold responses; all null where no model was measured
REFERENCE_KEYS = ("perplexity", "reference_nll", "bits_per_byte", "num_references")

_LARGEST_EXPONENT = 700.0  # exp of more is no float64


def reference_summary(
    references: References | None, bucket_SN: np.ndarray, index: int | None, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """The values of `REFERENCE_KEYS` over all rows (`index` None), or over those in the bucket `index`.

    `perplexity` is exp of `reference_nll`, nats a token; both and `bits_per_byte` (log2 over bytes of text) are taken
    over sums, so that long responses weigh more. Null where a row's answers are in different buckets.
    """
    if references is None or (index is not None and bool((bucket_SN != bucket_SN[0]).any())):
        return dict.fromkeys(REFERENCE_KEYS)
    nll_N = references.nll_N if index is None else np.where(bucket_SN[0] == index, references.nll_N, np.nan)
    by_token = ratio_interval(nll_N, references.num_tokens_N, num_bootstrap, seed)
    by_byte = ratio_interval(nll_N / math.log(2), references.num_bytes_N, num_bootstrap, seed)
    values = (_exp(by_token).as_dict(), by_token.as_dict(), by_byte.as_dict(), int((~np.isnan(nll_N)).sum()))
    return dict(zip(REFERENCE_KEYS, values, strict=True))


def teacher_summary(values: dict[str, list[float]] | None, num_bootstrap: int, seed: int) -> dict[str, Any] | None:
    """Of `OpenedModel.to_teacher`: `kl`, `rkld` (nats a token), `kld_first`, `rkld_first` (nats), `top1_agreement`.

    `kl` is KL(teacher || model), `rkld` the other way; `perplexity` is that of the cached responses. `num_rows` and
    `num_tokens` say over how much.
    """
    if values is None:
        return None
    tokens_N = np.array(values["tokens"])
    ones_N = np.ones_like(tokens_N)

    def interval(name: str, weights_N: np.ndarray) -> Interval:
        return ratio_interval(np.array(values[name]), weights_N, num_bootstrap, seed)

    return {
        "num_rows": len(tokens_N),
        "num_tokens": int(tokens_N.sum()),
        "kl": interval("kld", tokens_N).as_dict(),
        "rkld": interval("rkld", tokens_N).as_dict(),
        "kld_first": interval("kld_first", ones_N).as_dict(),
        "rkld_first": interval("rkld_first", ones_N).as_dict(),
        "top1_agreement": interval("top1_agreement", tokens_N).as_dict(),
        "perplexity": _exp(interval("nll", tokens_N)).as_dict(),
    }


def _exp(interval: Interval) -> Interval:
    ends = (interval.mean, interval.low, interval.high)
    return Interval(*(None if end is None else math.exp(min(end, _LARGEST_EXPONENT)) for end in ends))
