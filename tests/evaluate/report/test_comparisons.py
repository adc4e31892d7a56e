"""Paired differences: hand cases, closed forms, and coverage on simulated sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.evaluate.metrics.inference import Difference, holm, mean_intervals, paired_differences, smallest_resolvable


def paired_difference(ours_SN: np.ndarray, theirs_SN: np.ndarray, num_sign_flips: int, seed: int) -> Difference:
    """Ours minus theirs, each averaged over its own seeds."""
    return paired_differences((ours_SN.mean(axis=0) - theirs_SN.mean(axis=0))[None], num_sign_flips, seed)[0]


def test_equal_models_tie_everywhere() -> None:
    scores = np.array([[1.0, 2, 3], [3, 2, 1]])
    assert paired_difference(scores, scores[::-1], 1000, 0) == Difference(0, 0, 0, 1.0, 0, 3, 0, 0)


def test_wins_ties_and_losses_are_of_means_over_seeds() -> None:
    ours = np.array([[1.0, 0, 5, 0], [3.0, 0, 5, 1]])
    theirs = np.array([[2.0, 0, 0, 9]])  # another number of seeds
    difference = paired_difference(ours, theirs, 1000, 0)
    assert (difference.wins, difference.ties, difference.losses) == (1, 2, 1)
    assert difference.mean == pytest.approx((0 + 0 + 5 - 8.5) / 4)


def test_a_constant_difference_has_a_tight_interval() -> None:
    theirs = np.arange(40.0)[None]
    difference = paired_difference(theirs + 1, theirs, 999, 0)
    assert (difference.low, difference.high) == (1.0, 1.0)
    assert difference.p_value == 1 / 1000  # the smallest that 999 random flips can give


def test_no_example_has_no_difference() -> None:
    empty = np.empty((1, 0))
    assert paired_difference(empty, empty, 100, 0) == Difference(None, None, None, None, 0, 0, 0, None)


def test_interval_and_p_value_agree_with_the_z_test() -> None:
    generator = np.random.default_rng(5)
    differences = generator.normal(0.25, 1.0, size=400)
    z = differences.mean() / (differences.std(ddof=1) / 20)
    p = math.erfc(abs(z) / math.sqrt(2))
    found = paired_difference(differences[None], np.zeros((1, 400)), 20_000, 0)
    assert found.p_value == pytest.approx(p, rel=0.35, abs=2e-4)
    assert found.low == pytest.approx(differences.mean() - 1.96 * differences.std(ddof=1) / 20, abs=0.01)


def test_p_values_are_uniform_under_the_null_and_intervals_cover() -> None:
    """Two models of equal quality: examples differ in difficulty, seeds scatter within an example."""
    generator = np.random.default_rng(1)
    p_values, covered = [], 0
    for trial in range(600):
        difficulty = generator.normal(0, 5, size=(1, 100))
        ours, theirs = (difficulty + generator.normal(0, 2, size=(3, 100)) for _ in range(2))
        difference = paired_difference(ours, theirs, 400, trial)
        assert difference.p_value is not None
        assert difference.low is not None
        assert difference.high is not None
        p_values.append(difference.p_value)
        covered += difference.low <= 0 <= difference.high
    assert 0.92 <= covered / 600 <= 0.975
    for level in (0.05, 0.25, 0.5, 0.75):
        share = np.mean(np.array(p_values) <= level)
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 600) + 0.01, level


def test_the_interval_of_a_mean_over_nested_seeds_covers_95_times_in_100() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(600):
        scores = 30 + generator.normal(0, 6, size=(1, 200)) + generator.normal(0, 10, size=(5, 200))
        (interval,) = mean_intervals(scores[None])
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 30 <= interval.high
    assert 0.925 <= covered / 600 <= 0.975


def test_the_smallest_resolvable_difference_is_found_in_80_of_100_sets() -> None:
    differences = np.array([-1.0, 1.0] * 50)
    # 2.8016 = 1.9600 + 0.8416, and the standard deviation with N - 1
    assert smallest_resolvable(differences) == pytest.approx(2.8016 * math.sqrt(100 / 99) / 10, abs=1e-4)
    assert smallest_resolvable(np.array([3.0])) is None
    generator = np.random.default_rng(3)
    true_difference = 2.8016 * 4 / math.sqrt(150)  # of a standard deviation of 4
    found = 0
    for trial in range(400):
        ours = generator.normal(true_difference, 4, size=(1, 150))
        p_value = paired_difference(ours, np.zeros((1, 150)), 400, trial).p_value
        assert p_value is not None
        found += p_value < 0.05
    assert 0.73 <= found / 400 <= 0.87


@given(values=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=30))
def test_the_sides_change_sign_and_nothing_else(values: list[tuple[float, float]]) -> None:
    pairs = np.array(values).T
    one = paired_difference(pairs[:1], pairs[1:], 200, 0)
    other = paired_difference(pairs[1:], pairs[:1], 200, 0)
    assert (one.wins, one.ties, one.losses, one.p_value) == (other.losses, other.ties, other.wins, other.p_value)
    assert one.mean is not None
    assert other.mean == pytest.approx(-one.mean)
    assert other.low == pytest.approx(-(one.high or 0.0), abs=1e-9)


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, 0.04 raised to 0.06
    assert holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.06, None, 0.03, 0.06])
    assert holm([]) == []
