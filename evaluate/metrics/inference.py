"""Means with 95% intervals, and paired differences with p-values, over examples.

An example counts with all of its answers: answers to one prompt are not independent, so counting them one by one would
give intervals that are too narrow. The percentile bootstrap, which most papers use, covers far less than it says where
few rows are not zero (0.61 instead of 0.95 for one exact match in 159 rows); docs/evaluation.md has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

#: the level of tests, and the power that `smallest_resolvable` is about
ALPHA, POWER = 0.05, 0.8
#: with fewer rows than this, reports say "few rows"
FEW_ROWS = 30
#: lowest and highest possible values: of scores, of their differences, of counts and ratios, and of anything
SCORES, DIFFERENCES, COUNTS, ANY = (0.0, 100.0), (-100.0, 100.0), (0.0, math.inf), (-math.inf, math.inf)

_Z = NormalDist().inv_cdf(1 - ALPHA / 2)
_T_OF_FEW = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)  # Student's t for 1 to 5 degrees of freedom
# share of the sample's skewness to correct for: all of it makes intervals of mostly zeros too wide (simulated)
_SKEWNESS = 0.8
_MOST_EXACT = 16  # differences whose 2 ** N sign flips are all counted
_FLIPS_OF_FAMILY = 40  # so that Holm's smallest p-value, 1 / 40 of the family's first step, is below ALPHA
_MOST_SIGNS = 2_000_000  # in memory at once (8 bytes each)


class Interval(NamedTuple):
    """A mean and the ends of its 95% interval, in the values' unit.

    One example has no interval: `low` and `high` are None. All are None without an example.
    """

    mean: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """One model's mean score minus another's on the same examples, and what N examples can say about it.

    `p_value` is of the two-sided sign-flip test. An example counts as won if the first model's score, averaged over
    seeds, is higher. `smallest_resolvable` is the function's value.
    """

    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None
    wins: int
    ties: int
    losses: int
    smallest_resolvable: float | None


def mean_intervals(values_KSN: np.ndarray, limits: tuple[float, float] = ANY) -> list[Interval]:
    """The means of K scores over S seeds by N examples, with their 95% intervals.

    Args:
        values_KSN: any unit; NaN if an answer does not count. An example weighs by its number of answers that count.
        limits: the lowest and highest possible value. They end the intervals, and give one where all values are at a
            limit: 25 zeros do not show that the mean is 0.

    Raises:
        ValueError: there is no seed.
    """
    return [_over_examples(values_SN, limits, _skewed) for values_SN in _checked(values_KSN)]


def share_intervals(values_KSN: np.ndarray) -> list[Interval]:
    """The same for values that are 0 or 100 (a hit): Wilson's interval for a share in per cent.

    The answers count as many as independent ones would (design effect: the variance over examples, divided by that of
    independent answers, at least 1), so that S equal answers to an example count as one.
    """
    return [_over_examples(values_SN, SCORES, _wilson) for values_SN in _checked(values_KSN)]


def ratio_interval(sums_N: np.ndarray, weights_N: np.ndarray) -> Interval:
    """sum(sums) / sum(weights) over N examples, such as nats over tokens, and its 95% interval over examples.

    Both are at least 0. Examples whose sum is NaN do not count; all None if none is left.
    """
    counted_N = ~np.isnan(sums_N)
    return _ratio(sums_N[counted_N].astype(np.float64), weights_N[counted_N].astype(np.float64), COUNTS, _skewed)


def paired_differences(
    differences_KN: np.ndarray,
    num_flips: int,
    seed: int,
    *,
    family_size: int = 0,
    limits: tuple[float, float] = ANY,
) -> list[Difference]:
    """K comparisons of two models over the same N examples: one family of tests, or a part of one of `family_size`.

    `differences_KN` is one model's score minus the other's, each averaged over its own seeds. If the models are equal,
    each difference is as likely as its negative: `p_value` is the share of all sign flips whose mean is at least as far
    from 0. Up to 16 differences that are not 0, all flips are counted; then at least `num_flips` random ones (with the
    observed one more, so that p is never 0), and enough for Holm's adjustment of the family to reach 0.05. `limits` are
    the lowest and highest possible difference, as in `mean_intervals`.
    """
    # averages over seeds of equal scores may differ by rounding
    differences_KN = np.where(np.abs(differences_KN) < 1e-9, 0.0, differences_KN)
    num_flips = max(num_flips, _FLIPS_OF_FAMILY * max(len(differences_KN), family_size))
    p_values = _sign_flip_p_values(differences_KN, num_flips, seed)
    differences = []
    for differences_N, p_value in zip(differences_KN, p_values, strict=True):
        interval = _over_examples(differences_N[None], limits, _skewed)
        wins, losses = int((differences_N > 0).sum()), int((differences_N < 0).sum())
        ties = len(differences_N) - wins - losses
        differences.append(
            Difference(*interval, p_value, wins, ties, losses, smallest_resolvable(differences_N)),
        )
    return differences


def smallest_resolvable(differences_N: np.ndarray) -> float | None:
    """The smallest true mean of N differences that a test at 5% finds with power 80%: (z_0.975 + z_0.8) sd / sqrt(N).

    Normal theory with the standard deviation of these differences; None for fewer than two examples.
    """
    if len(differences_N) < 2:
        return None
    z = _Z + NormalDist().inv_cdf(POWER)
    return z * float(differences_N.std(ddof=1)) / math.sqrt(len(differences_N))


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's adjustment of a family of p-values: it bounds the chance of one false positive in the family."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted


def add_holm(differences: Sequence[dict[str, Any]]) -> None:
    """Add `p_holm`, Holm's adjustment of each `p_value`, to a family of differences."""
    for difference, p_value in zip(differences, holm([found["p_value"] for found in differences]), strict=True):
        difference["p_holm"] = p_value


