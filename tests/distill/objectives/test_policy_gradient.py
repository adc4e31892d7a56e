"""MiniLLM's loss: its gradient by enumeration with a vocabulary of two tokens, its returns by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpkd.distill.losses.divergence import reverse_kl
from dpkd.distill.losses.policy_gradient import minillm_loss, returns
from dpkd.distill.losses.preference import sum_by_row

STOP, GO = 0, 1
#: Every response of the world: it ends at STOP or after three tokens.
RESPONSES = [(STOP,), (GO, STOP), (GO, GO, STOP), (GO, GO, GO)]


def world(seed: int) -> tuple[Tensor, Tensor]:
    """Student and teacher logits of the next token after 0, 1 and 2 GOs."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    return student.float().requires_grad_(), teacher.float()


def flat() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, place and token of every position of RESPONSES, and the tokens of each row."""
    positions = [(row, place, token) for row, y in enumerate(RESPONSES) for place, token in enumerate(y)]
    row, place, token = torch.tensor(positions).T
    return row, place, token, torch.tensor([len(y) for y in RESPONSES])


def expected_gradient(student: Tensor, teacher: Tensor, *, length_normalize: bool = False) -> Tensor:
    """The mean gradient of the loss over responses that the student samples, exactly: all of them, weighed by q(y)."""
    row, place, token, counts = flat()
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    own = log_q[place, token]
    loss = minillm_loss(
        own,
        log_p[place, token],
        own.detach(),
        counts,
        reverse_kl(log_p, log_q)[place],
        length_normalize=length_normalize,
    )
    weight = sum_by_row(own, row, len(RESPONSES)).exp().detach()
    (gradient,) = torch.autograd.grad((weight * sum_by_row(loss, row, len(RESPONSES))).sum(), student)
    return gradient


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_the_expected_gradient_is_that_of_the_reverse_kl_of_responses(seed: int) -> None:
    student, teacher = world(seed)
    row, place, token, _ = flat()
    log_q = sum_by_row(student.log_softmax(1)[place, token], row, len(RESPONSES))
    log_p = sum_by_row(teacher.log_softmax(1)[place, token], row, len(RESPONSES))
    assert math.isclose(float(log_q.exp().sum().detach()), 1.0, rel_tol=1e-5)  # RESPONSES are the whole world
    (exact,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), student, retain_graph=True)
    # REINFORCE with the whole response's reward, the textbook estimator of the same gradient
    (reinforce,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).detach() @ log_q, student)
    ours = expected_gradient(student, teacher)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, reinforce, rtol=1e-4, atol=1e-5)


def test_length_normalisation_is_another_objective() -> None:
    student, teacher = world(0)
    plain, normalised = expected_gradient(student, teacher), expected_gradient(student, teacher, length_normalize=True)
    # the last step sees one own reward and no return; the second to last one reward ahead, divided by 1
    torch.testing.assert_close(plain[1:], normalised[1:])
    assert not torch.allclose(plain[0], normalised[0])


def test_the_reinforce_gradient_of_one_sample_by_hand() -> None:
    # one row of two tokens at ratio 1: the first token carries the second's reward r = log p - log q, the second none
    own = torch.tensor([-0.5, -1.5], requires_grad=True)
    zero = torch.zeros(2)
    loss = minillm_loss(own, torch.tensor([-1.0, -0.2]), own, torch.tensor([2]), zero)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 0.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    torch.testing.assert_close(gradient, torch.tensor([-1.3, 0.0]))


def test_the_ratio_and_its_clip_by_hand() -> None:
    """One row of four tokens, each 1.5 or 0.5 times as likely as when it was drawn, with returns of both signs.

    As PPO (and the authors' code) has it, a token that has moved past the clip in the direction of its return gets no
    gradient; one that has moved against it gets the full one.
    """
    sampling = torch.tensor([0.2, 0.4, 0.2, 0.4, 0.3]).log()
    own = (torch.tensor([1.5, 0.5, 0.5, 1.5, 1.0]) * sampling.exp()).log().requires_grad_()
    # returns by the rewards after each position, without division: 1, 1, -1, -1, 0
    teacher = own.detach() + torch.tensor([0.0, 0.0, 2.0, 0.0, -1.0])
    counts, zero = torch.tensor([5]), torch.zeros(5)
    loss = minillm_loss(own, teacher, sampling, counts, zero, clip=0.2, length_normalize=False)
    torch.testing.assert_close(loss, torch.tensor([-1.2, -0.5, 0.8, 1.5, 0.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5, 0.0, 1.5, 0.0]))


def test_the_single_step_part_is_added_and_differentiable() -> None:
    own, step = torch.tensor([-1.0, -2.0]), torch.tensor([0.3, 0.4], requires_grad=True)
    arguments = (own, own, own, torch.tensor([2]))
    loss = minillm_loss(*arguments, step)
    torch.testing.assert_close(loss, step)
    (gradient,) = torch.autograd.grad(loss.sum(), step)
    assert gradient.tolist() == [1.0, 1.0]


def test_no_gradient_reaches_the_rewards() -> None:
    teacher = torch.tensor([-1.0, -0.5], requires_grad=True)
    own = torch.tensor([-1.1, -0.7], requires_grad=True)
    loss = minillm_loss(own, teacher, own, torch.tensor([2]), torch.zeros(2))
    loss.sum().backward()
    assert own.grad is not None
    assert teacher.grad is None
    assert loss.dtype == torch.float32


def test_returns_by_hand() -> None:
    rewards, counts = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([3, 2])
    assert returns(rewards, counts, length_normalize=False).tolist() == [6, 4, 0, 16, 0]
    assert returns(rewards, counts, length_normalize=True).tolist() == [3, 4, 0, 16, 0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 1000), st.booleans())
def test_returns_are_those_of_a_loop(counts: list[int], seed: int, normalize: bool) -> None:
    rewards = torch.randn(sum(counts), generator=torch.Generator().manual_seed(seed))
    expected: list[float] = []
    for of_row in rewards.split(counts):
        ahead = [of_row[place + 1 :].tolist() for place in range(len(of_row))]
        expected += [sum(after) / (max(len(after), 1) if normalize else 1) for after in ahead]
    ours = returns(rewards, torch.tensor(counts), length_normalize=normalize)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_an_infinite_reward_stays_in_its_row() -> None:
    rewards = torch.tensor([1.0, -math.inf, 2.0, 3.0, 4.0])
    ours = returns(rewards, torch.tensor([3, 2]), length_normalize=False)
    assert ours.tolist() == [-math.inf, 2, 0, 4, 0]


def test_counts_that_do_not_fit_are_refused() -> None:
    own = torch.tensor([-1.0, -2.0])
    with pytest.raises(RuntimeError, match="split_sizes"):
        minillm_loss(own, own, own, torch.tensor([3]), own)
