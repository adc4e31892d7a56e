"""The teacher's cached distributions: the student's beside them on the same outcomes, and log p of a single token.

Shapes: T positions, V logits, K kept entries, N outcomes. Natural logs; p is the teacher, q the student.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from dpkd.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
else:
    torch = LazyModule("torch")

#: what stands for the tokens outside the kept entries; see `align`
Tail = Literal["bucket", "renormalise", "uniform"]


def align(
    student_logits_TV: Float[Tensor, "T V"],
    entry_ids_TK: Int[Tensor, "T K"],
    entry_logprobs_TK: Float[Tensor, "T K"],
    entry_counts_T: Int[Tensor, " T"],
    log_tail_T: Float[Tensor, " T"],
    tail: Tail,
    *,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "T N"], Float[Tensor, "T N"]]:
    """Teacher and student as log-distributions over the same N outcomes; the student's is differentiable.

    Each sums to 1 (the teacher's is normalised, which takes out the rounding of its stored logs). Outcomes:

    - bucket: the K entries, in their order, and last the tail, all other tokens as one outcome, N = K + 1. Merging
      outcomes never raises an f-divergence, so KL, JSD and TVD are lower bounds of the full one, tight at K = V.
    - renormalise: the K entries alone, both sides normalised over them, N = K. Blind to the student's tail mass.
      A position without entries has no outcome: it is -inf on both sides, and every divergence of it is 0.
    - uniform: the V logits, the teacher's tail mass spread evenly over the vocab_size - count other tokens, N = V.

    `temperature` softens or sharpens both sides among the kept entries, given that one of them is drawn:
    p_i^(1/temperature), normalised to the mass that they have at temperature 1. Exact, because the cache has all that
    it takes. The tail keeps its mass: what it would be at another temperature depends on tokens that the cache does
    not have. With every token kept these are the two distributions at that temperature. Not with uniform.

    Logits may be wider than `vocab_size` (a padded vocabulary). The student's distribution is over all of them. The
    teacher has no mass there: under `uniform`, and under `bucket` where every token is kept, reverse-kl and akl are
    then infinite, unless the logits are cut to `vocab_size` first or are -inf there.

    Entries are in rank order; beyond a position's count their ids are -1 and their logs -inf. `log_tail_T` is the log
    of the teacher's mass outside them.
    """
    logits_TV = full_precision(student_logits_TV)
    num_logits = logits_TV.shape[1]
    if num_logits < vocab_size:
        raise ValueError(f"{num_logits} logits for a vocabulary of {vocab_size} tokens")
    entry_TK = torch.arange(entry_ids_TK.shape[1], device=entry_ids_TK.device) < entry_counts_T[:, None]
    teacher_TK = full_precision(entry_logprobs_TK).to(logits_TV.dtype).masked_fill(~entry_TK, -math.inf)
    # with every token kept there is no tail, whatever mass rounding left in it
    log_rest_T = log_tail_T.to(logits_TV.dtype).masked_fill(entry_counts_T >= vocab_size, -math.inf)
    if tail == "uniform":
        if temperature != 1:
            raise ValueError(f"temperature is {temperature}, must be 1 with tail uniform")
        each_T = log_rest_T - (vocab_size - entry_counts_T).clamp(min=1).to(logits_TV.dtype).log()
        # padded entries are written to one more column, which is cut off again
        wide_TV = logits_TV.new_full((len(logits_TV), num_logits + 1), -math.inf)
        wide_TV[:, :vocab_size] = each_T[:, None]
        wide_TV.scatter_(1, entry_ids_TK.masked_fill(~entry_TK, num_logits), teacher_TK)
        return _log_normalise(wide_TV[:, :num_logits]), _log_normalise(logits_TV)
    student_TK = logits_TV.gather(1, entry_ids_TK.masked_fill(~entry_TK, 0)).masked_fill(~entry_TK, -math.inf)
    if temperature != 1:
        teacher_TK, student_TK = (_at_temperature(logs_TK, temperature) for logs_TK in (teacher_TK, student_TK))
    if tail == "renormalise":
        return _log_normalise(teacher_TK), _log_normalise(student_TK)
    if tail == "bucket":
        rest_T = _student_log_tail(logits_TV, entry_ids_TK, entry_TK)
        log_q_TN = torch.cat([student_TK, rest_T[:, None]], dim=1)
        return _log_normalise(torch.cat([teacher_TK, log_rest_T[:, None]], dim=1)), _log_normalise(log_q_TN)
    raise ValueError(f"tail is {tail!r}, must be bucket, renormalise or uniform")


def cached_logprobs(
    token_T: Int[Tensor, " T"],
    entry_ids_TK: Int[Tensor, "T K"],
    entry_logprobs_TK: Float[Tensor, "T K"],
    entry_counts_T: Int[Tensor, " T"],
    log_tail_T: Float[Tensor, " T"],
    vocab_size: int,
) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
    """log p of one token a position (nats), and whether it stands outside the kept entries (a miss).

    A hit is the cached entry. A miss gets an even share of the tail mass: log tail mass - log(V - count). Entries
    beyond a position's count have the id -1, which no token has.
    """
    match_TK = entry_ids_TK == token_T[:, None]
    miss_T = ~match_TK.any(dim=1)
    hit_T = torch.where(match_TK, entry_logprobs_TK, torch.zeros_like(entry_logprobs_TK)).sum(dim=1)
    outside_T = (vocab_size - entry_counts_T).clamp(min=1).to(log_tail_T.dtype)
    return torch.where(miss_T, log_tail_T - outside_T.log(), hit_T), miss_T


def full_precision(values: Tensor) -> Tensor:
    """Float64 as it is, everything else as float32."""
    return values if values.dtype == torch.float64 else values.float()


def _at_temperature(logs_TK: Tensor, temperature: float) -> Tensor:
    """Entries at another temperature with the sum that they had."""
    has_any_T1 = ~torch.isneginf(logs_TK).all(dim=1, keepdim=True)
    sums_T1 = torch.logsumexp(torch.where(has_any_T1, logs_TK, 0), dim=1, keepdim=True)
    return torch.where(has_any_T1, sums_T1 + _log_normalise(logs_TK / temperature), logs_TK)


def _log_normalise(logs_TN: Tensor) -> Tensor:
    """Log-softmax; a row without any mass stays -inf, without gradient."""
    empty_T1 = torch.isneginf(logs_TN).all(dim=1, keepdim=True)
    return torch.log_softmax(logs_TN.masked_fill(empty_T1, 0), dim=1).masked_fill(empty_T1, -math.inf)


def _student_log_tail(logits_TV: Tensor, entry_ids_TK: Tensor, entry_TK: Tensor) -> Tensor:
    """Log of the summed exp of the logits outside the entries: stable where 1 - sum q would cancel."""
    first_T1 = entry_ids_TK[:, :1].clamp(min=0)
    rest_TV = logits_TV.scatter(1, torch.where(entry_TK, entry_ids_TK, first_T1), -math.inf)
    if not bool(entry_TK[:, :1].all()):  # a position without entries: all of it is tail
        rest_TV = torch.where(entry_TK[:, :1], rest_TV, logits_TV)
    empty_T1 = torch.isneginf(rest_TV.detach().amax(dim=1, keepdim=True))
    if bool(empty_T1.any()):  # the gradient of a log-sum over nothing is NaN
        return torch.logsumexp(rest_TV.masked_fill(empty_T1, 0), dim=1).masked_fill(empty_T1[:, 0], -math.inf)
    return torch.logsumexp(rest_TV, dim=1)