_Ends = Callable[[float, np.ndarray, np.ndarray, tuple[float, float]], tuple[float, float]]


def _checked(values_KSN: np.ndarray) -> np.ndarray:
    if values_KSN.ndim != 3 or values_KSN.shape[1] == 0:
        raise ValueError(f"values must be [scores, seeds, examples] with at least one seed, not {values_KSN.shape}")
    return values_KSN.astype(np.float64)


def _over_examples(values_SN: np.ndarray, limits: tuple[float, float], ends: _Ends) -> Interval:
    counts_N = (~np.isnan(values_SN)).sum(axis=0)
    counted_N = counts_N > 0
    return _ratio(np.nansum(values_SN, axis=0)[counted_N], counts_N[counted_N], limits, ends)


def _ratio(sums_N: np.ndarray, weights_N: np.ndarray, limits: tuple[float, float], ends: _Ends) -> Interval:
    if len(sums_N) == 0:
        return Interval(None, None, None)
    ratio = float(sums_N.sum() / weights_N.sum())
    if len(sums_N) == 1:
        return Interval(ratio, None, None)
    # the ratio varies as the mean of these values, which have the mean 0 (delta method)
    errors_N = (sums_N - ratio * weights_N) / weights_N.mean()
    low, high = ends(ratio, errors_N, weights_N, limits)
    # rounding may put an end of an interval without width on the wrong side
    return Interval(ratio, min(ratio, max(low, limits[0])), max(ratio, min(high, limits[1])))


def _skewed(
    mean: float, errors_N: np.ndarray, weights_N: np.ndarray, limits: tuple[float, float]
) -> tuple[float, float]:
    """Student's t interval, extended to where it ends after a correction for skewness.

    Student's t covers too little where few of N values are not 0, the corrected interval alone where values of both
    signs are rare; the two together cover about 0.95 in both cases. The correction: T = (mean - mu) / se is nearer to
    Student's t after T + a T^2 / 3 + a^2 T^3 / 27 + a / 6 with a = skewness / sqrt(N), which is monotone (Hall, "On the
    Removal of Skewness by Transformation", 1992).
    """
    num = len(errors_N)
    deviation = float(errors_N.std())
    if deviation <= 1e-9 * max(1.0, abs(mean)):
        return _of_equal(mean, num, limits)
    error = deviation / math.sqrt(num - 1)
    t = _student(num - 1)
    a = _SKEWNESS * float((errors_N**3).mean()) / deviation**3 / math.sqrt(num)
    upper, lower = t, -t
    if abs(a) > 1e-6:
        roots = (math.copysign(abs(x) ** (1 / 3), x) for x in (1 + a * (t - a / 6), 1 - a * (t + a / 6)))
        upper, lower = (3 * (root - 1) / a for root in roots)
    return mean - max(t, upper) * error, mean - min(-t, lower) * error


