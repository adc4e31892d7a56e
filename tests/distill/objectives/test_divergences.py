"""Divergences: against torch and GKD's numbers, closed forms, properties, and at the edges of the cached entries."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dpkd.distill.losses.cached_distributions import Tail, align
from dpkd.distill.losses.divergence import (
    DIVERGENCES,
    akl,
    cross_entropy_to,
    forward_kl,
    jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    tvd,
)

NAMES = tuple(DIVERGENCES)
TAILS: tuple[Tail, ...] = get_args(Tail)
VOCAB = 9

seeds = st.integers(0, 10_000)
quick = settings(deadline=None, max_examples=40)


def divergence(name: str, p: Tensor, q: Tensor, **options: Any) -> Tensor:
    """The divergence of the table, with the options of `dpkd train` that it takes."""
    defaults: dict[str, Any] = {"jsd_beta": 0.5, "akl_mu": 0.5, "skew": 0.1, "tail": "uniform"}
    defaults |= {"ab_alpha": 0.2, "ab_beta": 0.7}
    return DIVERGENCES[name].bind(SimpleNamespace(**(defaults | options)))(p, q)


def logits(seed: int, num_positions: int = 4, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_positions, vocab, generator=generator, dtype=torch.float64).to(dtype)


def top(log_p: Tensor, counts: list[int], width: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the cache keeps of each row of `log_p`: its likeliest entries, padded to `width`."""
    values, ids = log_p.sort(dim=1, descending=True)
    counts_T = torch.tensor(counts)
    rest = torch.stack([row[count:].logsumexp(0) for row, count in zip(values, counts, strict=True)])
    rest = rest.masked_fill(counts_T >= log_p.shape[1], -math.inf)
    if width is not None:
        values, ids = (functional.pad(table, (0, width - log_p.shape[1])) for table in (values, ids))
    padding = torch.arange(ids.shape[1]) >= counts_T[:, None]
    return ids.masked_fill(padding, -1), values.masked_fill(padding, -math.inf), counts_T, rest


def aligned(p: Tensor, q: Tensor, count: int, tail: Tail = "bucket") -> tuple[Tensor, Tensor]:
    return align(q, *top(p.log_softmax(1), [count] * len(p)), tail, vocab_size=p.shape[1])


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


# the divergences themselves


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_no_divergence(name: str) -> None:
    p = logits(0).log_softmax(1).index_fill(1, torch.tensor([3]), -math.inf)
    torch.testing.assert_close(divergence(name, p, p), torch.zeros(4), rtol=0, atol=1e-7)


def test_kl_equals_torchs() -> None:
    p, q = logits(0).log_softmax(1), logits(1).log_softmax(1)
    torch.testing.assert_close(
        forward_kl(p, q), functional.kl_div(q, p, log_target=True, reduction="none").sum(1), rtol=1e-5, atol=1e-6
    )
    first, second = torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    torch.testing.assert_close(forward_kl(p, q), torch.distributions.kl_divergence(first, second))
    torch.testing.assert_close(reverse_kl(p, q), torch.distributions.kl_divergence(second, first))
    torch.testing.assert_close(cross_entropy_to(q, q), second.entropy())
    torch.testing.assert_close(cross_entropy_to(p, q), functional.cross_entropy(q, p.exp(), reduction="none"))


