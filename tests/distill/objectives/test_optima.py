"""Where each objective ends when it is minimised for long: at the teacher, or somewhere else.

Worlds that can be enumerated, no second term that holds the student in place. An objective that claims the teacher as
its optimum must reach it from anywhere; one that does not must be seen to miss it (docs/objectives.md has the column).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dpkd.distill.losses.divergence import DIVERGENCES, forward_kl, reverse_kl
from dpkd.distill.losses.policy_gradient import minillm_loss
from dpkd.distill.losses.preference import (
    PreferenceOptions,
    all_pairs_preference_loss,
    implicit_reward,
    sequence_preference_loss,
    sum_by_row,
    token_preference_loss,
)
from dpkd.distill.objectives.statistics import DrawnOutcomes, Outcomes, Positions

STARTS = range(2)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 1000, rate: float = 0.1) -> Tensor:
    """The parameters after Adam with a falling rate."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=rate / 1000)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(parameters).backward()
        optimizer.step()
        schedule.step()
    return parameters.detach()


# one position


def teacher(seed: int, vocab: int = 6) -> Tensor:
    return (1.5 * torch.randn(1, vocab, generator=generator(seed), dtype=torch.float64)).log_softmax(1)


def start(seed: int, vocab: int = 6) -> Tensor:
    return 2 * torch.randn(1, vocab, generator=generator(100 + seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("smoothing", "skew"), [(0.0, 0.0), (0.1, 0.0), (0.5, 0.0), (0.0, 0.1), (0.0, 0.5)])
def test_all_pairs_end_at_the_teacher(seed: int, beta: float, smoothing: float, skew: float) -> None:
    log_p = teacher(seed)

    def loss(logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(1)
        return all_pairs_preference_loss(log_p, log_q, beta=beta, label_smoothing=smoothing, skew=skew).sum()

    log_q = minimise(loss, start(seed)).log_softmax(1)
    assert float(forward_kl(log_p, log_q)) < 1e-3


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_end_at_the_teacher(seed: int, name: str) -> None:
    options = {"jsd_beta": 0.5, "akl_mu": 0.5, "skew": 0.1, "ab_alpha": 0.2, "ab_beta": 0.7, "tail": "uniform"}
    function, log_p = DIVERGENCES[name].bind(SimpleNamespace(**options)), teacher(seed)
    log_q = minimise(lambda logits: function(log_p, logits.log_softmax(1)).sum(), start(seed)).log_softmax(1)
    assert float(forward_kl(log_p, log_q)) < 1e-3


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_drawn_pairs_end_at_the_teacher(beta: float) -> None:
    """The law of the draws stays out of the gradient: sum over pairs with constant weights."""
    log_p = teacher(0)

    def loss(logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(1)
        weights = log_p.exp()[0][:, None] * log_q.detach().exp()[0][None, :]
        ratio = (log_q - log_p)[0]
        return (weights * -functional.logsigmoid(beta * (ratio[:, None] - ratio[None, :]))).sum()

    assert float(forward_kl(log_p, minimise(loss, start(0)).log_softmax(1))) < 1e-3


def test_the_two_arg_maxes_end_wherever_they_agree() -> None:
    """The released code: zero gradient at a student that is far from the teacher."""
    log_p = teacher(1)
    logits = torch.full_like(log_p, 0.0)
    logits[0, int(log_p.argmax())] = 1e-3  # uniform but for a hair
    options, argmax = PreferenceOptions(beta=0.1), int(log_p.argmax())

    def loss(logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(1)
        own = int(log_q.detach().argmax())
        pairs = [log_q[:, argmax], log_q[:, own], log_p[:, argmax], log_p[:, own]]
        return token_preference_loss("dpkd", *pairs, options=options).sum()

    log_q = minimise(loss, logits, steps=300).log_softmax(1)
    assert math.isclose(float(loss(log_q)), math.log(2), rel_tol=1e-6)
    assert float(forward_kl(log_p, log_q)) > 0.1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.05, 5), st.floats(0, 0.5))
def test_all_pairs_by_enumeration(seed: int, beta: float, smoothing: float) -> None:
    """Value by a plain double loop; at least its value at the teacher, log 2 there; softplus(beta J) by Jensen."""
    log_p, log_q = teacher(seed, 5), start(seed, 5).log_softmax(1)
    expected = 0.0
    for i, j in itertools.product(range(5), repeat=2):
        margin = beta * float((log_q[0, i] - log_p[0, i]) - (log_q[0, j] - log_p[0, j]))
        loss = (1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * math.log1p(math.exp(margin))
        expected += math.exp(float(log_p[0, i]) + float(log_q[0, j])) * loss
    value = float(all_pairs_preference_loss(log_p, log_q, beta=beta, label_smoothing=smoothing))
    assert math.isclose(value, expected, rel_tol=1e-9)
    at_teacher = float(all_pairs_preference_loss(log_p, log_p, beta=beta, label_smoothing=smoothing))
    assert math.isclose(at_teacher, math.log(2), rel_tol=1e-9)
    if smoothing == 0:
        jeffreys = float(forward_kl(log_p, log_q) + reverse_kl(log_p, log_q))
        assert value >= math.log1p(math.exp(beta * jeffreys)) - 1e-9


def test_skewed_all_pairs_compare_the_mixture() -> None:
    log_p, log_q = teacher(0), start(0).log_softmax(1)
    mixture = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    skewed = all_pairs_preference_loss(log_p, log_q, skew=0.3)
    torch.testing.assert_close(skewed, all_pairs_preference_loss(log_p, mixture))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.05, 5), st.floats(0, 0.5), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_gradient_of_all_pairs_is_exact(seed: int, beta: float, smoothing: float, skew: float) -> None:
    log_p = torch.cat([teacher(seed), teacher(seed + 1)])
    logits = torch.cat([start(seed), start(seed + 1)]).requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(1)
        return all_pairs_preference_loss(log_p, log_q, beta=beta, label_smoothing=smoothing, skew=skew)

    assert torch.autograd.gradcheck(loss, (logits,))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.05, 5))
