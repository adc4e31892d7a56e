"""The two losses that everything rests on, by hand arithmetic and by property."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpkd.distill.losses import dpkd_sequence_loss, dpkd_token_loss, implicit_reward, sum_by_row

logprob = st.floats(-60, 0)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_sequence_loss_by_hand() -> None:
    # chosen: (-4 - -2)/4 = -0.5; rejected: (-6 - -1)/2 = -2.5; beta 0.5: margin 1
    loss = dpkd_sequence_loss(
        tensor(-4), tensor(-6), tensor(-2), tensor(-1), torch.tensor([4]), torch.tensor([2]), beta=0.5
    )
    assert math.isclose(float(loss), math.log(1 + math.exp(-1.0)), rel_tol=1e-6)
    unnormalised = dpkd_sequence_loss(
        tensor(-4),
        tensor(-6),
        tensor(-2),
        tensor(-1),
        torch.tensor([4]),
        torch.tensor([2]),
        beta=0.5,
        length_normalize=False,
    )
    assert math.isclose(float(unnormalised), math.log(1 + math.exp(-1.5)), rel_tol=1e-6)


def test_token_loss_by_hand() -> None:
    # Delta = (-3 - -1) - (-0.5 - -4) = -5.5
    loss = dpkd_token_loss(tensor(-3), tensor(-1), tensor(-0.5), tensor(-4), beta=0.1)
    assert math.isclose(float(loss), math.log(1 + math.exp(0.55)), rel_tol=1e-6)


@given(logprob, logprob, st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 5))
def test_a_student_that_is_the_teacher_has_loss_log_two(
    chosen: float, rejected: float, num_chosen: int, num_rejected: int, beta: float
) -> None:
    y_t, y_s = tensor(chosen), tensor(rejected)
    loss = dpkd_sequence_loss(y_t, y_s, y_t, y_s, torch.tensor([num_chosen]), torch.tensor([num_rejected]), beta=beta)
    assert math.isclose(float(loss), math.log(2), rel_tol=1e-5)
    assert math.isclose(float(dpkd_token_loss(y_t, y_s, y_t, y_s, beta=beta)), math.log(2), rel_tol=1e-5)


@given(logprob, logprob, logprob, logprob, st.floats(0.01, 2))
def test_raising_the_chosen_lowers_the_loss(a: float, b: float, c: float, d: float, beta: float) -> None:
    y_t = tensor(a).requires_grad_()
    y_s = tensor(b).requires_grad_()
    dpkd_sequence_loss(y_t, y_s, tensor(c), tensor(d), torch.tensor([3]), torch.tensor([7]), beta=beta).sum().backward()
    assert y_t.grad is not None
    assert y_s.grad is not None
    assert float(y_t.grad) <= 0 <= float(y_s.grad)
    # the weight is sigma(r(y_s) - r(y_t)): Eq. 10 of the paper prints the opposite sign
    margin = beta * ((a - c) / 3 - (b - d) / 7)
    assert math.isclose(float(y_t.grad), -beta / 3 / (1 + math.exp(margin)), rel_tol=1e-3, abs_tol=1e-6)


@given(st.integers(0, 1000), st.floats(0.05, 1))
def test_arg_max_against_arg_max_is_never_below_log_two(seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, p = (torch.log_softmax(4 * torch.randn(6, 11, generator=generator), dim=1) for _ in range(2))
    a, b = p.argmax(dim=1), q.argmax(dim=1)
    pick = lambda table, token: table.gather(1, token[:, None])[:, 0]  # noqa: E731
    loss = dpkd_token_loss(pick(q, a), pick(q, b), pick(p, a), pick(p, b), beta=beta)
    assert (loss >= math.log(2) - 1e-6).all()
    assert torch.allclose(loss[a == b], torch.tensor(math.log(2)))


def test_losses_are_float32_even_from_bfloat16() -> None:
    y = tensor(-3, -4).bfloat16()
    n = torch.tensor([3, 3])
    assert dpkd_sequence_loss(y, y, y, y, n, n, beta=1.0).dtype == torch.float32
    assert dpkd_token_loss(y, y, y, y, beta=1.0).dtype == torch.float32


def test_a_response_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        implicit_reward(tensor(0), tensor(0), torch.tensor([0]), 0.1)


def test_sums_by_row_keep_empty_rows() -> None:
    assert sum_by_row(tensor(1, 2, 4), torch.tensor([0, 0, 2]), 4).tolist() == [3, 0, 4, 0]
