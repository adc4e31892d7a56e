"""The mass outside the kept entries, against the full distribution."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpkd.teacher_cache.distributions import MASS_RESOLUTION, from_top_k, log_remainder


def test_remainder_by_hand() -> None:
    # p = 1/2, 1/4 kept of four tokens: 1/4 is outside
    top = np.log(np.array([[0.5, 0.25]], np.float32))
    rest = log_remainder(top, np.log(np.array([0.5], np.float32)), np.array([False]), vocab_size=4)
    assert math.isclose(float(rest[0]), math.log(0.25), abs_tol=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0.1, 20))
def test_remainder_is_the_mass_outside(seed: int, top_k: int, scale: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, 40)) * scale
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ranked = -np.sort(-logprobs, axis=1)
    rest = log_remainder(ranked[:, :top_k].astype(np.float32), ranked[:, 0], np.zeros(3, bool), vocab_size=40)
    true = np.exp(ranked[:, top_k:]).sum(axis=1)
    assert np.isfinite(rest).all()
    assert (np.abs(np.exp(rest.astype(np.float64)) - true) <= 3 * MASS_RESOLUTION).all()


def test_nothing_is_outside_a_whole_vocabulary() -> None:
    top = np.log(np.full((1, 4), 0.25, np.float32))
    assert log_remainder(top, top[:, 0], np.array([False]), vocab_size=4)[0] == -np.inf


def test_a_sampled_token_outside_keeps_its_own_mass() -> None:
    # the kept entry claims everything, yet a token of probability 1e-4 was drawn from outside
    top = np.zeros((1, 1), np.float32)
    rest = log_remainder(top, np.log(np.array([1e-4], np.float32)), np.array([True]), vocab_size=10)
    assert float(rest[0]) >= math.log(1e-4) - 1e-6


def test_entries_without_mass_are_left_out() -> None:
    ids = np.array([[7, 3, 1]])
    logprobs = np.array([[0.0, -np.inf, -np.inf]], np.float32)
    top = from_top_k(ids, logprobs, np.array([7]), np.array([0.0], np.float32), vocab_size=10)
    assert top.counts_T.tolist() == [1]
    assert top.ids_E.tolist() == [7]
