"""Means with 95% intervals and differences with p-values: percentile bootstrap over examples.

An example is drawn with all of its seeds: answers to one prompt are not independent, so drawing them one by one would
give intervals that are too narrow. The spread between the seeds of an example is part of the spread between the
examples' means, so it counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

#: the level and the power that `smallest_resolvable` is about
ALPHA, POWER = 0.05, 0.8

# drawn indices in memory at once (8 bytes each), so that memory stays bounded for any number of examples
_MAX_DRAWS = 2_000_000
_TAILS = (ALPHA / 2, 1 - ALPHA / 2)


class Interval(NamedTuple):
    """A mean and the ends of its 95% interval, in the values' unit; all None if there is no value."""

    mean: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """One model's mean score minus another's on the same examples, and what N examples can say about it.

    `p_value` is two-sided and agrees with the interval: it is below 0.05 if the interval excludes 0. An example counts
    as won if the first model's score, averaged over seeds, is higher. `smallest_resolvable` is the function's value.
    """

    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None
    wins: int
    ties: int
    losses: int
    smallest_resolvable: float | None


def mean_intervals(values_KSN: np.ndarray, num_bootstrap: int, seed: int) -> list[Interval]:
    """The means of K scores over S seeds by N examples, with their 95% intervals. Equal inputs give equal intervals.

    Args:
        values_KSN: any unit; NaN if an answer does not count. An example weighs by its number of answers that count;
            one without any is not drawn. Scores with the same examples share the draws.
        num_bootstrap: resamples; each is a draw of N examples with replacement.
        seed: of the resampling.

    Raises:
        ValueError: there is no seed.
    """
    if values_KSN.ndim != 3 or values_KSN.shape[1] == 0:
        raise ValueError(f"values must be [scores, seeds, examples] with at least one seed, not {values_KSN.shape}")
    counts_KN = (~np.isnan(values_KSN)).sum(axis=1).astype(np.float64)
    sums_KN = np.nansum(values_KSN.astype(np.float64), axis=1)
    intervals = [Interval(None, None, None)] * len(values_KSN)
    groups: dict[bytes, list[int]] = {}
    for index, counts_N in enumerate(counts_KN):
        if counts_N.any():
            groups.setdefault((counts_N > 0).tobytes(), []).append(index)
    for members in groups.values():
        drawn_N = counts_KN[members[0]] > 0
        sums_MN, counts_MN = sums_KN[members][:, drawn_N], counts_KN[members][:, drawn_N]
        draws = _draws(int(drawn_N.sum()), num_bootstrap, seed)
        means_MB = np.concatenate([(sums_MN @ draws_BN.T) / (counts_MN @ draws_BN.T) for draws_BN in draws], axis=1)
        lows, highs = np.quantile(means_MB, _TAILS, axis=1)
        means = sums_MN.sum(axis=1) / counts_MN.sum(axis=1)
        for index, mean, low, high in zip(members, means, lows, highs, strict=True):
            intervals[index] = Interval(float(mean), float(low), float(high))
    return intervals


def ratio_interval(sums_N: np.ndarray, weights_N: np.ndarray, num_bootstrap: int, seed: int) -> Interval:
    """sum(sums) / sum(weights) over N examples, such as nats over tokens, and its 95% interval over examples.

    Examples whose sum is NaN are not drawn; all None if none is left.
    """
    drawn_N = ~np.isnan(sums_N)
    if not drawn_N.any():
        return Interval(None, None, None)
    sums_N, weights_N = sums_N[drawn_N].astype(np.float64), weights_N[drawn_N].astype(np.float64)
    ratios_B = np.concatenate(
        [(draws_BN @ sums_N) / (draws_BN @ weights_N) for draws_BN in _draws(len(sums_N), num_bootstrap, seed)]
    )
    low, high = np.quantile(ratios_B, _TAILS)
    return Interval(float(sums_N.sum() / weights_N.sum()), float(low), float(high))


def paired_differences(differences_KN: np.ndarray, num_bootstrap: int, seed: int) -> list[Difference]:
    """K comparisons of two models over the same N examples.

    `differences_KN` is one model's score minus the other's, each averaged over its own seeds. Drawing the differences
    cancels what makes an example hard for both. The p-value is twice the smaller share of resampled means on either
    side of 0 (each with one more, so that it is never 0), at most 1.
    """
    num_examples = differences_KN.shape[1]
    if num_examples == 0:
        return [Difference(None, None, None, None, 0, 0, 0, None)] * len(differences_KN)
    # averages over seeds of equal scores may differ by rounding
    differences_KN = np.where(np.abs(differences_KN) < 1e-9, 0.0, differences_KN)
    means_KB = np.concatenate(
        [differences_KN @ draws_BN.T for draws_BN in _draws(num_examples, num_bootstrap, seed)], axis=1
    )
    lows, highs = np.quantile(means_KB / num_examples, _TAILS, axis=1)
    smaller_sides = np.minimum((means_KB <= 0).sum(axis=1), (means_KB >= 0).sum(axis=1))
    differences = []
    for differences_N, low, high, smaller_side in zip(differences_KN, lows, highs, smaller_sides, strict=True):
        wins, losses = int((differences_N > 0).sum()), int((differences_N < 0).sum())
        differences.append(
            Difference(
                mean=float(differences_N.mean()),
                low=float(low),
                high=float(high),
                p_value=min(1.0, 2 * (1 + int(smaller_side)) / (1 + num_bootstrap)),
                wins=wins,
                ties=num_examples - wins - losses,
                losses=losses,
                smallest_resolvable=smallest_resolvable(differences_N),
            )
        )
    return differences


def smallest_resolvable(differences_N: np.ndarray) -> float | None:
    """The smallest true mean of N differences that a test at 5% finds with power 80%: (z_0.975 + z_0.8) sd / sqrt(N).

    Normal theory with the standard deviation of these differences; None for fewer than two examples.
    """
    if len(differences_N) < 2:
        return None
    normal = NormalDist()
    z = normal.inv_cdf(1 - ALPHA / 2) + normal.inv_cdf(POWER)
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


def _draws(num_examples: int, num_bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of N examples is drawn in each resample: float64 [rows, N], `num_bootstrap` rows in all."""
    generator = np.random.default_rng(seed)
    rows = max(1, _MAX_DRAWS // num_examples)
    for start in range(0, num_bootstrap, rows):
        size = min(rows, num_bootstrap - start)
        drawn = generator.integers(0, num_examples, size=(size, num_examples))
        drawn += np.arange(size)[:, None] * num_examples
        yield np.bincount(drawn.ravel(), minlength=size * num_examples).reshape(size, -1).astype(np.float64)
