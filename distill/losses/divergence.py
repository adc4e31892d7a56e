"""Divergences between the teacher's and the student's distribution at each position, unreduced, in nats.

Shapes: T positions, N outcomes. p is the teacher, q the student, both as natural logs over the same N outcomes
(`cached_distributions.align` makes them). Computed in float32; float64 stays float64. An outcome where both sides are
-inf does not exist: it adds 0 to every value and to every gradient.

A new divergence is a function here and its row in `DIVERGENCES`: the command line, the terms and the tests read that
table. They read it without torch, which is imported when the first function is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from dpkd.core.lazy import LazyModule
from dpkd.distill.losses.cached_distributions import Tail, full_precision

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float
    from torch import Tensor
else:
    torch = LazyModule("torch")


_LOG_OF_ZERO = -1e4  # its powers are 0 in every float type


def forward_kl(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """KL(p || q) = sum p (log p - log q)."""
    log_p_TN, log_q_TN = full_precision(log_p_TN), full_precision(log_q_TN)
    # not H(p, q) - H(p), which cancels where p and q are close
    return _expectation(log_p_TN, log_p_TN - log_q_TN)


def reverse_kl(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """KL(q || p) = sum q (log q - log p); infinite where the student has mass and the teacher has none."""
    return forward_kl(log_q_TN, log_p_TN)


def jeffreys(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """KL(p || q) + KL(q || p); infinite where only one side has mass."""
    return forward_kl(log_p_TN, log_q_TN) + reverse_kl(log_p_TN, log_q_TN)


def alpha_beta(
    log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"], alpha: float = 0.2, beta: float = 0.7
) -> Float[Tensor, " T"]:
    """The alpha-beta divergence of ABKD (arXiv 2505.04560, Eq. 6), alpha and beta above 0.

    -1/(alpha beta) sum [p^alpha q^beta - alpha/(alpha + beta) p^(alpha + beta) - beta/(alpha + beta) q^(alpha + beta)].
    For alpha + beta other than 1 it is no f-divergence: with a merged tail it is no bound of the full one.
    """
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha is {alpha} and beta {beta}, both must be above 0")
    log_p_TN, log_q_TN = full_precision(log_p_TN), full_precision(log_q_TN)
    total = alpha + beta
    # -inf logs are powers of 0, which add nothing, but their gradient would be NaN
    log_p_TN, log_q_TN = (logs.masked_fill(torch.isneginf(logs), _LOG_OF_ZERO) for logs in (log_p_TN, log_q_TN))
    cross_TN = (alpha * log_p_TN + beta * log_q_TN).exp()
    own_TN = (alpha * (total * log_p_TN).exp() + beta * (total * log_q_TN).exp()) / total
    # where p and q are close, their difference is all rounding: it is taken before the exponential
    gap_TN = log_p_TN - log_q_TN
    is_close_TN = gap_TN.abs() < 1
    gap_TN = torch.where(is_close_TN, gap_TN, 0)
    close_TN = cross_TN * (alpha * torch.expm1(beta * gap_TN) + beta * torch.expm1(-alpha * gap_TN)) / total
    return torch.where(is_close_TN, close_TN, own_TN - cross_TN).sum(dim=1) / (alpha * beta)


def jsd(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"], beta: float = 0.5) -> Float[Tensor, " T"]:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649), 0 < beta < 1.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, must be between 0 and 1; forward_kl and reverse_kl are its scaled limits")
    log_m_TN = log_mixture(log_p_TN, log_q_TN, beta)
    return beta * forward_kl(log_p_TN, log_m_TN) + (1 - beta) * forward_kl(log_q_TN, log_m_TN)


def tvd(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """Total variation distance: half the sum of |p - q|, between 0 and 1 (a probability, not nats)."""
    return _distance(log_p_TN, log_q_TN).sum(dim=1) / 2


def akl(
    log_p_TN: Float[Tensor, "T N"],
    log_q_TN: Float[Tensor, "T N"],
    mu: float = 0.5,
    *,
    tail: Tail = "uniform",
) -> Float[Tensor, " T"]:
    """Adaptive KL (arXiv 2404.02657): forward and reverse KL, weighed by where p and q disagree.

    s_h/(s_h + s_t) KL(p || q) + s_t/(s_h + s_t) KL(q || p), with s = sum |p - q| over the head and the tail. The head
    is the likeliest teacher tokens as long as their cumulative probability is at most `mu`, the first one always.
    The weights are constants to the gradient. With equal p and q both weights are a half, of 0.

    `tail` says how `align` made the outcomes. Under bucket the last one is the merged tail: each token in it is less
    likely than any kept one, so it ranks last, however much mass it holds.
    """
    if not 0 < mu <= 1:
        raise ValueError(f"mu is {mu}, must be above 0 and at most 1")
    with torch.no_grad():
        gap_TN = _distance(log_p_TN, log_q_TN)
        head_TN = _head(log_p_TN, mu, last_is_tail=tail == "bucket")
        head_T = torch.where(head_TN, gap_TN, 0).sum(dim=1)
        total_T = gap_TN.sum(dim=1)
        weight_T = torch.where(total_T > 0, head_T / total_T.clamp(min=torch.finfo(total_T.dtype).tiny), 0.5)
    return weight_T * forward_kl(log_p_TN, log_q_TN) + (1 - weight_T) * reverse_kl(log_p_TN, log_q_TN)


def skewed_forward_kl(
    log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"], alpha: float | Float[Tensor, " T"] = 0.1
) -> Float[Tensor, " T"]:
    """KL(p || alpha p + (1 - alpha) q) of DistiLLM (arXiv 2402.03898), 0 <= alpha < 1; at most -log alpha."""
    return forward_kl(log_p_TN, log_mixture(log_p_TN, log_q_TN, _skew(alpha)))


def skewed_reverse_kl(
    log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"], alpha: float | Float[Tensor, " T"] = 0.1
) -> Float[Tensor, " T"]:
    """KL(q || alpha q + (1 - alpha) p) of DistiLLM (arXiv 2402.03898), 0 <= alpha < 1; at most -log alpha."""
    return forward_kl(log_q_TN, log_mixture(log_q_TN, log_p_TN, _skew(alpha)))


def skew_by_gap(gap_B: Float[Tensor, " B"], anchor: float, alpha: float) -> Float[Tensor, " B"]:
    """DistiLLM-2's skew of each response (arXiv 2503.07067, section 3.3): alpha where the gap is `anchor` or more.

    To first order log p - log(a p + (1 - a) q) is (1 - a)(p - q). The skew keeps this at (1 - alpha) anchor: it is
    1 - (1 - alpha) anchor / (gap + 1e-5), from 0.01 to alpha, so a response that is already learned has the smaller
    skew. `gap_B` is the difference of the two models' geometric mean probabilities of a response's tokens, p - q for
    the teacher's responses and q - p for the student's. Bounds and constants are those of the authors' code,
    where a gap below 0 has alpha too.
    """
    return (1 - (1 - alpha) * anchor / (gap_B + 1e-5)).clamp(min=min(0.01, alpha), max=alpha)


def cross_entropy_to(log_p_TN: Float[Tensor, "T N"], log_q_TN: Float[Tensor, "T N"]) -> Float[Tensor, " T"]:
    """H(p, q) = -sum p log q, the soft-label term of the KD baseline; KL(p || q) + H(p)."""
    return -_expectation(full_precision(log_p_TN), full_precision(log_q_TN))


def _expectation(log_p_TN: Tensor, values_TN: Tensor) -> Tensor:
    """Sum of p times `values_TN`, which may be anything where p is 0."""
    p_TN = log_p_TN.exp()
    # 0 x -inf is NaN, in the value and in the gradient; p may also underflow to 0
    return (p_TN * torch.where(p_TN > 0, values_TN, 0)).sum(dim=1)


def log_mixture(log_a_TN: Tensor, log_b_TN: Tensor, share: float | Tensor) -> Tensor:
    """log(share a + (1 - share) b), the share one number or one a row; -inf without gradient where neither has mass."""
    log_a_TN, log_b_TN = full_precision(log_a_TN), full_precision(log_b_TN)
    share_T = torch.as_tensor(share, dtype=log_a_TN.dtype, device=log_a_TN.device)
    first_TN = log_a_TN + share_T.log()[..., None]
    second_TN = log_b_TN + torch.log1p(-share_T)[..., None]
    nothing_TN = torch.isneginf(first_TN) & torch.isneginf(second_TN)
    mixture_TN = torch.logaddexp(first_TN.masked_fill(nothing_TN, 0), second_TN.masked_fill(nothing_TN, 0))
    return mixture_TN.masked_fill(nothing_TN, -math.inf)


def _distance(log_p_TN: Tensor, log_q_TN: Tensor) -> Tensor:
    return (full_precision(log_p_TN).exp() - full_precision(log_q_TN).exp()).abs()


def _head(log_p_TN: Tensor, mu: float, *, last_is_tail: bool) -> Bool[Tensor, "T N"]:
    p_TN = full_precision(log_p_TN).exp()
    rank_by_TN = p_TN
    if last_is_tail:
        rank_by_TN = torch.cat([p_TN[:, :-1], torch.full_like(p_TN[:, -1:], -1)], dim=1)
    order_TN = rank_by_TN.argsort(dim=1, descending=True, stable=True)
    inside_TN = p_TN.gather(1, order_TN).cumsum(dim=1) <= mu
    inside_TN[:, :1] = True
    return torch.zeros_like(inside_TN).scatter(1, order_TN, inside_TN)


def _skew(alpha: float | Tensor) -> float | Tensor:
    if isinstance(alpha, (int, float)) and not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}, must be from 0 to below 1")
    return alpha


@dataclass(frozen=True)
class DivergenceFunction:
    """A divergence as an objective: its function, and the options of `dpkd train` that it takes, by keyword."""

    function: Callable[..., Tensor]
    options: Mapping[str, str] = field(default_factory=dict)

    def bind(self, config: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The function of (log_p_TN, log_q_TN) with the values that `config` has for its options."""
        return partial(self.function, **{keyword: getattr(config, name) for keyword, name in self.options.items()})


DIVERGENCES: dict[str, DivergenceFunction] = {
    "forward-kl": DivergenceFunction(forward_kl),
    "reverse-kl": DivergenceFunction(reverse_kl),
    "jeffreys": DivergenceFunction(jeffreys),
    "alpha-beta": DivergenceFunction(alpha_beta, {"alpha": "ab_alpha", "beta": "ab_beta"}),
    "jsd": DivergenceFunction(jsd, {"beta": "jsd_beta"}),
    "tvd": DivergenceFunction(tvd),
    "akl": DivergenceFunction(akl, {"mu": "akl_mu", "tail": "tail"}),
    "skewed-forward-kl": DivergenceFunction(skewed_forward_kl, {"alpha": "skew"}),
    "skewed-reverse-kl": DivergenceFunction(skewed_reverse_kl, {"alpha": "skew"}),
}
