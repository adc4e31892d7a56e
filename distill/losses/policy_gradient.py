"""MiniLLM's policy gradient of the reverse KL (arXiv 2306.08543), unreduced and in float32.

Shapes: T response positions of B rows, row after row in the order of their tokens. Log-probabilities are natural logs;
p is the teacher, q the student, and the student sampled the tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence


def minillm_loss(
    student_T: Float[Tensor, " T"],
    teacher_T: Float[Tensor, " T"],
    sampling_T: Float[Tensor, " T"],
    num_tokens_B: Int[Tensor, " B"],
    single_step_T: Float[Tensor, " T"],
    *,
    clip: float = 0.2,
    length_normalize: bool = True,
) -> Float[Tensor, " T"]:
    """Each position's part of the loss whose gradient is that of KL(q || p) over whole responses (nats).

    Two parts (section 2.2 of the source): -min(rho R, clip(rho) R) for what a token does to the rewards after it, and
    `single_step_T` for its own reward, whose expectation over the vocabulary is known exactly. R is `returns` of
    r = log p - log q, constant to the gradient. rho = q/q0 is how much likelier the token is now than when it was
    drawn, and clip(rho) keeps it from 1 - `clip` to 1 + `clip` as in PPO: a token that has moved that far for a good
    return gets no gradient from it. Where the student is the one that sampled (rho = 1) and `length_normalize` is off,
    the sum over a row's positions, averaged over sampled rows, has the gradient of the response's KL(q || p). For any
    q0 with full support, q = p is the only stationary point: at a row's last position R is 0, so the single-step part
    ends at the teacher there, then R is 0 one position earlier, and so on. The value itself is not that divergence.

    # differs from the paper: the single-step part has no weight, as in the authors' code, and rewards are those of the
    # current student (their code keeps those of the student that sampled, and whitens the returns)

    `student_T`, `teacher_T` and `sampling_T` are log q, log p and log q0 of the sampled tokens; q0 is the student that
    drew them, or its mixture with the teacher. `single_step_T` is KL(q || p) over the next token at each position.
    `length_normalize` divides each return by the number of rewards in it.
    """
    student_T = student_T.float()
    rewards_T = teacher_T.detach().float() - student_T.detach()
    return_T = returns(rewards_T, num_tokens_B, length_normalize=length_normalize)
    ratio_T = (student_T - sampling_T.detach().float()).exp()
    clipped_T = ratio_T.clamp(1 - clip, 1 + clip)
    return single_step_T.float() - torch.minimum(ratio_T * return_T, clipped_T * return_T)


def returns(
    rewards_T: Float[Tensor, " T"], num_tokens_B: Int[Tensor, " B"], *, length_normalize: bool
) -> Float[Tensor, " T"]:
    """Sum of the rewards after each position in its row, its own left out; 0 at a row's last position.

    With `length_normalize` divided by the number of rewards summed (section 2.2 of the source: long responses would
    otherwise carry large returns and be avoided). Raises RuntimeError unless `num_tokens_B` sums to T.
    """
    # one row a line, so that an infinite reward stays in its own row and no sum runs over the whole batch
    rewards_BS = pad_sequence(rewards_T.split(num_tokens_B.tolist()), batch_first=True)
    future_BS = functional.pad(rewards_BS, (0, 1)).flip(1).cumsum(1).flip(1)[:, 1:]
    after_BS = num_tokens_B[:, None] - 1 - torch.arange(rewards_BS.shape[1], device=rewards_T.device)
    if length_normalize:
        future_BS = future_BS / after_BS.clamp(min=1)
    return future_BS[after_BS >= 0]
