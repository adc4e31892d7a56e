"""The bootstrap interval: hand cases, normal theory, coverage of a known mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.evaluate.metrics import bootstrap
from dpkd.evaluate.metrics.bootstrap import Interval, mean_intervals, ratio_interval


def mean_interval(values_SN: np.ndarray, num_bootstrap: int, seed: int) -> Interval:
    return mean_intervals(values_SN[None], num_bootstrap, seed)[0]


def test_two_rows_by_hand() -> None:
    # resample means of {0, 1} are 0, 0.5, 1 with 1/4, 1/2, 1/4: both 2.5% tails lie at the ends
    assert mean_interval(np.array([[0.0, 1.0]]), 1000, 0) == Interval(0.5, 0.0, 1.0)


def test_one_row_is_its_own_interval() -> None:
    assert mean_interval(np.array([[40.0], [60.0]]), 1000, 0) == Interval(50.0, 50.0, 50.0)


def test_no_row_has_no_value() -> None:
    assert mean_interval(np.empty((5, 0)), 1000, 0) == Interval(None, None, None)


def test_no_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        mean_interval(np.empty((0, 5)), 1000, 0)


def test_seeds_are_averaged_before_rows_are_drawn() -> None:
    # both rows average to 0.5, so nothing varies between rows, however much the seeds differ
    assert mean_interval(np.array([[0.0, 1.0], [1.0, 0.0]]), 1000, 0) == Interval(0.5, 0.5, 0.5)


def test_a_large_sample_agrees_with_normal_theory() -> None:
    values = np.array([[0.0, 1.0] * 500])
    half_width = 1.96 * math.sqrt(0.25 / 1000)
    interval = mean_interval(values, 4000, 3)
    assert interval.low == pytest.approx(0.5 - half_width, abs=0.004)
    assert interval.high == pytest.approx(0.5 + half_width, abs=0.004)


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        interval = mean_interval(generator.exponential(1.0, size=(1, 80)), 200, trial)
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 1.0 <= interval.high
    # the percentile bootstrap of 80 skewed values covers a little less than it says
    assert 0.88 <= covered / 300 <= 0.985


@given(
    values=st.lists(st.floats(0, 100), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
)
def test_the_mean_lies_inside_and_equal_inputs_give_equal_intervals(values: list[float], seed: int) -> None:
    values_SN = np.array([values])
    interval = mean_interval(values_SN, 400, seed)
    assert interval.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    assert interval.low is not None
    assert interval.high is not None
    assert min(values) - 1e-9 <= interval.low <= interval.mean + 1e-9
    assert interval.mean - 1e-9 <= interval.high <= max(values) + 1e-9
    assert mean_interval(values_SN, 400, seed) == interval


def test_chunks_cover_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    # a chunk of 7 does not divide 1000; a resample left out would stay uninitialised, far from the hand case
    monkeypatch.setattr(bootstrap, "_MAX_DRAWS", 14)
    assert mean_interval(np.array([[0.0, 1.0]]), 1000, 0) == Interval(0.5, 0.0, 1.0)


def test_a_ratio_of_two_rows_by_hand() -> None:
    # 2 nats of 1 token and 4 of 4: resamples are 2/1, 6/5 and 4/4; the row without a value is never drawn
    sums_N, weights_N = np.array([2.0, math.nan, 4.0]), np.array([1, 9, 4])
    assert ratio_interval(sums_N, weights_N, 1000, 0) == Interval(1.2, 1.0, 2.0)
    assert ratio_interval(np.full(2, math.nan), np.ones(2), 1000, 0) == Interval(None, None, None)


def test_a_ratio_of_many_rows_agrees_with_the_delta_method() -> None:
    generator = np.random.default_rng(5)
    tokens_N = generator.integers(1, 200, size=2000).astype(float)
    nats_N = tokens_N * generator.gamma(4.0, 0.5, size=2000)
    ratio = nats_N.sum() / tokens_N.sum()
    half_width = 1.96 * math.sqrt(((nats_N - ratio * tokens_N) ** 2).sum()) / tokens_N.sum()
    interval = ratio_interval(nats_N, tokens_N, 4000, 3)
    assert interval.mean == pytest.approx(ratio)
    assert interval.low == pytest.approx(ratio - half_width, abs=0.06 * half_width)
    assert interval.high == pytest.approx(ratio + half_width, abs=0.06 * half_width)
