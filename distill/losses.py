"""Preference losses of DPKD, unreduced and in float32 (arXiv 2406.19774v2).

Shapes: B pairs, T positions. Log-probabilities are natural logs; p is the teacher, q the student.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def dpkd_sequence_loss(
    student_chosen_B: Float[Tensor, " B"],
    student_rejected_B: Float[Tensor, " B"],
    teacher_chosen_B: Float[Tensor, " B"],
    teacher_rejected_B: Float[Tensor, " B"],
    num_chosen_B: Int[Tensor, " B"],
    num_rejected_B: Int[Tensor, " B"],
    *,
    beta: float,
    length_normalize: bool = True,
) -> Float[Tensor, " B"]:
    """Eq. 9 (Eq. 8 without `length_normalize`): -log sigma(r(y_t) - r(y_s)) of each pair.

    Args:
        student_chosen_B: log q(y_t | x), summed over the response's tokens (nats).
        student_rejected_B: log q(y_s | x).
        teacher_chosen_B: log p(y_t | x).
        teacher_rejected_B: log p(y_s | x).
        num_chosen_B: |y_t| in tokens, EOS counted.
        num_rejected_B: |y_s| in tokens, EOS counted.
    """
    chosen_B = implicit_reward(student_chosen_B, teacher_chosen_B, num_chosen_B, beta, length_normalize)
    rejected_B = implicit_reward(student_rejected_B, teacher_rejected_B, num_rejected_B, beta, length_normalize)
    return -functional.logsigmoid(chosen_B - rejected_B)


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


def dpkd_token_loss(
    student_chosen_T: Float[Tensor, " T"],
    student_rejected_T: Float[Tensor, " T"],
    teacher_chosen_T: Float[Tensor, " T"],
    teacher_rejected_T: Float[Tensor, " T"],
    *,
    beta: float,
) -> Float[Tensor, " T"]:
    """The released code's loss: -log sigma(beta Delta) of each position.

    Delta = [log q(y_t) - log q(y_s)] - [log p(y_t) - log p(y_s)] with y_t and y_s single tokens (the code takes both
    arg-maxes; Delta is then never positive, and 0 without gradient where they agree).
    """
    delta_T = (student_chosen_T.float() - student_rejected_T.float()) - (
        teacher_chosen_T.float() - teacher_rejected_T.float()
    )
    return -functional.logsigmoid(beta * delta_T)


def cross_entropy(student_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """-log q of each response token (nats)."""
    return -student_T.float()


def sum_by_row(values_T: Float[Tensor, " T"], row_T: Int[Tensor, " T"], num_rows: int) -> Float[Tensor, " B"]:
    """Sum of each row's positions; a row without positions sums to 0."""
    return torch.zeros(num_rows, dtype=values_T.dtype, device=values_T.device).index_add(0, row_T, values_T)
