"""Intervals and tests of means: hand cases, published tables, and what simulations with known means say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.evaluate.metrics import inference
from dpkd.evaluate.metrics.inference import (
    SCORES,
    Difference,
    Interval,
    holm,
    mean_intervals,
    paired_differences,
    ratio_interval,
    share_intervals,
)


def mean_interval(values_SN: np.ndarray) -> Interval:
    return mean_intervals(values_SN[None])[0]


def paired(differences_N: np.ndarray, num_flips: int = 1000) -> Difference:
    return paired_differences(differences_N[None], num_flips, 0)[0]


def covers(interval: Interval | Difference, value: float) -> bool:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= value <= interval.high


# Values as Rouge-L has them: a share of zeros, and skewed scores above 0 (gamma of shape 1.5, mean 12). The mean is
# known. Of 2,000 samples, 0.95 varies by 0.005 (one standard error).
_ZEROS, _NUM_SAMPLES, _MEAN = (0.1, 0.3, 0.7, 0.85), 2000, 12.0


def _scores(generator: np.random.Generator, zeros: float, num_rows: int, num_samples: int) -> np.ndarray:
    shape = (num_samples, num_rows)
    return generator.gamma(1.5, _MEAN / 1.5, shape) * (generator.random(shape) >= zeros)


@pytest.mark.parametrize("num_rows", [5, 10, 25, 50, 100, 500])
def test_intervals_of_means_cover_what_they_say(num_rows: int) -> None:
    """The percentile bootstrap covers 0.84 here with 25 rows of which 85% are zeros, and 0.72 with 10."""
    num_samples = _NUM_SAMPLES if num_rows < 500 else 800
    for zeros in _ZEROS:
        scores_RN = _scores(np.random.default_rng(7), zeros, num_rows, num_samples)
        found = mean_intervals(scores_RN[:, None], SCORES)
        share = np.mean([covers(interval, (1 - zeros) * _MEAN) for interval in found])
        low, high = (0.93, 0.97) if num_rows >= 25 else (0.91, 1.0)
        assert low <= share <= high, (zeros, share)


@pytest.mark.parametrize("num_rows", [5, 10, 25, 50, 100, 500])
def test_equal_models_differ_in_five_of_a_hundred_sets(num_rows: int) -> None:
    """Two models of equal quality: their scores of a row share its difficulty, and differ by chance."""
    num_samples = _NUM_SAMPLES if num_rows < 500 else 800
    for zeros in _ZEROS:
        generator = np.random.default_rng(11)
        ours, theirs = (_scores(generator, zeros, num_rows, num_samples) for _ in range(2))
        rows = np.split(ours - theirs, num_samples // 25)  # as families of 25, which share their sign flips
        found = [row for index, family in enumerate(rows) for row in paired_differences(family, 999, index)]
        positive = np.mean([row.p_value is not None and row.p_value < 0.05 for row in found])
        covered = np.mean([covers(row, 0) for row in found])
        assert positive <= 0.07, (zeros, positive)
        assert covered >= 0.93, (zeros, covered)
        if num_rows >= 25:
            # of 25 rows with 85% zeros only 7 differ, and few p-values are possible
            assert positive >= (0.03 if num_rows > 25 else 0.025), (zeros, positive)
            assert covered <= 0.98, (zeros, covered)


@pytest.mark.parametrize("zeros", _ZEROS)
def test_intervals_of_differences_cover_the_gain_of_a_better_model(zeros: float) -> None:
    generator = np.random.default_rng(13)
    theirs = _scores(generator, zeros, 40, _NUM_SAMPLES)
    ours = generator.gamma(2.0, 8.0, theirs.shape) * (generator.random(theirs.shape) >= zeros / 2)
    found = [row for family in np.split(ours - theirs, 80) for row in paired_differences(family, 100, 0)]
    gain = 16.0 * (1 - zeros / 2) - _MEAN * (1 - zeros)
    assert 0.93 <= np.mean([covers(row, gain) for row in found]) <= 0.975


@pytest.mark.parametrize(("share", "num_rows"), [(0.0063, 159), (0.0185, 108), (0.3, 40)])
@pytest.mark.parametrize(("num_seeds", "correlation"), [(1, 0.0), (5, 0.0), (5, 0.3), (5, 0.9)])
def test_intervals_of_rare_hits_cover_what_they_say(
    share: float, num_rows: int, num_seeds: int, correlation: float
) -> None:
    """The paper's own rates of exact matches; the percentile bootstrap covers 0.61 and 0.84 of the first two."""
    generator = np.random.default_rng(17)
    shape = (1000, 1, num_rows)
    chance = np.full(shape, share)
    if correlation:  # beta-binomial: rows differ in how easy a hit is
        spread = (1 - correlation) / correlation
        chance = generator.beta(share * spread, (1 - share) * spread, shape)
    hits = 100.0 * (generator.random((1000, num_seeds, num_rows)) < chance)
    # a share of a few hits takes few values, so that coverage jumps (Brown, Cai and DasGupta, 2001)
    assert 0.905 <= np.mean([covers(interval, 100 * share) for interval in share_intervals(hits)]) <= 0.99


