"""The tail mass, against the full distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.teacher_cache.engines.engine import EngineOptions, EngineResult
from dpkd.teacher_cache.engines.top_k import MASS_RESOLUTION, answer_problem, build_result, from_top_k, log_tail


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


def _result(**changes: Any) -> EngineResult:
    ids, logprobs = np.array([5, 3], np.int32), np.log(np.array([0.5, 0.25], np.float32))
    table = np.log(np.array([[0.5, 0.25], [0.5, 0.25]], np.float32))
    values = {"response_ids": ids, "logprobs_T": logprobs, "ids_TK": np.array([[5, 2], [1, 3]]), "logprobs_TK": table}
    values |= changes
    return build_result(0, values["response_ids"], "stop", values["logprobs_T"], values["ids_TK"],
                        values["logprobs_TK"], 600, EngineOptions(max_length=8, top_k=2, dtype="float32"))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("logprobs_T", np.nan, "the model's log-probs are not finite"),
        ("logprobs_T", np.inf, "the model's log-probs are not finite"),
        ("logprobs_T", -np.inf, "the model's log-probs are not finite"),
        ("logprobs_T", 0.1, "a log-prob of the response is above 0: 0.1"),
        ("response_ids", -1, "a response id is below 0: -1"),
        ("ids_TK", -7, "the id of an entry is outside the vocabulary"),
        ("ids_TK", 600, "the id of an entry is outside the vocabulary"),
        ("ids_TK", 2**32 + 5, "the id of an entry is outside the vocabulary"),
        ("logprobs_TK", np.nan, "a log-prob of the distributions is not finite"),
        ("logprobs_TK", np.inf, "a log-prob of the distributions is not finite"),
        ("logprobs_TK", 0.5, "a log-prob of the distributions is above 0: 0.5"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_that_no_model_gives_are_a_problem(name: str, value: float, problem: str) -> None:
    sound = _result()
    assert answer_problem(sound) is None
    shape = (2, 2) if name.endswith("TK") else (2,)
    kinds = {"response_ids": np.array([5, 3], np.int32), "logprobs_T": sound.logprobs_T.copy(),
             "ids_TK": np.array([[5, 2], [1, 3]]),
             "logprobs_TK": np.log(np.array([[0.5, 0.25], [0.5, 0.25]], np.float32))}  # fmt: skip
    for place in np.ndindex(shape):
        changed = kinds[name].copy()
        changed[place] = value
        found = answer_problem(_result(**{name: changed}))
        assert found == problem, (place, found)
