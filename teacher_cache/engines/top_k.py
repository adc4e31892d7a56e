"""From an engine's top-K table to the cache's distributions: rank order and the mass outside."""

from __future__ import annotations

import numpy as np

from dpkd.teacher_cache.engines.engine import Distributions

#: Probabilities that sum to one carry about this error when their logs are float32.
MASS_RESOLUTION = 1e-6

#: Entries below this log-prob (nats) hold no mass in any float type and are not kept; -inf is among them.
LOWEST_KEPT_LOGPROB = -500.0


def log_tail(
    logprobs_TK: np.ndarray,
    kept_TK: np.ndarray,
    sampled_logprobs_T: np.ndarray,
    sampled_outside_T: np.ndarray,
    vocab_size: int,
) -> np.ndarray:
    """Log of the mass outside the kept entries of `vocab_size` tokens, per position; -inf when they are all of them.

    `1 - sum(p)` carries the rounding of K float32 logs, so it is held between what is certain: no token outside is
    likelier than the last one kept, and entries that are known but not kept, or a sampled token outside the table,
    hold their own mass. Where the difference is below `MASS_RESOLUTION` that resolution is the estimate, never zero:
    a zero would claim that nothing is left.

    Args:
        logprobs_TK: natural logs in rank order, full vocabulary, temperature 1.
        kept_TK: True for the entries that are kept, the first ones of each position.
        sampled_logprobs_T: log-prob of the response's own token.
        sampled_outside_T: True where that token is not among the K.
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
    rest_T = np.maximum(1.0 - np.where(kept_TK, probs_TK, 0.0).sum(axis=1), MASS_RESOLUTION)
    rest_T = np.clip(np.minimum(rest_T, ceiling_T), floor_T, 1.0)
    if num_known >= vocab_size:
        rest_T = floor_T  # every token is known: nothing to estimate
    with np.errstate(divide="ignore"):
        return np.log(rest_T).astype(np.float32)


def from_top_k(
    ids_TK: np.ndarray,
    logprobs_TK: np.ndarray,
    response_ids_T: np.ndarray,
    response_logprobs_T: np.ndarray,
    vocab_size: int,
    top_mass: float | None = None,
) -> Distributions:
    """A rectangular top-K table (rank order) as `Distributions`.

    Entries without mass are left out; with `top_mass`, so are those after the first ones that reach that probability
    together (the smallest such set; all K where K does not reach it).
    """
    outside_T = ~(ids_TK == response_ids_T[:, None]).any(axis=1)
    kept_TK = logprobs_TK > LOWEST_KEPT_LOGPROB
    if top_mass is not None:
        probs_TK = np.exp(logprobs_TK.astype(np.float64))
        kept_TK &= probs_TK.cumsum(axis=1) - probs_TK < top_mass
    return Distributions(
        counts_T=kept_TK.sum(axis=1).astype(np.int32),
        ids_E=ids_TK[kept_TK].astype(np.int32),
        logprobs_E=logprobs_TK[kept_TK].astype(np.float32),
        log_tail_T=log_tail(logprobs_TK, kept_TK, response_logprobs_T, outside_T, vocab_size),
    )
