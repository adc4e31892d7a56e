"""MiniLLM's policy gradient of the reverse KL (arXiv 2306.08543), unreduced and in float32.

Shapes: T response positions of B rows, each row's positions in the order of its tokens. Log-probabilities are natural
logs; p is the teacher, q the student, and the student sampled the tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def minillm_loss(
    student_T: Float[Tensor, " T"],
    teacher_T: Float[Tensor, " T"],
    sampling_T: Float[Tensor, " T"],
    row_T: Int[Tensor, " T"],
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
    num_rows = len(num_tokens_B)
    if bool((num_tokens_B <= 0).any()):
        raise ValueError("a response without tokens has no policy gradient")
    if not torch.equal(torch.bincount(row_T, minlength=num_rows), num_tokens_B.to(row_T.dtype)):
        raise ValueError("num_tokens_B does not count the positions of row_T")
    student_T = student_T.float()
    rewards_T = teacher_T.detach().float() - student_T.detach()
    return_T = returns(rewards_T, row_T, num_rows, length_normalize=length_normalize)
    ratio_T = (student_T - sampling_T.detach().float()).exp()
    clipped_T = ratio_T.clamp(1 - clip, 1 + clip)
    return single_step_T.float() - torch.minimum(ratio_T * return_T, clipped_T * return_T)


def returns(
    rewards_T: Float[Tensor, " T"], row_T: Int[Tensor, " T"], num_rows: int, *, length_normalize: bool
) -> Float[Tensor, " T"]:
    """Sum of the rewards after each position in its row, its own left out; 0 at a row's last position.

    With `length_normalize` divided by the number of rewards summed (section 2.2 of the source: long responses would
    otherwise carry large returns and be avoided).
    """
    num_tokens_B = torch.bincount(row_T, minlength=num_rows)
    index_T = _index_in_row(row_T, num_tokens_B)
    # one row a line, so that an infinite reward stays in its own row and no sum runs over the whole batch
    longest = int(num_tokens_B.max()) if len(row_T) else 0
    rewards_BS = rewards_T.new_zeros(num_rows, longest + 1)
    rewards_BS = rewards_BS.index_put((row_T, index_T), rewards_T)
    from_here_BS = rewards_BS.flip(1).cumsum(1).flip(1)
    future_T = from_here_BS[row_T, index_T + 1]
    if length_normalize:
        future_T = future_T / (num_tokens_B[row_T] - index_T - 1).clamp(min=1)
    return future_T


def _index_in_row(row_T: Tensor, num_tokens_B: Tensor) -> Tensor:
    """0 for the first position of each row, 1 for the next; rows may be interleaved."""
    order_T = row_T.argsort(stable=True)
    start_B = num_tokens_B.cumsum(0) - num_tokens_B
    place_T = torch.arange(len(row_T), device=row_T.device) - start_B[row_T[order_T]]
    return torch.empty_like(place_T).scatter(0, order_T, place_T)
