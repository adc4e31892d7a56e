"""The tail mass, against the full distribution."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpkd.teacher_cache.engines.top_k import MASS_RESOLUTION, from_top_k, log_tail


def tail(logprobs: np.ndarray, own: np.ndarray, outside: np.ndarray, vocab_size: int) -> np.ndarray:
    return log_tail(logprobs, np.ones(logprobs.shape, bool), own, outside, vocab_size)


def test_tail_by_hand() -> None:
    # p = 1/2, 1/4 kept of four tokens: 1/4 is outside
    top = np.log(np.array([[0.5, 0.25]], np.float32))
    rest = tail(top, np.log(np.array([0.5], np.float32)), np.array([False]), vocab_size=4)
    assert math.isclose(float(rest[0]), math.log(0.25), abs_tol=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0.1, 20))
def test_the_tail_is_the_mass_outside_the_entries(seed: int, top_k: int, scale: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, 40)) * scale
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ranked = -np.sort(-logprobs, axis=1)
    rest = tail(ranked[:, :top_k].astype(np.float32), ranked[:, 0], np.zeros(3, bool), vocab_size=40)
    true = np.exp(ranked[:, top_k:]).sum(axis=1)
    assert np.isfinite(rest).all()
    assert (np.abs(np.exp(rest.astype(np.float64)) - true) <= 3 * MASS_RESOLUTION).all()


def test_a_full_vocabulary_has_no_tail() -> None:
    top = np.log(np.full((1, 4), 0.25, np.float32))
    assert tail(top, top[:, 0], np.array([False]), vocab_size=4)[0] == -np.inf


def test_a_sampled_token_in_the_tail_keeps_its_probability() -> None:
    # the kept entry claims everything, yet a token of probability 1e-4 was drawn from outside
    top = np.zeros((1, 1), np.float32)
    rest = tail(top, np.log(np.array([1e-4], np.float32)), np.array([True]), vocab_size=10)
    assert float(rest[0]) >= math.log(1e-4) - 1e-6


def test_entries_without_mass_are_left_out() -> None:
    ids = np.array([[7, 3, 1]])
    logprobs = np.array([[0.0, -np.inf, -np.inf]], np.float32)
    top = from_top_k(ids, logprobs, np.array([7]), np.array([0.0], np.float32), vocab_size=10)
    assert top.counts_T.tolist() == [1]
    assert top.ids_E.tolist() == [7]


@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(0.05, 1.0), st.integers(1, 40))
def test_top_mass_keeps_the_smallest_set_that_reaches_it(seed: int, scale: float, mass: float, top_k: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(5, 40)) * scale
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ranked = np.take_along_axis(logprobs, order, axis=1)
    own = order[:, 3]
    top = from_top_k(
        order[:, :top_k],
        ranked[:, :top_k].astype(np.float32),
        own,
        ranked[:, 3].astype(np.float32),
        vocab_size=40,
        top_mass=mass,
    )
    start = 0
    for row, count in enumerate(top.counts_T.tolist()):
        probs = np.exp(ranked[row])
        assert top.ids_E[start : start + count].tolist() == order[row, :count].tolist()
        # one fewer does not reach the mass; this many do, or the cap is met
        assert probs[: count - 1].sum() < mass + 1e-6
        assert count == top_k or probs[:count].sum() > mass - 1e-6
        outside = probs[count:].sum()
        assert abs(np.exp(float(top.log_tail_T[row])) - outside) < 3 * MASS_RESOLUTION
        start += count
    assert start == len(top.ids_E)