def test_merging_outcomes_never_raises_all_pairs(seed: int, beta: float) -> None:
    log_p, log_q = teacher(seed), start(seed).log_softmax(1)
    merged = [torch.cat([logs[:, :3], logs[:, 3:].logsumexp(1, keepdim=True)], dim=1) for logs in (log_p, log_q)]
    assert (
        float(all_pairs_preference_loss(*merged, beta=beta))
        <= float(all_pairs_preference_loss(log_p, log_q, beta=beta)) + 1e-12
    )


def test_all_pairs_at_the_edges() -> None:
    """Outcomes that do not exist add nothing; many pairs are cut into pieces; no positions give no values."""
    log_p, log_q = teacher(0), start(0).log_softmax(1)
    nothing = torch.full((1, 2), -math.inf, dtype=torch.float64)
    padded = all_pairs_preference_loss(torch.cat([nothing, log_p], 1), torch.cat([nothing, log_q], 1))
    torch.testing.assert_close(padded, all_pairs_preference_loss(log_p, log_q))
    wide_p, wide_q = (torch.randn(3, 2500, generator=generator(seed)).log_softmax(1) for seed in (1, 2))
    by_row = torch.cat([all_pairs_preference_loss(p[None], q[None]) for p, q in zip(wide_p, wide_q, strict=True)])
    torch.testing.assert_close(all_pairs_preference_loss(wide_p, wide_q), by_row)
    assert all_pairs_preference_loss(wide_p[:0], wide_q[:0]).shape == (0,)


def test_drawn_outcomes_follow_both_distributions_tail_included() -> None:
    vocab, count, draws = 7, 3, 40_000
    log_p, logits = teacher(3, vocab).float(), start(3, vocab).float()
    values, ids = log_p.topk(count)
    tail = log_p.exp().sum() - values.exp().sum()
    fields = {
        "entry_ids": ids.expand(draws, -1),
        "entry_logprobs": values.expand(draws, -1),
        "entry_counts": torch.full((draws,), count),
        "log_tail": tail.log().expand(draws),
        "uniform_chosen": torch.rand(draws, generator=generator(1)),
        "uniform_rejected": torch.rand(draws, generator=generator(2)),
    }
    at = Positions(logits.expand(draws, -1), logits.logsumexp(1).expand(draws), fields, vocab)
    outcomes = Outcomes("bucket", vocab)
    found = DrawnOutcomes(outcomes)(at)
    log_p_N, log_q_N = (side[0] for side in outcomes(at))
    for name, law_N in (("teacher_chosen", log_p_N), ("rejected", log_q_N)):
        shares = [
            (found[name] - value).abs().lt(1e-5).float().mean() for value in (log_p_N, log_q_N)[name == "rejected"]
        ]
        torch.testing.assert_close(torch.stack(shares), law_N.exp(), rtol=0, atol=0.01)


# whole responses

END = 0
RESPONSES = [y for n in (1, 2, 3) for y in itertools.product(range(3), repeat=n) if END not in y[:-1]]
RESPONSES = [y for y in RESPONSES if y[-1] == END or len(y) == 3]
PREFIXES = sorted({y[:k] for y in RESPONSES for k in range(len(y))})
LENGTHS = torch.tensor([len(y) for y in RESPONSES])


def response_logprobs(logits: Tensor) -> Tensor:
    """log q(y) of every response of the world, from one row of logits a prefix."""
    log_q = logits.log_softmax(1)
    return torch.stack([sum(log_q[PREFIXES.index(y[:k]), y[k]] for k in range(len(y))) for y in RESPONSES])  # type: ignore[arg-type]