def test_wilson_by_hand() -> None:
    # 1 of 10: (0.1 + 3.8415 / 20 +- 1.96 sqrt(0.009 + 3.8415 / 400)) / 1.38415
    (interval,) = share_intervals(np.array([[[100.0] + [0.0] * 9]]))
    assert interval == pytest.approx((10.0, 1.79, 40.42), abs=0.01)
    # no hit of 25: 3.8415 / 28.8415
    (interval,) = share_intervals(np.zeros((1, 1, 25)))
    assert interval == pytest.approx((0.0, 0.0, 13.32), abs=0.01)
    (interval,) = share_intervals(np.full((1, 1, 25), 100.0))
    assert interval == pytest.approx((100.0, 86.68, 100.0), abs=0.01)


def test_equal_answers_of_several_seeds_count_once() -> None:
    hits_N = np.array([100.0] * 3 + [0.0] * 27)
    (alone,) = share_intervals(hits_N[None, None])
    (five,) = share_intervals(np.tile(hits_N, (1, 5, 1)))
    assert five == pytest.approx(alone)
    (spread,) = share_intervals(np.concatenate([np.roll(hits_N, 3 * seed)[None, None] for seed in range(5)], axis=1))
    assert spread.mean == alone.mean
    assert (spread.high or 0) - (spread.low or 0) < 0.6 * ((alone.high or 0) - (alone.low or 0))


def test_values_without_skewness_get_students_interval() -> None:
    # mean 3, sd sqrt(2.5); t for 4 degrees of freedom is 2.776
    half = 2.776 * math.sqrt(2.5 / 5)
    assert mean_interval(np.array([[1.0, 2, 3, 4, 5]])) == pytest.approx((3, 3 - half, 3 + half), abs=1e-3)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (10, 2.228), (29, 2.045), (120, 1.980)],
)
def test_students_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert inference._student(degrees) == pytest.approx(quantile, abs=6e-4)


def test_a_skewed_sample_reaches_further_up() -> None:
    interval = mean_interval(np.array([[0.0] * 20 + [30.0, 10.0, 5.0]]))
    assert interval.mean is not None
    assert interval.low is not None
    assert interval.high is not None
    assert interval.high - interval.mean > 1.5 * (interval.mean - interval.low)


def test_few_rows() -> None:
    assert mean_interval(np.array([[40.0], [60.0]])) == Interval(50.0, None, None)
    assert mean_interval(np.empty((5, 0))) == Interval(None, None, None)
    assert share_intervals(np.array([[[100.0]]])) == [Interval(100.0, None, None)]
    # t for 1 degree of freedom is 12.706: two rows say almost nothing
    assert mean_interval(np.array([[0.0, 1.0]])) == pytest.approx((0.5, 0.5 - 6.353, 0.5 + 6.353), abs=1e-3)


def test_equal_values_have_no_width_unless_they_are_at_a_limit() -> None:
    # both rows average to 0.5, so nothing varies between rows, however much the seeds differ
    assert mean_interval(np.array([[0.0, 1.0], [1.0, 0.0]])) == Interval(0.5, 0.5, 0.5)
    (zeros,) = mean_intervals(np.zeros((1, 2, 25)), SCORES)
    assert zeros == pytest.approx((0.0, 0.0, 13.32), abs=0.01)


def test_no_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        mean_interval(np.empty((0, 5)))


def test_answers_that_do_not_count_weigh_nothing() -> None:
    # example 0 has both answers, example 1 one, example 2 none: mean of 10, 20, 60
    values = np.array([[10.0, 60, math.nan], [20, math.nan, math.nan]])
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(30.0)
    # errors (30 - 2 * 30) / 1.5 and (60 - 30) / 1.5: 20 on either side, so t * 20
    assert interval[1:] == pytest.approx((30 - 12.7062 * 20, 30 + 12.7062 * 20))


