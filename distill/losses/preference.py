"""Preference losses: DPKD (arXiv 2406.19774v2) and the forms that its Table 2 and its released code compare it with.

Unreduced and in float32. Shapes: B pairs, T positions. Log-probabilities are natural logs, so a loss is in nats, except
ipo, which is in nats squared; p is the teacher, q the student; y_t is the chosen response (or token), y_s the rejected
one. |y| counts tokens, EOS included. Like `divergence`, this module does not import torch until a loss is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpkd.core.lazy import LazyModule
from dpkd.distill.losses.cached_distributions import full_precision
from dpkd.distill.losses.divergence import log_mixture

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor
    from torch.nn import functional
else:
    torch = LazyModule("torch")
    functional = LazyModule("torch.nn.functional")

#: pairs of one piece of `all_pairs_preference_loss`, which takes 16 bytes a pair while it runs: 130 MB. But a piece has
#: at least one position: more than 2,896 outcomes take more, 270 MB with the 4,096 tokens that training allows
_PAIRS_AT_ONCE = 2**23
#: on a CPU a piece fits into its cache: 10 ms instead of 25 for 512 positions with K = 64
_PAIRS_AT_ONCE_ON_CPU = 2**18

#: each form, and the levels that it is defined at: the forms of the released code have a token level
PREFERENCES: dict[str, tuple[str, ...]] = {
    "dpkd": ("token", "sequence"),
    "ipo": ("token", "sequence"),
    "cpo": ("sequence",),
    "simpo": ("sequence",),
    "dpop": ("token", "sequence"),
    "reference-free": ("token", "sequence"),
}


@dataclass(frozen=True)
class PreferenceOptions:
    """Constants of the preference forms; each form reads those that its formula names.

    Attributes:
        beta: scale of the reward, above 0; ipo's tau.
        gamma: simpo's target margin, in units of the scaled reward, 0 or more.
        dpop_lambda: weight of dpop's penalty, 0 or more.
        label_smoothing: share eps of preferences that are reversed, from 0 to 0.5. At 0.5 (balanced) the loss is
            log 2cosh(beta d/2) of the margin d: its minimum is a margin of 0, the teacher, for any pairs.
        teacher_floor: sequence level: a rejected response is pushed down only while q(y_s) > p(y_s).
        length_normalize: sequence level: log-probabilities are divided by |y| (Eq. 9) or not (Eq. 8).
    """

    beta: float = 0.1
    gamma: float = 0.0
    dpop_lambda: float = 50.0
    label_smoothing: float = 0.0
    length_normalize: bool = True
    teacher_floor: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}, must be above 0 and finite")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}, must be 0 or more and finite")
        if not 0 <= self.dpop_lambda < math.inf:
            raise ValueError(f"dpop_lambda is {self.dpop_lambda}, must be 0 or more and finite")
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, must be from 0 to 0.5")


def sequence_preference_loss(
    form: str,
    student_chosen_B: Float[Tensor, " B"],
    student_rejected_B: Float[Tensor, " B"],
    teacher_chosen_B: Float[Tensor, " B"],
    teacher_rejected_B: Float[Tensor, " B"],
    num_chosen_B: Int[Tensor, " B"],
    num_rejected_B: Int[Tensor, " B"],
    *,
    options: PreferenceOptions,
    offset_B: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """The preference loss of each pair of responses.

    With q and p the summed log-probabilities, each divided by its |y| where `length_normalize` (the default), and
    S(d) = -(1 - eps) log sigma(d) - eps log sigma(-d):

    - dpkd: S(beta log q(y_t)/p(y_t) - beta log q(y_s)/p(y_s)), Eq. 9 (Eq. 8 without `length_normalize`);
    - ipo: (log q(y_t)/p(y_t) - log q(y_s)/p(y_s) - 1/(2 beta))^2;
    - cpo: S(beta log q(y_t) - beta log q(y_s)) - log q(y_t); the teacher is not read;
    - simpo: S(beta/|y_t| log q(y_t) - beta/|y_s| log q(y_s) - gamma), always divided by |y|; the teacher is not read;
    - dpop: dpkd's + lambda max(0, log p(y_t) - log q(y_t)), the penalty outside the logistic as in the released code;
    - reference-free: dpkd's with teacher terms of 0.

    The paper compares ipo and cpo without division by |y| (Table 2): that is `length_normalize=False`. By default they
    are divided, the likelihood term of cpo included, so that the forms differ in one thing at a time.

    `offset_B` is added to dpkd's margin. With log p(y_t)/q0(y_t) - log p(y_s)/q0(y_s), not divided by |y|, where y_t is
    drawn from the teacher p and y_s from q0, q = p is the only minimum: that offset is the log odds of a pair being
    this way round, so the reward has nothing left to explain (# differs from the paper: there is none).
    Log-probabilities are summed over a response's tokens (nats); `num_*_B` are |y|.
    """
    _check(form, "sequence", options)
    beta, normalize = options.beta, options.length_normalize or form == "simpo"
    if form in ("cpo", "simpo", "reference-free"):
        teacher_chosen_B, teacher_rejected_B = torch.zeros_like(teacher_chosen_B), torch.zeros_like(teacher_rejected_B)
    scale = 1.0 if form == "ipo" else beta  # the squared form scales its target by 1/(2 beta), not the ratios
    chosen_B = implicit_reward(student_chosen_B, teacher_chosen_B, num_chosen_B, scale, normalize)
    rejected_B = implicit_reward(student_rejected_B, teacher_rejected_B, num_rejected_B, scale, normalize)
    if form == "ipo":
        return (chosen_B - rejected_B - 1 / (2 * beta)) ** 2
    if options.teacher_floor:
        rejected_B = rejected_B.clamp(min=0)
    margin_B = chosen_B - rejected_B
    if offset_B is not None:
        margin_B = margin_B + offset_B
    if form == "simpo":
        return _logistic(margin_B - options.gamma, options)
    loss_B = _logistic(margin_B, options)
    if form == "cpo":
        return loss_B - chosen_B / beta
    if form == "dpop":
        return loss_B + options.dpop_lambda * functional.relu(-chosen_B / beta)
    return loss_B


def token_preference_loss(
    form: str,
    student_chosen_T: Float[Tensor, " T"],
    student_rejected_T: Float[Tensor, " T"],
    teacher_chosen_T: Float[Tensor, " T"],
    teacher_rejected_T: Float[Tensor, " T"],
    *,
    options: PreferenceOptions,
) -> Float[Tensor, " T"]:
    """The released code's loss of each position, on single tokens y_t and y_s.

    With Delta = [log q(y_t) - log q(y_s)] - [log p(y_t) - log p(y_s)] and
    S(d) = -(1 - eps) log sigma(d) - eps log sigma(-d):

    - dpkd: S(beta Delta); the code takes both arg-maxes, then Delta is never positive, and 0 without gradient where
      they agree;
    - ipo: (Delta - 1/(2 beta))^2;
    - reference-free: S(beta Delta) with teacher terms of 0;
    - dpop: S(beta Delta) + lambda max(0, log p(y_t) - log q(y_t)).

    A token has no length: `length_normalize` is not read. Other forms are defined on whole responses and are refused.
    """
    _check(form, "token", options)
    chosen_T, rejected_T = student_chosen_T.float(), student_rejected_T.float()
    delta_T = chosen_T - rejected_T
    if form != "reference-free":
        delta_T = delta_T - (teacher_chosen_T.float() - teacher_rejected_T.float())
    if form == "ipo":
        return (delta_T - 1 / (2 * options.beta)) ** 2
    loss_T = _logistic(options.beta * delta_T, options)
    if form == "dpop":
        return loss_T + options.dpop_lambda * functional.relu(teacher_chosen_T.float() - chosen_T)
    return loss_T


def all_pairs_preference_loss(
    log_p_TN: Float[Tensor, "T N"],
    log_q_TN: Float[Tensor, "T N"],
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    skew: float = 0.0,
) -> Float[Tensor, " T"]:
    """DPKD at one position in expectation over all pairs of outcomes, in closed form (nats).

    sum_ij p_i q_j S(beta (r_i - r_j)) with r = log q/p and S as in `sequence_preference_loss`: the expected loss of y_t
    drawn from the teacher and y_s drawn from the student, differentiated through r and through q_j. It is log 2 plus
    the f-divergence of q(x)p from p(x)q with f(t) = log((1 + t^-beta)/2), so q = p is its only minimum for every beta.
    Merging outcomes never raises it. With `skew` a, the mixture a p + (1 - a) q takes the place of q, as in DistiLLM's
    skewed KL (arXiv 2402.03898): it equals p only where q does.

    # differs from the paper: the paper and its code compare one drawn or arg-max pair (docs/decisions/0018)

    Both sides are normalised, and -inf for an outcome that does not exist; log q is differentiable.
    """
    if skew:
        log_q_TN = log_mixture(log_p_TN, log_q_TN, skew)
    at_once = _PAIRS_AT_ONCE_ON_CPU if log_p_TN.device.type == "cpu" else _PAIRS_AT_ONCE
    pieces = max(1, at_once // log_p_TN.shape[1] ** 2)
    parts = [
        _all_pairs(log_p, log_q, beta, label_smoothing)
        for log_p, log_q in zip(log_p_TN.split(pieces), log_q_TN.split(pieces), strict=True)
    ]
    return torch.cat(parts) if parts else log_q_TN.new_zeros(0)


def _all_pairs(log_p_TN: Tensor, log_q_TN: Tensor, beta: float, eps: float) -> Tensor:
    """The loss with its exact gradient, of which only [T, N] is kept for the backward pass."""
    log_p_TN, log_q_TN = full_precision(log_p_TN), full_precision(log_q_TN)
    exists_TN = ~(torch.isneginf(log_p_TN) | torch.isneginf(log_q_TN))
    with torch.no_grad():
        p_TN, q_TN = log_p_TN.exp(), log_q_TN.exp()
        r_TN = torch.where(exists_TN, log_q_TN - log_p_TN, 0)
        behind_TNN = beta * (r_TN[:, None, :] - r_TN[:, :, None])  # [t, i, j]: by how much i is behind j
        loss_TNN = functional.softplus(behind_TNN) - eps * behind_TNN
        slope_TNN = beta * (torch.sigmoid(behind_TNN) - eps)
        by_rejected_TN = torch.einsum("ti,tij->tj", p_TN, loss_TNN)
        value_T = (by_rejected_TN * q_TN).sum(dim=1)
        pushed_down_TN = q_TN * torch.einsum("ti,tij->tj", p_TN, slope_TNN)
        pushed_up_TN = p_TN * torch.einsum("tij,tj->ti", slope_TNN, q_TN)
        gradient_TN = torch.where(exists_TN, q_TN * by_rejected_TN + pushed_down_TN - pushed_up_TN, 0)
    own_TN = torch.where(exists_TN, log_q_TN, 0)
    return value_T + (gradient_TN * (own_TN - own_TN.detach())).sum(dim=1)


def implicit_reward(
    student_B: Float[Tensor, " B"],
    teacher_B: Float[Tensor, " B"],
    num_tokens_B: Int[Tensor, " B"],
    beta: float,
    length_normalize: bool = True,
) -> Float[Tensor, " B"]:
    """r = beta log q/p (Eq. 29), divided by the number of tokens as in Eq. 9 when `length_normalize`."""
    ratio_B = student_B.float() - teacher_B.float()
    if length_normalize:
        if bool((num_tokens_B <= 0).any()):
            raise ValueError("a response without tokens has no length-normalised reward")
        ratio_B = ratio_B / num_tokens_B
    return beta * ratio_B


def sum_by_row(values_T: Float[Tensor, " T"], row_T: Int[Tensor, " T"], num_rows: int) -> Float[Tensor, " B"]:
    """Sum of each row's positions; a row without positions sums to 0."""
    return torch.zeros(num_rows, dtype=values_T.dtype, device=values_T.device).index_add(0, row_T, values_T)


def _check(form: str, level: str, options: PreferenceOptions) -> None:
    if level not in PREFERENCES.get(form, ()):
        defined = [name for name, levels in PREFERENCES.items() if level in levels]
        raise ValueError(f"no preference form {form!r} at the {level} level, only {', '.join(defined)}")
    if form == "ipo" and options.label_smoothing > 0:
        raise ValueError(f"label_smoothing is {options.label_smoothing}: ipo is a square, with no label to smooth")


def _logistic(margin: Tensor, options: PreferenceOptions) -> Tensor:
    """-(1 - eps) log sigma(d) - eps log sigma(-d)."""
    loss = -(1 - options.label_smoothing) * functional.logsigmoid(margin)
    if options.label_smoothing:
        loss = loss - options.label_smoothing * functional.logsigmoid(-margin)
    return loss
