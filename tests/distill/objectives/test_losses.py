"""Preference losses: hand arithmetic, properties, and the numbers of another library."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpkd.distill.losses.preference import (
    PreferenceOptions,
    implicit_reward,
    sequence_preference_loss,
    sum_by_row,
    token_preference_loss,
)

logprob = st.floats(-60, 0)

# log q(y_t), log q(y_s), log p(y_t), log p(y_s), |y_t|, |y_s|
PAIRS = [(-12.5, -9.0, -10.0, -14.0, 5, 4), (-3.25, -20.0, -4.5, -16.0, 2, 9), (-41.0, -37.5, -30.0, -36.0, 17, 12)]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_sequence_loss_by_hand() -> None:
    # chosen: (-4 - -2)/4 = -0.5; rejected: (-6 - -1)/2 = -2.5; beta 0.5: margin 1
    loss = sequence_preference_loss(
        "dpkd",
        tensor(-4),
        tensor(-6),
        tensor(-2),
        tensor(-1),
        torch.tensor([4]),
        torch.tensor([2]),
        options=PreferenceOptions(beta=0.5),
    )
    assert math.isclose(float(loss), math.log(1 + math.exp(-1.0)), rel_tol=1e-6)
    unnormalised = sequence_preference_loss(
        "dpkd",
        tensor(-4),
        tensor(-6),
        tensor(-2),
        tensor(-1),
        torch.tensor([4]),
        torch.tensor([2]),
        options=PreferenceOptions(beta=0.5, length_normalize=False),
    )
    assert math.isclose(float(unnormalised), math.log(1 + math.exp(-1.5)), rel_tol=1e-6)


def test_token_loss_by_hand() -> None:
    # Delta = (-3 - -1) - (-0.5 - -4) = -5.5
    loss = token_preference_loss(
        "dpkd", tensor(-3), tensor(-1), tensor(-0.5), tensor(-4), options=PreferenceOptions(beta=0.1)
    )
    assert math.isclose(float(loss), math.log(1 + math.exp(0.55)), rel_tol=1e-6)


@given(logprob, logprob, st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 5))
def test_a_student_that_is_the_teacher_has_loss_log_two(
    chosen: float, rejected: float, num_chosen: int, num_rejected: int, beta: float
) -> None:
    y_t, y_s = tensor(chosen), tensor(rejected)
    loss = sequence_preference_loss(
        "dpkd",
        y_t,
        y_s,
        y_t,
        y_s,
        torch.tensor([num_chosen]),
        torch.tensor([num_rejected]),
        options=PreferenceOptions(beta=beta),
    )
    assert math.isclose(float(loss), math.log(2), rel_tol=1e-5)
    assert math.isclose(
        float(token_preference_loss("dpkd", y_t, y_s, y_t, y_s, options=PreferenceOptions(beta=beta))),
        math.log(2),
        rel_tol=1e-5,
    )


@given(logprob, logprob, logprob, logprob, st.floats(0.01, 2))
def test_raising_the_chosen_lowers_the_loss(a: float, b: float, c: float, d: float, beta: float) -> None:
    y_t = tensor(a).requires_grad_()
    y_s = tensor(b).requires_grad_()
    sequence_preference_loss(
        "dpkd",
        y_t,
        y_s,
        tensor(c),
        tensor(d),
        torch.tensor([3]),
        torch.tensor([7]),
        options=PreferenceOptions(beta=beta),
    ).sum().backward()
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
    loss = token_preference_loss(
        "dpkd", pick(q, a), pick(q, b), pick(p, a), pick(p, b), options=PreferenceOptions(beta=beta)
    )
    assert (loss >= math.log(2) - 1e-6).all()
    assert torch.allclose(loss[a == b], torch.tensor(math.log(2)))


def test_losses_are_float32_even_from_bfloat16() -> None:
    y = tensor(-3, -4).bfloat16()
    n = torch.tensor([3, 3])
    assert (
        sequence_preference_loss("dpkd", y, y, y, y, n, n, options=PreferenceOptions(beta=1.0)).dtype == torch.float32
    )
    assert token_preference_loss("dpkd", y, y, y, y, options=PreferenceOptions(beta=1.0)).dtype == torch.float32


def test_a_response_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        implicit_reward(tensor(0), tensor(0), torch.tensor([0]), 0.1)


def test_sums_by_row_keep_empty_rows() -> None:
    assert sum_by_row(tensor(1, 2, 4), torch.tensor([0, 0, 2]), 4).tolist() == [3, 0, 4, 0]


def sequence(form: str, **options: Any) -> torch.Tensor:
    """The loss of PAIRS."""
    columns = [torch.tensor(column) for column in zip(*PAIRS, strict=True)]
    return sequence_preference_loss(form, *columns, options=PreferenceOptions(**options))  # type: ignore[arg-type]


def token(form: str, *values: float, **options: Any) -> float:
    return float(token_preference_loss(form, *map(tensor, values), options=PreferenceOptions(**options)))  # type: ignore[misc,arg-type]


def logistic(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def test_sequence_forms_agree_with_trl() -> None:
    """TRL 1.16.0 on PAIRS at beta 0.7 (simpo's gamma 0.4), the teacher as its reference model.

    From `DPOTrainer._compute_loss` with loss types sigmoid, sigmoid_norm and ipo, given these log-probs in place of a
    model's, and from `CPOTrainer.cpo_loss` with sigmoid and simpo. TRL adds cpo's likelihood term elsewhere.
    """
    own = torch.tensor([pair[0] for pair in PAIRS])
    for ours, theirs in [
        (sequence("dpkd", beta=0.7, length_normalize=False), (5.2552337646, 0.0250334386, 6.6512875557)),
        (sequence("dpkd", beta=0.7), (1.4825509787, 0.3873168230, 0.8924689293)),
        (sequence("ipo", beta=0.7), (6.0727047920, 0.1261376888, 1.5285466909)),
        (sequence("cpo", beta=0.7, length_normalize=False) + own, (2.5327715874, 8.0890158642e-06, 2.5327715874)),
        (
            sequence("cpo", beta=0.7, length_normalize=False, label_smoothing=0.1) + own,
            (2.2877714634, 1.1725080013, 2.2877714634),
        ),
        (sequence("simpo", beta=0.7, gamma=0.4), (1.0214182138, 0.6841601133, 0.6447459459)),
        (sequence("simpo", beta=0.7, gamma=0.4, label_smoothing=0.1), (0.9639181495, 0.6859656572, 0.6546724439)),
    ]:
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def test_sequence_forms_by_hand() -> None:
    # the first pair, summed: ratios -2.5 and 5; divided by the tokens: -0.5 and 1.25; log q alone: -2.5 and -2.25
    for form, options, expected in [
        ("dpkd", {"label_smoothing": 0.2}, 0.8 * logistic(-1.75 / 2) + 0.2 * logistic(1.75 / 2)),
        ("ipo", {"length_normalize": False}, (-7.5 - 1) ** 2),
        ("ipo", {}, (-1.75 - 1) ** 2),
        ("cpo", {"length_normalize": False}, logistic(-3.5 / 2) + 12.5),
        ("cpo", {}, logistic(-0.25 / 2) + 2.5),
        ("simpo", {"length_normalize": False, "gamma": 0.3}, logistic(-0.25 / 2 - 0.3)),
        ("dpop", {"length_normalize": False}, logistic(-7.5 / 2) + 50 * 2.5),
        ("dpop", {"dpop_lambda": 3.0, "label_smoothing": 0.2}, 0.8 * logistic(-0.875) + 0.2 * logistic(0.875) + 1.5),
        ("reference-free", {"length_normalize": False}, logistic(-3.5 / 2)),
        ("reference-free", {}, logistic(-0.25 / 2)),
    ]:
        loss = sequence(form, beta=0.5, **options)[0]  # type: ignore[arg-type]
        assert math.isclose(float(loss), expected, rel_tol=1e-5), (form, options)


def test_token_forms_by_hand() -> None:
    # Delta = (-3 - -1) - (-0.5 - -4) = -5.5; without the teacher -2; the chosen token stands 2.5 below the teacher
    values = (-3.0, -1.0, -0.5, -4.0)
    for form, options, expected in [
        ("dpkd", {"label_smoothing": 0.2}, 0.8 * logistic(-0.55) + 0.2 * logistic(0.55)),
        ("ipo", {}, (-5.5 - 5) ** 2),
        ("reference-free", {}, logistic(-0.2)),
        ("dpop", {}, logistic(-0.55) + 50 * 2.5),
        ("dpop", {"dpop_lambda": 2.0}, logistic(-0.55) + 2 * 2.5),
    ]:
        assert math.isclose(token(form, *values, **options), expected, rel_tol=1e-5), (form, options)  # type: ignore[arg-type]


def test_dpop_asks_nothing_of_a_student_above_the_teacher() -> None:
    assert math.isclose(token("dpop", -0.5, -1.0, -3.0, -4.0), token("dpkd", -0.5, -1.0, -3.0, -4.0), rel_tol=1e-6)
    assert float(sequence("dpop")[1]) == float(sequence("dpkd")[1])  # in the second pair q(y_t) > p(y_t)
    assert float(sequence("dpop")[0]) > float(sequence("dpkd")[0])


@pytest.mark.parametrize("form", ["cpo", "simpo", "reference-free"])
def test_forms_without_a_reference_do_not_read_the_teacher(form: str) -> None:
    student, nothing, counts = tensor(-3, -4), tensor(math.nan, math.nan), torch.tensor([2, 3])
    options = PreferenceOptions()
    assert (
        sequence_preference_loss(form, student, student, nothing, nothing, counts, counts, options=options)
        .isfinite()
        .all()
    )


def test_reference_free_tokens_do_not_read_the_teacher() -> None:
    assert math.isfinite(token("reference-free", -3, -4, math.nan, math.nan))


@pytest.mark.parametrize("form", ["dpkd", "ipo", "cpo", "simpo", "dpop", "reference-free"])
def test_a_gradient_step_on_any_form_raises_the_chosen(form: str) -> None:
    chosen, rejected = tensor(-6, -9).requires_grad_(), tensor(-6, -9).requires_grad_()
    teacher, counts = tensor(-5, -8), torch.tensor([3, 3])
    loss = sequence_preference_loss(
        form, chosen, rejected, teacher, teacher, counts, counts, options=PreferenceOptions()
    )
    chosen_gradient, rejected_gradient = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert (chosen_gradient < 0).all()
    assert (rejected_gradient > 0).all()
    assert loss.dtype == torch.float32


@given(logprob, logprob, logprob, logprob, st.floats(0.01, 2), st.floats(0, 0.49))
def test_smoothing_is_the_mix_of_both_orders(a: float, b: float, c: float, d: float, beta: float, eps: float) -> None:
    smoothed = token("dpkd", a, b, c, d, beta=beta, label_smoothing=eps)
    expected = (1 - eps) * token("dpkd", a, b, c, d, beta=beta) + eps * token("dpkd", b, a, d, c, beta=beta)
    assert math.isclose(smoothed, expected, rel_tol=1e-4, abs_tol=1e-5)


def test_smoothing_has_no_meaning_for_a_square() -> None:
    with pytest.raises(ValueError, match="ipo is a square"):
        sequence("ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match="ipo is a square"):
        token("ipo", -1, -1, -1, -1, label_smoothing=0.1)


@pytest.mark.parametrize("form", ["cpo", "simpo"])
def test_forms_on_whole_responses_have_no_token_level(form: str) -> None:
    with pytest.raises(ValueError, match=f"'{form}' at the token level, only dpkd, ipo, dpop, reference-free"):
        token(form, -1, -1, -1, -1)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="'orpo' at the sequence level"):
        sequence("orpo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.0),
        ("beta", math.inf),
        ("beta", math.nan),
        ("gamma", -0.1),
        ("dpop_lambda", -1.0),
        ("label_smoothing", 0.6),
        ("label_smoothing", -0.1),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        PreferenceOptions(**{name: value})  # type: ignore[arg-type]


def test_only_division_by_tokens_needs_tokens() -> None:
    y, empty, options = tensor(-1), torch.tensor([0]), PreferenceOptions(length_normalize=False)
    with pytest.raises(ValueError, match="without tokens"):
        sequence_preference_loss("simpo", y, y, y, y, empty, empty, options=options)
    loss = sequence_preference_loss("dpkd", y, y, y, y, empty, empty, options=options)
    assert math.isclose(float(loss), math.log(2), rel_tol=1e-6)
