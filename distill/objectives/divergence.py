"""Divergences between the teacher's and the student's distribution at each position, unreduced, in nats.

Shapes: T positions, V logits, K kept entries of the teacher's distribution, N outcomes. p is the teacher, q the
student, both as natural logs over the same N outcomes (`align` makes them). Computed in float32; float64 stays
float64. An outcome where both sides are -inf does not exist: it adds 0 to every value and to every gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Outside = Literal["remainder", "renormalise", "uniform"]
Divergence = Literal["forward-kl", "reverse-kl", "jsd", "tvd", "akl", "skewed-forward-kl", "skewed-reverse-kl"]


def align(
    student_logits_TV: Float[Tensor, "T V"],
    entry_ids_TK: Int[Tensor, "T K"],
    entry_logprobs_TK: Float[Tensor, "T K"],
    entry_counts_T: Int[Tensor, " T"],
    log_remainder_T: Float[Tensor, " T"],
    outside: Outside,
    *,
    vocab_size: int,
) -> tuple[Float[Tensor, "T N"], Float[Tensor, "T N"]]:
    """Teacher and student as log-distributions over the same N outcomes; the student's is differentiable.

    Each sums to 1 (the teacher's is normalised, which takes out the rounding of its stored logs). Outcomes:

    - remainder: the K entries, in their order, and last everything outside them as one outcome, N = K + 1. Merging
      outcomes never raises an f-divergence, so KL, JSD and TVD are lower bounds of the full one, tight at K = V.
    - renormalise: the K entries alone, both sides normalised over them, N = K. Blind to what the student puts outside.
      A position without entries has no outcome: it is -inf on both sides, and every divergence of it is 0.
    - uniform: the V logits, the teacher's remainder spread evenly over the vocab_size - count tokens outside, N = V.

    Logits may be wider than `vocab_size` (a padded vocabulary). The student's distribution is over all of them. The
    teacher has no mass there: under `uniform`, and under `remainder` where every token is kept, reverse-kl and akl are
    then infinite, unless the logits are cut to `vocab_size` first or are -inf there.

    Args:
        student_logits_TV: the student's logits.
        entry_ids_TK: token ids of the kept entries in rank order; -1 beyond a position's count.
        entry_logprobs_TK: log p of them; -inf beyond a position's count.
        entry_counts_T: how many entries each position keeps.
        log_remainder_T: log of the teacher's mass outside the entries.
        outside: what stands for the tokens outside.
        vocab_size: number of tokens, at most V.
    """
    logits_TV = _full_precision(student_logits_TV)
    num_logits = logits_TV.shape[1]
    if num_logits < vocab_size:
        raise ValueError(f"{num_logits} logits for a vocabulary of {vocab_size} tokens")
    entry_TK = torch.arange(entry_ids_TK.shape[1], device=entry_ids_TK.device) < entry_counts_T[:, None]
    teacher_TK = _full_precision(entry_logprobs_TK).to(logits_TV.dtype).masked_fill(~entry_TK, -math.inf)
    # with every token kept nothing stands outside, whatever rounding left in the remainder
    remainder_T = log_remainder_T.to(logits_TV.dtype).masked_fill(entry_counts_T >= vocab_size, -math.inf)
    if outside == "uniform":
        each_T = remainder_T - (vocab_size - entry_counts_T).clamp(min=1).to(logits_TV.dtype).log()
        # padded entries are written to one more column, which is cut off again
        wide_TV = logits_TV.new_full((len(logits_TV), num_logits + 1), -math.inf)
        wide_TV[:, :vocab_size] = each_T[:, None]
        wide_TV.scatter_(1, _column(entry_ids_TK, entry_TK, num_logits), teacher_TK)
        return _log_normalise(wide_TV[:, :num_logits]), _log_normalise(logits_TV)
    student_TK = logits_TV.gather(1, entry_ids_TK.masked_fill(~entry_TK, 0)).masked_fill(~entry_TK, -math.inf)
    if outside == "renormalise":
        return _log_normalise(teacher_TK), _log_normalise(student_TK)
    if outside == "remainder":
        rest_T = _log_sum_outside(logits_TV, entry_ids_TK, entry_TK)
        log_q_TN = torch.cat([student_TK, rest_T[:, None]], dim=1)
        return _log_normalise(torch.cat([teacher_TK, remainder_T[:, None]], dim=1)), _log_normalise(log_q_TN)
    raise ValueError(f"outside is {outside!r}, must be remainder, renormalise or uniform")


def divergence(
    name: Divergence,
    log_p_TN: Float[Tensor, "T N"],
    log_q_TN: Float[Tensor, "T N"],
    *,
    jsd_beta: float = 0.5,
    akl_mu: float = 0.5,
    skew_alpha: float = 0.1,
    last_is_remainder: bool = False,
) -> Float[Tensor, " T"]:
    """The divergence of that name. `last_is_remainder` says that `align` merged the tokens outside (see `akl`)."""
    if name == "forward-kl":
        return forward_kl(log_p_TN, log_q_TN)
    if name == "reverse-kl":
        return reverse_kl(log_p_TN, log_q_TN)
    if name == "jsd":
        return jsd(log_p_TN, log_q_TN, jsd_beta)
    if name == "tvd":
        return tvd(log_p_TN, log_q_TN)
    if name == "akl":
        return akl(log_p_TN, log_q_TN, akl_mu, last_is_remainder=last_is_remainder)
    if name == "skewed-forward-kl":
        return skewed_forward_kl(log_p_TN, log_q_TN, skew_alpha)
    if name == "skewed-reverse-kl":
        return skewed_reverse_kl(log_p_TN, log_q_TN, skew_alpha)
    raise ValueError(f"no divergence {name!r}")


def forward_kl(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """KL(p || q) = sum p (log p - log q)."""
    log_p_TN, log_q_TN = _full_precision(log_p_TN), _full_precision(log_q_TN)
    # not H(p, q) - H(p), which cancels where p and q are close
    return _expectation(log_p_TN, log_p_TN - log_q_TN)


def reverse_kl(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """KL(q || p) = sum q (log q - log p); infinite where the student has mass and the teacher has none."""
    return forward_kl(log_q_TN, log_p_TN)


def jsd(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"], beta: float = 0.5) -> Float[Tensor, " T"]:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649), 0 < beta < 1.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, must be between 0 and 1; forward_kl and reverse_kl are its scaled limits")
    log_m_TN = _log_mixture(log_p_TN, log_q_TN, beta)
    return beta * forward_kl(log_p_TN, log_m_TN) + (1 - beta) * forward_kl(log_q_TN, log_m_TN)


def tvd(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """Total variation distance: half the sum of |p - q|, between 0 and 1 (a probability, not nats)."""
    return _distance(log_p_TN, log_q_TN).sum(dim=1) / 2


def akl(
    log_p_TN: Float[Tensor, "T N"],
    log_q_TN: Float[Tensor, "T N"],
    mu: float = 0.5,
    *,
    last_is_remainder: bool = False,
) -> Float[Tensor, " T"]:
    """Adaptive KL (arXiv 2404.02657): forward and reverse KL, weighed by where p and q disagree.

    s_h/(s_h + s_t) KL(p || q) + s_t/(s_h + s_t) KL(q || p), with s = sum |p - q| over the head and the tail. The head
    is the likeliest teacher tokens as long as their cumulative probability is at most `mu`, the first one always.
    The weights are constants to the gradient. With equal p and q both weights are a half, of 0.

    With `last_is_remainder` the last outcome is the merged tokens outside: each of them is less likely than any that
    is kept, so it ranks last, however much mass it holds.
    """
    if not 0 < mu <= 1:
        raise ValueError(f"mu is {mu}, must be above 0 and at most 1")
    with torch.no_grad():
        gap_TN = _distance(log_p_TN, log_q_TN)
        head_TN = _head(log_p_TN, mu, last_is_remainder)
        head_T = torch.where(head_TN, gap_TN, 0).sum(dim=1)
        total_T = gap_TN.sum(dim=1)
        weight_T = torch.where(total_T > 0, head_T / total_T.clamp(min=torch.finfo(total_T.dtype).tiny), 0.5)
    return weight_T * forward_kl(log_p_TN, log_q_TN) + (1 - weight_T) * reverse_kl(log_p_TN, log_q_TN)


def skewed_forward_kl(
    log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"], alpha: float = 0.1
) -> Float[Tensor, " T"]:
    """KL(p || alpha p + (1 - alpha) q) of DistiLLM (arXiv 2402.03898), 0 <= alpha < 1; at most -log alpha."""
    return forward_kl(log_p_TN, _log_mixture(log_p_TN, log_q_TN, _skew(alpha)))


def skewed_reverse_kl(
    log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"], alpha: float = 0.1
) -> Float[Tensor, " T"]:
    """KL(q || alpha q + (1 - alpha) p) of DistiLLM (arXiv 2402.03898), 0 <= alpha < 1; at most -log alpha."""
    return forward_kl(log_q_TN, _log_mixture(log_q_TN, log_p_TN, _skew(alpha)))


def cross_entropy_to(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """H(p, q) = -sum p log q, the soft-label term of the KD baseline; KL(p || q) + H(p)."""
    return -_expectation(_full_precision(log_p_TN), _full_precision(log_q_TN))


def entropy(log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """H(q) = -sum q log q."""
    return cross_entropy_to(log_q_TN, log_q_TN)


def _full_precision(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _expectation(log_p_TN: Tensor, values_TN: Tensor) -> Tensor:
    """Sum of p times `values_TN`, which may be anything where p is 0."""
    p_TN = log_p_TN.exp()
    # 0 x -inf is NaN, in the value and in the gradient; p may also underflow to 0
    return (p_TN * torch.where(p_TN > 0, values_TN, 0)).sum(dim=1)


def _log_normalise(logs_TN: Tensor) -> Tensor:
    """Log-softmax; a row without any mass stays -inf, without gradient."""
    empty_T1 = torch.isneginf(logs_TN).all(dim=1, keepdim=True)
    return torch.log_softmax(logs_TN.masked_fill(empty_T1, 0), dim=1).masked_fill(empty_T1, -math.inf)


def _column(entry_ids_TK: Tensor, entry_TK: Tensor, beyond: int) -> Tensor:
    return entry_ids_TK.masked_fill(~entry_TK, beyond)


def _log_sum_outside(logits_TV: Tensor, entry_ids_TK: Tensor, entry_TK: Tensor) -> Tensor:
    """Log of the summed exp of the logits outside the entries: stable where 1 - sum q would cancel."""
    num_logits = logits_TV.shape[1]
    kept_TV = torch.zeros(len(logits_TV), num_logits + 1, dtype=torch.bool, device=logits_TV.device)
    kept_TV.scatter_(1, _column(entry_ids_TK, entry_TK, num_logits), True)
    rest_TV = logits_TV.masked_fill(kept_TV[:, :num_logits], -math.inf)
    empty_T1 = torch.isneginf(rest_TV).all(dim=1, keepdim=True)
    # the gradient of a log-sum over nothing is NaN
    rest_T = torch.logsumexp(rest_TV.masked_fill(empty_T1, 0), dim=1)
    return rest_T.masked_fill(empty_T1[:, 0], -math.inf)


def _log_mixture(log_a_TN: Tensor, log_b_TN: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b); -inf without gradient where neither has mass."""
    first_TN = _full_precision(log_a_TN) + (math.log(share) if share else -math.inf)
    second_TN = _full_precision(log_b_TN) + math.log1p(-share)
    nothing_TN = torch.isneginf(first_TN) & torch.isneginf(second_TN)
    mixture_TN = torch.logaddexp(first_TN.masked_fill(nothing_TN, 0), second_TN.masked_fill(nothing_TN, 0))
    return mixture_TN.masked_fill(nothing_TN, -math.inf)


def _distance(log_p_TN: Tensor, log_q_TN: Tensor) -> Tensor:
    return (_full_precision(log_p_TN).exp() - _full_precision(log_q_TN).exp()).abs()


def _head(log_p_TN: Tensor, mu: float, last_is_remainder: bool) -> Bool[Tensor, "T N"]:
    p_TN = _full_precision(log_p_TN).exp()
    rank_by_TN = p_TN
    if last_is_remainder:
        rank_by_TN = torch.cat([p_TN[:, :-1], torch.full_like(p_TN[:, -1:], -1)], dim=1)
    order_TN = rank_by_TN.argsort(dim=1, descending=True, stable=True)
    inside_TN = p_TN.gather(1, order_TN).cumsum(dim=1) <= mu
    inside_TN[:, :1] = True
    return torch.zeros_like(inside_TN).scatter(1, order_TN, inside_TN)


def _skew(alpha: float) -> float:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}, must be from 0 to below 1")
    return alpha
