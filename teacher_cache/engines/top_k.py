"""From an engine's top-K table to its result: entries in rank order, and the tail mass."""

from __future__ import annotations

import numpy as np

from dpkd.teacher_cache.engines.engine import Distributions, EngineOptions, EngineResult, FinishReason

#: Error of a sum of probabilities whose logs are float32.
MASS_RESOLUTION = 1e-6

_HIGHEST_LOGPROB = 1e-5  # nats: rounding of a float32 log-softmax, the bound of `dpkd cache verify`
_HIGHEST_TAIL = 1e-6
_NO_ID = -1  # stands for ids outside the vocabulary

#: What vLLM sends in JSON for a log-prob of -inf, which JSON does not have.
LOWEST_SENT_LOGPROB = -9999.0

#: Entries below this log-prob (nats) are not kept: their probability is 0 in every float type.
LOWEST_KEPT_LOGPROB = -500.0


def build_result(
    index: int,
    response_ids: np.ndarray,
    finish_reason: FinishReason,
    logprobs_T: np.ndarray,
    ids_TK: np.ndarray,
    logprobs_TK: np.ndarray,
    vocab_size: int,
    options: EngineOptions,
) -> EngineResult:
    """The result of request `index`: the response, its log-probs, and its top-K table (rank order) cut by `options`."""
    top = None
    if options.top_k:
        top = from_top_k(ids_TK, logprobs_TK, response_ids, logprobs_T, vocab_size, options.top_mass)
    return EngineResult(index, response_ids, finish_reason, logprobs_T, top)


def from_top_k(
    ids_TK: np.ndarray,
    logprobs_TK: np.ndarray,
    response_ids_T: np.ndarray,
    response_logprobs_T: np.ndarray,
    vocab_size: int,
    top_mass: float | None = None,
) -> Distributions:
    """A rectangular top-K table (rank order) as `Distributions`.

    Entries with no mass are dropped. Ids outside the vocabulary become -1. With `top_mass`, only the smallest set of
    entries that reaches that probability is kept (all K if they do not reach it).
    """
    outside_T = ~(ids_TK == response_ids_T[:, None]).any(axis=1)
    kept_TK = logprobs_TK > LOWEST_KEPT_LOGPROB
    if top_mass is not None:
        probs_TK = np.exp(logprobs_TK.astype(np.float64))
        kept_TK &= probs_TK.cumsum(axis=1) - probs_TK < top_mass
    return Distributions(
        counts_T=kept_TK.sum(axis=1).astype(np.int32),
        # not wrapped around to an id that exists
        ids_E=np.where((ids_TK >= 0) & (ids_TK < vocab_size), ids_TK, _NO_ID)[kept_TK].astype(np.int32),
        logprobs_E=logprobs_TK[kept_TK].astype(np.float32),
        log_tail_T=log_tail(logprobs_TK, kept_TK, response_logprobs_T, outside_T, vocab_size),
    )


def log_tail(
    logprobs_TK: np.ndarray,
    kept_TK: np.ndarray,
    sampled_logprobs_T: np.ndarray,
    sampled_outside_T: np.ndarray,
    vocab_size: int,
) -> np.ndarray:
    """Log of the tail mass at each position; -inf if all `vocab_size` tokens are kept.

    `1 - sum(p)` has the rounding error of K float32 logs, so it is clipped to what is certain. Above: no tail token is
    more likely than the last kept entry. Below: the tail includes the known entries that were not kept, and a sampled
    token that is not in the table. If the difference is below `MASS_RESOLUTION`, that resolution is the estimate and
    not zero, because zero would claim that there is no tail.

    Args:
        logprobs_TK: natural logs in rank order, full vocabulary, temperature 1.
        kept_TK: True for the kept entries, which come first at each position.
        sampled_logprobs_T: log-prob of the response's own token.
        sampled_outside_T: True where that token is not one of the K.
    """
    num_positions, num_known = logprobs_TK.shape
    if num_known == 0:
        return np.zeros(num_positions, np.float32)
    counts_T = kept_TK.sum(axis=1)
    probs_TK = np.exp(logprobs_TK.astype(np.float64))
    last_T = probs_TK[np.arange(num_positions), np.maximum(counts_T - 1, 0)]
    ceiling_T = (vocab_size - counts_T) * last_T
    floor_T = np.where(sampled_outside_T, np.exp(sampled_logprobs_T.astype(np.float64)), 0.0)
    floor_T += np.where(kept_TK, 0.0, probs_TK).sum(axis=1)
    tail_T = np.maximum(1.0 - np.where(kept_TK, probs_TK, 0.0).sum(axis=1), MASS_RESOLUTION)
    tail_T = np.clip(np.minimum(tail_T, ceiling_T), floor_T, 1.0)
    if num_known >= vocab_size:
        tail_T = floor_T  # every token is known: nothing to estimate
    with np.errstate(divide="ignore"):
        return np.log(tail_T).astype(np.float32)


def answer_problem(result: EngineResult) -> str | None:
    """Why the values of a result cannot be a language model's; None if they can. Asked of all engines' results."""
    logprobs_T, top = result.logprobs_T, result.distributions
    if not np.isfinite(logprobs_T).all():
        return "the model's log-probs are not finite"
    if (logprobs_T > _HIGHEST_LOGPROB).any():
        return f"a log-prob of the response is above 0: {logprobs_T.max():g}"
    if (result.response_ids < 0).any():
        return f"a response id is below 0: {result.response_ids.min()}"
    if top is None:
        return None
    if (top.ids_E < 0).any():
        return "the id of an entry is outside the vocabulary"
    if not np.isfinite(top.logprobs_E).all() or np.isnan(top.log_tail_T).any():
        return "a log-prob of the distributions is not finite"
    if (top.logprobs_E > _HIGHEST_LOGPROB).any() or (top.log_tail_T > _HIGHEST_TAIL).any():
        highest = max(top.logprobs_E.max(initial=0), top.log_tail_T.max(initial=0))
        return f"a log-prob of the distributions is above 0: {highest:g}"
    return None