@given(values=st.lists(st.floats(0, 100), min_size=2, max_size=40))
def test_the_mean_lies_inside_and_the_ends_within_the_limits(values: list[float]) -> None:
    (interval,) = mean_intervals(np.array([[values]]), SCORES)
    assert interval.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    assert interval.low is not None
    assert interval.high is not None
    assert 0 <= interval.low <= interval.mean <= interval.high <= 100


def test_a_ratio_of_many_rows_agrees_with_the_delta_method() -> None:
    generator = np.random.default_rng(5)
    tokens_N = generator.integers(1, 200, size=2000).astype(float)
    nats_N = tokens_N * generator.gamma(4.0, 0.5, size=2000)
    ratio = nats_N.sum() / tokens_N.sum()
    half_width = 1.96 * math.sqrt(((nats_N - ratio * tokens_N) ** 2).sum()) / tokens_N.sum()
    interval = ratio_interval(np.append(nats_N, math.nan), np.append(tokens_N, 9))
    assert interval.mean == pytest.approx(ratio)
    assert interval.low == pytest.approx(ratio - half_width, abs=0.06 * half_width)
    assert interval.high == pytest.approx(ratio + half_width, abs=0.06 * half_width)
    assert ratio_interval(np.full(2, math.nan), np.ones(2)) == Interval(None, None, None)


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([1.0, 2.0], 0.5),
        ([1.0, 2, 3, 4, 5], 0.0625),
        ([-1.0] * 8, 2 / 2**8),
        ([1.0, 2, 3, 4, 5, 0, 0, 0], 0.0625),  # ties say nothing
        ([0.0, 0.0], 1.0),
        ([3.0], 1.0),
        # of +-1 +-2 +-3 the sums 6, 4, -4, -6 and those equal to 4 are as far as 1 - 2 - 3 = -4
        ([1.0, -2.0, -3.0], 0.5),
    ],
)
def test_p_values_of_few_rows_by_hand(differences: list[float], p_value: float) -> None:
    assert paired(np.array(differences)).p_value == pytest.approx(p_value)


def test_exact_p_values_equal_an_enumeration() -> None:
    differences = np.random.default_rng(2).normal(0.4, 1, size=9)
    sums = [abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
            for signs in product((1, -1), repeat=9)]  # fmt: skip
    expected = np.mean([total >= abs(differences.sum()) - 1e-12 for total in sums])
    assert paired(differences).p_value == pytest.approx(expected)


def test_differences_of_scores_do_not_leave_what_is_possible() -> None:
    differences = np.array([[100.0, -100.0], [100.0, 100.0], [-3.0, -5.0]])
    two, equal, small = paired_differences(differences, 100, 0, limits=(-100.0, 100.0))
    assert (two.mean, two.low, two.high) == (0.0, -100.0, 100.0)
    # two rows do not show that it is always so: Wilson's 3.8415 / 5.8415 of the 200 from 100 to -100
    assert (equal.mean, equal.high) == (100.0, 100.0)
    assert equal.low == pytest.approx(100 - 200 * 0.65762, abs=1e-3)
    # Student's t for 1 degree of freedom, and a standard error of 1
    assert (small.low, small.high) == (pytest.approx(-4 - 12.7062), pytest.approx(-4 + 12.7062))


def test_random_flips_agree_with_all_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(3).normal(0.4, 1, size=14)
    exact = paired(differences).p_value
    monkeypatch.setattr(inference, "_MOST_EXACT", 0)
    monkeypatch.setattr(inference, "_MOST_SIGNS", 14 * 999)  # a chunk that does not divide the number of flips
    assert paired(differences, 40_000).p_value == pytest.approx(exact, abs=0.004)


def test_holm_reaches_5_per_cent_with_every_pair_of_30_models() -> None:
    num_pairs = 30 * 29 // 2
    differences = np.random.default_rng(4).normal(0, 1, size=(num_pairs, 60))
    differences[0] += 3
    adjusted = holm([found.p_value for found in paired_differences(differences, 10_000, 0)])
    assert adjusted[0] is not None
    assert adjusted[0] < 0.05


def _families() -> Iterator[list[float | None]]:
    generator = np.random.default_rng(6)
    for index in range(300):
        differences = generator.normal(0, 1, size=(6, 30))
        yield [found.p_value for found in paired_differences(differences, 400, index)]


def test_holm_bounds_the_chance_of_any_false_positive_in_a_family() -> None:
    positive = np.mean([min(p for p in holm(family) if p is not None) < 0.05 for family in _families()])
    assert positive <= 0.08
