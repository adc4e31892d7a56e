"""The log-prob codec: its error bound, exactness on the grid, and errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.teacher_cache.store.codec import GRID_NATS, MAX_ERROR_NATS, decode_logprobs, encode_logprobs


@st.composite
def ranked_positions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    parts = [
        sorted(draw(st.lists(st.floats(-450, 0, width=32), min_size=count, max_size=count)), reverse=True)
        for count in counts
    ]
    return np.array([x for part in parts for x in part], np.float32), np.array(counts, np.int32)


@given(ranked_positions())
def test_every_logprob_is_within_half_a_grid_step(case: tuple[np.ndarray, np.ndarray]) -> None:
    logprobs, counts = case
    decoded = decode_logprobs(encode_logprobs(logprobs, counts), counts)
    assert decoded.shape == logprobs.shape
    # far from 0, float32 is coarser than the grid: one unit in the last place is allowed in addition
    allowed = MAX_ERROR_NATS + np.spacing(np.abs(logprobs).astype(np.float32))
    assert (np.abs(decoded.astype(np.float64) - logprobs) <= allowed).all()


def test_steps_by_hand() -> None:
    # two positions: 0.5 and 1.0 nats below 0, then 2 nats; a step is 1/128 nat
    steps = encode_logprobs(np.array([-0.5, -1.0, -2.0], np.float32), np.array([2, 1]))
    assert steps.tolist() == [64, 64, 256]
    assert decode_logprobs(steps, np.array([2, 1])).tolist() == [-0.5, -1.0, -2.0]


def test_grid_values_survive_exactly_and_empty_positions_are_kept_apart() -> None:
    logprobs = np.array([0.0, -GRID_NATS, -3.25], np.float32)
    counts = np.array([0, 2, 0, 1])
    assert decode_logprobs(encode_logprobs(logprobs, counts), counts).tolist() == logprobs.tolist()
    assert decode_logprobs(encode_logprobs(logprobs[:0], counts[:1]), counts[:1]).tolist() == []


def test_a_rounding_hair_above_zero_is_zero() -> None:
    assert encode_logprobs(np.array([1e-7], np.float32), np.array([1])).tolist() == [0]


@pytest.mark.parametrize("values", [[-2.0, -1.0], [-600.0]])
def test_wrong_order_and_too_deep_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="rank order"):
        encode_logprobs(np.array(values, np.float32), np.array([len(values)]))