def sequence_end(form: str, seed: int, *, live: bool, offset: bool = False, law_of: int = 50, **options: Any) -> float:
    """KL(p || q) of whole responses after training on all pairs, weighed by p(y_t) and by the law of y_s.

    The law is that of the student where training starts, or of another one.
    """
    shape = (len(PREFIXES), 3)
    log_p = response_logprobs(torch.randn(shape, generator=generator(seed), dtype=torch.float64))
    first = torch.randn(shape, generator=generator(50 + seed), dtype=torch.float64)
    law = response_logprobs(torch.randn(shape, generator=generator(law_of + seed), dtype=torch.float64))
    odds = log_p - law
    constants, n = PreferenceOptions(**options), len(RESPONSES)
    left, right = (index.reshape(-1) for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))

    def loss(logits: Tensor) -> Tensor:
        log_q = response_logprobs(logits)
        weights = log_p.exp()[left] * (log_q.detach() if live else law).exp()[right]
        sides = [part for logs in (log_q, log_p, LENGTHS) for part in (logs[left], logs[right])]
        offset_B = odds[left] - odds[right] if offset else None
        return (weights * sequence_preference_loss(form, *sides, options=constants, offset_B=offset_B)).sum()

    log_q = response_logprobs(minimise(loss, first, steps=700, rate=0.05))
    return float((log_p.exp() * (log_p - log_q)).sum())


@pytest.mark.parametrize(
    "options",
    [
        {"live": True, "beta": 1.0, "length_normalize": False},
        {"live": True, "beta": 1.0},
        {"live": False, "beta": 1.0, "label_smoothing": 0.5, "length_normalize": False},
        {"live": False, "beta": 1.0, "label_smoothing": 0.5},
        {"live": True, "beta": 1.0, "label_smoothing": 0.5},
        {"live": False, "offset": True, "beta": 1.0},
        {"live": False, "offset": True, "beta": 0.3, "length_normalize": False},
        {"live": False, "offset": True, "beta": 4.0, "law_of": 70},
        {"live": False, "offset": True, "beta": 1.0, "law_of": 90, "length_normalize": False},
    ],
    ids=str,
)
def test_whole_responses_that_end_at_the_teacher(options: dict[str, Any]) -> None:
    assert sequence_end("dpkd", 0, **options) < 1e-3


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("dpkd", {"live": False, "beta": 1.0}),  # Eq. 9 on a fixed round overshoots: q ~ p (p/q0)^(|y|/beta)
        ("dpkd", {"live": False, "beta": 1.0, "length_normalize": False}),
        ("dpkd", {"live": False, "beta": 1.0, "offset": True, "label_smoothing": 0.2}),  # why it takes no smoothing
        ("cpo", {"live": True, "beta": 1.0}),
        ("simpo", {"live": True, "beta": 1.0}),
        ("reference-free", {"live": True, "beta": 1.0}),
    ],
    ids=str,
)
def test_whole_responses_that_do_not_end_at_the_teacher(form: str, options: dict[str, Any]) -> None:
    assert sequence_end(form, 0, **options) > 0.02  # twenty times what the others reach


def minillm_end(seed: int, *, true_ratio: bool, clip: float = 0.2) -> float:
    """KL(q || p) of whole responses after MiniLLM on all responses of one fixed round, weighed by its student q0."""
    shape = (len(PREFIXES), 3)
    teacher_logits = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    first = torch.randn(shape, generator=generator(50 + seed), dtype=torch.float64)
    flat = [(PREFIXES.index(y[:k]), row, y[k]) for row, y in enumerate(RESPONSES) for k in range(len(y))]
    prefix, row, token = torch.tensor(flat).T
    log_p, log_q0, law = teacher_logits.log_softmax(1), first.log_softmax(1), response_logprobs(first).exp()

    def loss(logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(1)
        own = log_q[prefix, token]
        sampling = log_q0[prefix, token] if true_ratio else own.detach()
        step = reverse_kl(log_p, log_q)[prefix]
        loss_T = minillm_loss(own, log_p[prefix, token], sampling, LENGTHS, step, clip=clip)
        return (law * sum_by_row(loss_T, row, len(RESPONSES))).sum()

    log_q = response_logprobs(minimise(loss, first, steps=600, rate=0.05))
    return float((log_q.exp() * (log_q - response_logprobs(teacher_logits))).sum())


@pytest.mark.parametrize("seed", range(4))
def test_minillm_ends_at_the_teacher_on_a_fixed_round(seed: int) -> None:
    assert minillm_end(seed, true_ratio=True) < 1e-3


def test_minillm_stalls_where_the_ratio_is_not_the_true_one() -> None:
    """A ratio that is always 1 treats an earlier student's tokens as the current one's: 0.37 nats where it ends."""
    assert minillm_end(2, true_ratio=False) > 0.1


def test_the_teacher_floor_stops_pushing_down_below_the_teacher() -> None:
    teacher_B, student_B = torch.tensor([-2.0, -2.0]), torch.tensor([-3.0, -1.0], requires_grad=True)
    zero_B, one_B = torch.zeros(2), torch.ones(2, dtype=torch.int64)
    options = PreferenceOptions(beta=1.0, teacher_floor=True)
    loss_B = sequence_preference_loss("dpkd", zero_B, student_B, zero_B, teacher_B, one_B, one_B, options=options)
    (gradient_B,) = torch.autograd.grad(loss_B.sum(), student_B)
    assert gradient_B[0] == 0  # already less likely than the teacher has it
    assert gradient_B[1] > 0
    assert float(implicit_reward(student_B, teacher_B, one_B, 1.0)[1].detach()) == 1.0