def test_jsd_equals_gkds() -> None:
    """`GKDTrainer.generalized_jsd_loss` of TRL 1.16.0, summed over the vocabulary; beta is the teacher's share."""
    p, q = logs([0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1]), logs([0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.4, 0.1])
    for beta, theirs in [(0.1, (0.0519112758, 0.0436072238)), (0.5, (0.1306009740, 0.1202759519)),
                         (0.9, (0.0465417430, 0.0459601395))]:  # fmt: skip
        torch.testing.assert_close(jsd(p, q, beta), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def test_divergences_by_hand() -> None:
    p, q = logs([0.5, 0.5, 0.0]), logs([0.25, 0.0, 0.75])
    assert math.isclose(float(tvd(p, q)), 0.75, rel_tol=1e-6)
    assert float(forward_kl(p, q)) == math.inf  # q has nothing where p has a half
    assert float(reverse_kl(p, q)) == math.inf
    # both mixtures are (0.375, 0.25, 0.375)
    expected = (0.5 * math.log(4 / 3) + 0.5 * math.log(2) + 0.25 * math.log(2 / 3) + 0.75 * math.log(2)) / 2
    assert math.isclose(float(jsd(p, q)), expected, rel_tol=1e-5)
    # alpha 0.2: (0.3, 0.1, 0.6), and the other way round (0.45, 0.4, 0.15)
    forward = 0.5 * math.log(5 / 3) + 0.5 * math.log(5)
    assert math.isclose(float(skewed_forward_kl(p, q, 0.2)), forward, rel_tol=1e-5)
    reverse = 0.25 * math.log(0.25 / 0.45) + 0.75 * math.log(5)
    assert math.isclose(float(skewed_reverse_kl(p, q, 0.2)), reverse, rel_tol=1e-5)


def weighed(weight: float, p: Tensor, q: Tensor) -> Tensor:
    return weight * forward_kl(p, q) + (1 - weight) * reverse_kl(p, q)


def test_akl_by_hand() -> None:
    # in rank order 0.4, 0.3, 0.2, 0.1 (cumulative 0.4, 0.7, 0.9, 1), with gaps to q of 0.1, 0.1, 0.1, 0.3
    p, q = logs([0.2, 0.4, 0.1, 0.3]), logs([0.1, 0.3, 0.4, 0.2])
    torch.testing.assert_close(akl(p, q, 0.5), weighed(0.1 / 0.6, p, q))
    torch.testing.assert_close(akl(p, q, 0.75), weighed(0.2 / 0.6, p, q))
    torch.testing.assert_close(akl(p, q, 0.95), weighed(0.3 / 0.6, p, q))
    # the first token is the head even where it alone is past mu
    torch.testing.assert_close(akl(p, q, 0.3), weighed(0.1 / 0.6, p, q))


def test_akl_ranks_the_merged_tail_last() -> None:
    # gaps 0.3, 0.3, 0.6; the head is the first token, or the 0.7 that would be the likeliest if it were a token
    p, q = logs([0.2, 0.1, 0.7]), logs([0.5, 0.4, 0.1])
    torch.testing.assert_close(akl(p, q, 0.25, tail="bucket"), weighed(0.25, p, q))
    torch.testing.assert_close(akl(p, q, 0.25), weighed(0.5, p, q))
    torch.testing.assert_close(divergence("akl", p, q, akl_mu=0.25, tail="bucket"), weighed(0.25, p, q))


def test_options_reach_the_divergence_of_their_name() -> None:
    p, q = logits(0).log_softmax(1), logits(1).log_softmax(1)
    options: dict[str, Any] = {"jsd_beta": 0.2, "akl_mu": 0.7, "skew": 0.3}
    for name, expected in [
        ("forward-kl", forward_kl(p, q)),
        ("reverse-kl", reverse_kl(p, q)),
        ("jsd", jsd(p, q, 0.2)),
        ("tvd", tvd(p, q)),
        ("akl", akl(p, q, 0.7)),
        ("skewed-forward-kl", skewed_forward_kl(p, q, 0.3)),
        ("skewed-reverse-kl", skewed_reverse_kl(p, q, 0.3)),
    ]:
        torch.testing.assert_close(divergence(name, p, q, **options), expected, rtol=0, atol=0)  # type: ignore[arg-type]


def test_without_skew_the_skewed_divergences_are_kl() -> None:
    p, q = logits(0).log_softmax(1), logits(1).log_softmax(1)
    torch.testing.assert_close(skewed_forward_kl(p, q, 0.0), forward_kl(p, q))
    torch.testing.assert_close(skewed_reverse_kl(p, q, 0.0), reverse_kl(p, q))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jsd", {"jsd_beta": 0.0}, "beta is 0.0"),
        ("jsd", {"jsd_beta": 1.0}, "beta is 1.0"),
        ("akl", {"akl_mu": 0.0}, "mu is 0.0"),
        ("akl", {"akl_mu": 1.1}, "mu is 1.1"),
        ("skewed-forward-kl", {"skew": 1.0}, "alpha is 1.0"),
        ("skewed-reverse-kl", {"skew": -0.1}, "alpha is -0.1"),
    ],
)
def test_what_has_no_meaning_is_refused(name: Any, options: dict[str, float], message: str) -> None:
    p = logits(0).log_softmax(1)
    with pytest.raises(ValueError, match=message):
        divergence(name, p, p, **options)