def _of_equal(mean: float, num: int, limits: tuple[float, float]) -> tuple[float, float]:
    """The interval of N equal values: at a limit, Wilson's for a share of 0 of N at the other limit; else no width."""
    if math.isinf(limits[1] - limits[0]):
        return mean, mean
    reach = (limits[1] - limits[0]) * _Z**2 / (num + _Z**2)
    return (mean - reach if mean >= limits[1] else mean), (mean + reach if mean <= limits[0] else mean)


def _wilson(
    mean: float, errors_N: np.ndarray, weights_N: np.ndarray, limits: tuple[float, float]
) -> tuple[float, float]:
    """Wilson (1927) for a share in per cent, with the number of answers divided by the design effect."""
    num, share = len(errors_N), mean / 100
    independent = share * (1 - share) / float(weights_N.sum())
    # without a hit, or with hits alone, nothing is known of the dependence: the answers to an example count as one
    effective = float(num)
    if independent > 0:
        effect = float(errors_N.var()) / 100**2 / num / independent
        effective = float(weights_N.sum()) / max(1.0, effect)
    middle = share + _Z**2 / (2 * effective)
    reach = _Z * math.sqrt(share * (1 - share) / effective + _Z**2 / (4 * effective**2))
    low, high = ((middle + side * reach) / (1 + _Z**2 / effective) for side in (-1, 1))
    return 100 * low, 100 * high


@cache
def _student(degrees: int) -> float:
    """The 97.5% quantile of Student's t: the Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5)."""
    if degrees <= len(_T_OF_FEW):
        return _T_OF_FEW[degrees - 1]
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (order + 1) for order, term in enumerate(terms))


def _sign_flip_p_values(differences_KN: np.ndarray, num_flips: int, seed: int) -> list[float | None]:
    if differences_KN.shape[1] == 0:
        return [None] * len(differences_KN)
    few_K = (differences_KN != 0).sum(axis=1) <= _MOST_EXACT
    p_values = np.empty(len(differences_KN))
    for index in np.flatnonzero(few_K):
        known = differences_KN[index][differences_KN[index] != 0]
        p_values[index] = _as_far(known[None], _all_signs(len(known)))[0] / 2 ** max(0, len(known) - 1)
    many = differences_KN[~few_K]
    if len(many):
        generator, counts_M = np.random.default_rng(seed), np.zeros(len(many))
        rows = max(1, _MOST_SIGNS // many.shape[1])
        for start in range(0, num_flips, rows):  # shared by all comparisons of the family
            size = (min(rows, num_flips - start), many.shape[1])
            counts_M += _as_far(many, generator.integers(0, 2, size, dtype=np.int8).astype(np.float64) * 2 - 1)
        p_values[~few_K] = (1 + counts_M) / (1 + num_flips)
    return [float(p_value) for p_value in p_values]


def _as_far(differences_KN: np.ndarray, signs_FN: np.ndarray) -> np.ndarray:
    """How many of F sign flips of each comparison have a sum at least as far from 0 [K]."""
    observed_K = np.abs(differences_KN.sum(axis=1)) * (1 - 1e-9)
    counts_K: np.ndarray = (np.abs(differences_KN @ signs_FN.T) >= observed_K[:, None]).sum(axis=1)
    return counts_K


@cache
def _all_signs(num: int) -> np.ndarray:
    """Every sign flip of `num` values whose first sign is plus: the others only change the sign of the sum."""
    if num == 0:
        return np.ones((1, 0))
    codes = np.arange(2 ** (num - 1))[:, None] >> np.arange(num - 1)
    return np.concatenate([np.ones((len(codes), 1)), (codes & 1) * 2.0 - 1], axis=1)