@quick
@given(seeds, st.sampled_from(NAMES))
def test_divergences_are_not_negative_and_blind_to_order_and_padding(seed: int, name: str) -> None:
    p, q = logits(seed).log_softmax(1), logits(seed + 1).log_softmax(1)
    value = divergence(name, p, q)
    assert (value >= -1e-6).all()
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(divergence(name, p[:, order], q[:, order]), value, rtol=1e-5, atol=1e-6)
    nothing = torch.full((4, 3), -math.inf)
    padded = divergence(name, torch.cat([nothing, p], 1), torch.cat([nothing, q], 1))
    torch.testing.assert_close(padded, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32(name: str) -> None:
    p, q = logits(0).log_softmax(1).bfloat16(), logits(1).log_softmax(1).bfloat16()
    value = divergence(name, p, q)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, divergence(name, p.float(), q.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_of_close_distributions_is_not_rounding(name: str) -> None:
    p, noise = logits(0, dtype=torch.float64), logits(1, dtype=torch.float64)
    p, q = p.log_softmax(1), (p + 1e-2 * noise).log_softmax(1)
    torch.testing.assert_close(
        divergence(name, p.float(), q.float()).double(), divergence(name, p, q), rtol=0.02, atol=0
    )


# gradients


@quick
@given(seeds)
def test_gradients_by_closed_form(seed: int) -> None:
    p, z = logits(seed).log_softmax(1), logits(seed + 1).requires_grad_()
    q = z.detach().softmax(1)
    (gradient,) = torch.autograd.grad(forward_kl(p, z.log_softmax(1)).sum(), z)
    torch.testing.assert_close(gradient, q - p.exp(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(cross_entropy_to(p, z.log_softmax(1)).sum(), z)
    torch.testing.assert_close(gradient, q - p.exp(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(reverse_kl(p, z.log_softmax(1)).sum(), z)
    expected = q * (q.log() - p - reverse_kl(p, q.log())[:, None])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "akl"])
def test_gradients_by_finite_differences(name: str, tail: Tail) -> None:
    entries = top(logits(0, dtype=torch.float64).log_softmax(1), [3, 0, VOCAB, 1], VOCAB + 2)

    def value(z: Tensor) -> Tensor:
        return divergence(name, *align(z, *entries, tail, vocab_size=VOCAB))

    assert torch.autograd.gradcheck(value, logits(1, dtype=torch.float64).requires_grad_())


def test_the_weights_of_akl_are_constants_to_the_gradient() -> None:
    p, z = logits(0).log_softmax(1), logits(1).requires_grad_()
    q = z.log_softmax(1)
    weight = (akl(p, q) - reverse_kl(p, q)) / (forward_kl(p, q) - reverse_kl(p, q))
    expected = weight.detach() * forward_kl(p, q) + (1 - weight.detach()) * reverse_kl(p, q)
    (gradient,) = torch.autograd.grad(akl(p, q).sum(), z, retain_graph=True)
    (by_hand,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_numbers_at_the_edges(name: str, tail: Tail) -> None:
    """No entry, one entry, all of them, and a student that is certain of one token."""
    z = logits(1)
    z[3, 0] = 400.0
    z.requires_grad_()
    p, q = align(z, *top(logits(0).log_softmax(1), [0, 1, VOCAB, 4], VOCAB + 3), tail, vocab_size=VOCAB)
    value = divergence(name, p, q)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[2] != 0).any()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4), rtol=0, atol=1e-5)  # a shift of all logits is nothing


@pytest.mark.parametrize("name", ["forward-kl", "jsd", "tvd", "skewed-forward-kl", "skewed-reverse-kl"])
def test_a_teacher_without_mass_somewhere_gives_finite_gradients(name: str) -> None:
    p, z = logs([0.5, 0.5, 0.0, 0.0]), torch.tensor([[0.3, -0.2, 1.0, -math.inf]], requires_grad=True)
    value = divergence(name, p, z.log_softmax(1))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


# alignment


@quick
@given(seeds, st.lists(st.integers(0, VOCAB), min_size=4, max_size=4), st.integers(0, 3), st.sampled_from(TAILS))
def test_both_sides_sum_to_one(seed: int, counts: list[int], padding: int, tail: Tail) -> None:
    entries = top(logits(seed).log_softmax(1), counts, VOCAB + padding)
    for side in align(logits(seed + 1, vocab=VOCAB + 2), *entries, tail, vocab_size=VOCAB):
        expected = torch.tensor([0.0 if tail == "renormalise" and count == 0 else 1.0 for count in counts])
        torch.testing.assert_close(side.exp().sum(1), expected, rtol=0, atol=1e-5)
        assert side.dtype == torch.float32


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_with_every_token_kept_it_is_the_full_divergence(name: str, tail: Tail) -> None:
    p, q = logits(0), logits(1)
    pair = aligned(p, q, VOCAB, tail)
    full = divergence(name, p.log_softmax(1), q.log_softmax(1))
    torch.testing.assert_close(divergence(name, *pair), full, rtol=1e-5, atol=1e-6)
    # a tail that rounding left behind has no mass
    ids, values, counts, _ = top(p.log_softmax(1), [VOCAB] * 4)
    rounded = align(q, ids, values, counts, torch.full((4,), -14.0), tail, vocab_size=VOCAB)
    torch.testing.assert_close(divergence(name, *rounded), full, rtol=1e-5, atol=1e-6)


@quick
@given(seeds, st.sampled_from(["forward-kl", "reverse-kl", "jsd", "tvd", "skewed-forward-kl", "skewed-reverse-kl"]))
def test_the_bucket_is_a_lower_bound_that_grows_with_the_entries(seed: int, name: str) -> None:
    p, q = logits(seed), logits(seed + 1)
    values = torch.stack([divergence(name, *aligned(p, q, count)) for count in range(VOCAB + 1)])
    assert (values[1:] >= values[:-1] - 1e-5).all()
    full = divergence(name, p.log_softmax(1), q.log_softmax(1))
    torch.testing.assert_close(values[-1], full, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values[-2], full, rtol=1e-5, atol=1e-6)  # one token outside is no merging
    torch.testing.assert_close(values[0], torch.zeros(4), rtol=0, atol=1e-6)


@quick
@given(seeds, st.sampled_from(NAMES), st.sampled_from(TAILS))
def test_more_padding_and_another_order_change_nothing(seed: int, name: str, tail: Tail) -> None:
    p, q, counts = logits(seed).log_softmax(1), logits(seed + 1), [0, 2, 5, VOCAB]
    entries = top(p, counts, VOCAB)
    value = divergence(name, *align(q, *entries, tail, vocab_size=VOCAB))
    wider = divergence(name, *align(q, *top(p, counts, VOCAB + 4), tail, vocab_size=VOCAB))
    torch.testing.assert_close(wider, value, rtol=1e-5, atol=1e-6)
    if name != "akl":  # its head is a matter of rank
        ids, logprobs, counts_T, rest = entries
        for position, count in enumerate(counts):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            ids[position, :count] = ids[position, :count][order]
            logprobs[position, :count] = logprobs[position, :count][order]
        shuffled = divergence(name, *align(q, ids, logprobs, counts_T, rest, tail, vocab_size=VOCAB))
        torch.testing.assert_close(shuffled, value, rtol=1e-5, atol=1e-6)


def test_outcomes_by_hand() -> None:
    # teacher: 0.5 on token 2, 0.3 on token 0, 0.2 outside; student: 0.1, 0.2, 0.3, 0.4; second position: nothing kept
    q = logs([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4])
    entries = (
        torch.tensor([[2, 0, -1], [-1, -1, -1]]),
        torch.tensor([[math.log(0.5), math.log(0.3), -math.inf], [-math.inf] * 3]),
        torch.tensor([2, 0]),
        torch.tensor([0.2, 1.0]).log(),
    )
    for tail, teacher, student in [
        ("bucket", [[0.5, 0.3, 0, 0.2], [0, 0, 0, 1]], [[0.3, 0.1, 0, 0.6], [0, 0, 0, 1]]),
        ("renormalise", [[0.625, 0.375, 0], [0, 0, 0]], [[0.75, 0.25, 0], [0, 0, 0]]),
        ("uniform", [[0.3, 0.1, 0.5, 0.1], [0.25] * 4], [[0.1, 0.2, 0.3, 0.4]] * 2),
    ]:
        log_p, log_q = align(q, *entries, tail, vocab_size=4)  # type: ignore[arg-type]
        torch.testing.assert_close(log_p.exp(), torch.tensor(teacher, dtype=torch.float32))
        torch.testing.assert_close(log_q.exp(), torch.tensor(student, dtype=torch.float32))


def test_no_entries_at_all() -> None:
    q = logits(0, num_positions=2)
    entries = (torch.zeros(2, 0).long(), torch.zeros(2, 0), torch.zeros(2).long(), torch.zeros(2))
    for tail, width in [("bucket", 1), ("renormalise", 0), ("uniform", VOCAB)]:
        log_p, log_q = align(q, *entries, tail, vocab_size=VOCAB)  # type: ignore[arg-type]
        assert log_p.shape == log_q.shape == (2, width)
    for name in NAMES:
        for tail in ("bucket", "renormalise"):
            value = divergence(name, *align(q, *entries, tail, vocab_size=VOCAB))  # type: ignore[arg-type]
            torch.testing.assert_close(value, torch.zeros(2), rtol=0, atol=1e-7)


def test_the_students_tail_is_computed_without_cancellation() -> None:
    # 1 - q(0) is 0 in float32; the rest is two tokens of e^-30
    q = torch.tensor([[30.0, 0.0, 0.0]])
    entries = (torch.tensor([[0]]), torch.tensor([[-1e-3]]), torch.tensor([1]), torch.tensor([-7.0]))
    _, log_q = align(q, *entries, "bucket", vocab_size=3)
    assert math.isclose(float(log_q[0, 1]), math.log(2) - 30, rel_tol=1e-6)


def test_a_padded_vocabulary_has_student_mass_and_no_teacher_mass() -> None:
    p, q = logits(0), logits(1, vocab=VOCAB + 3)
    log_p, log_q = aligned(p, q, 4, "uniform")
    assert torch.isneginf(log_p[:, VOCAB:]).all()
    torch.testing.assert_close(log_q, q.log_softmax(1))
    likeliest = p.log_softmax(1).sort(dim=1, descending=True).values
    outside = log_p[:, :VOCAB].sort(dim=1, descending=True).values[:, 4:]
    torch.testing.assert_close(outside, (likeliest[:, 4:].logsumexp(1, keepdim=True) - math.log(5)).expand(4, 5))
    # as one bucket, that mass belongs to the tail
    _, log_q = aligned(p, q, VOCAB, "bucket")
    torch.testing.assert_close(log_q[:, -1], q.log_softmax(1)[:, VOCAB:].logsumexp(1))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_rules_its_padding_out_is_as_wide_as_the_vocabulary(name: str, tail: Tail) -> None:
    entries = top(logits(0).log_softmax(1), [0, 3, VOCAB, VOCAB - 1])
    narrow = logits(1).requires_grad_()
    wide = functional.pad(narrow, (0, 2), value=-math.inf)
    wide.retain_grad()
    value = divergence(name, *align(wide, *entries, tail, vocab_size=VOCAB))
    expected = divergence(name, *align(narrow, *entries, tail, vocab_size=VOCAB))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    value.sum().backward()
    assert wide.grad is not None
    assert wide.grad.isfinite().all()


def test_a_teacher_s_rounded_logs_are_normalised() -> None:
    ids, values, counts, rest = top(logits(0).log_softmax(1), [5] * 4)
    for tail in TAILS:
        log_p, _ = align(logits(1), ids, values.bfloat16(), counts, rest, tail, vocab_size=VOCAB)
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(4))


def test_impossible_alignments_are_refused() -> None:
    entries = top(logits(0).log_softmax(1), [2] * 4)
    with pytest.raises(ValueError, match="8 logits for a vocabulary of 9"):
        align(logits(0, vocab=8), *entries, "uniform", vocab_size=VOCAB)
    with pytest.raises(ValueError, match="tail is 'drop'"):
        align(logits(0), *entries, "drop", vocab_size=VOCAB)  # type: ignore[arg-type]
