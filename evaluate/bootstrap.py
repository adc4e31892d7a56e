"""A mean with its 95% interval: percentile bootstrap over examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# drawn indices held at once (8 bytes each), so that memory stays bounded for any number of examples
_MAX_DRAWS = 2_000_000
_TAILS = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its 95% interval, in the values' unit; all None where there is no value."""

    mean: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The form that `report.json` holds."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def mean_interval(values_SN: np.ndarray, num_bootstrap: int, seed: int) -> Interval:
    """The mean of S seeds by N examples and its 95% percentile bootstrap interval.

    An example's value is its mean over seeds, and examples are resampled, not answers: answers to one prompt
    are not independent, so resampling them would promise more than N examples can tell. Equal inputs give
    equal intervals. Raises `ValueError` without a seed.

    Args:
        values_SN: one score per seed and example, any unit.
        num_bootstrap: resamples; each is a draw of N examples with replacement.
        seed: of the resampling.
    """
    if values_SN.ndim != 2 or values_SN.shape[0] == 0:
        raise ValueError(f"values must be [seeds, examples] with a seed or more, not {values_SN.shape}")
    values_N = values_SN.astype(np.float64).mean(axis=0)
    num_examples = len(values_N)
    if num_examples == 0:
        return Interval(None, None, None)
    generator = np.random.default_rng(seed)
    rows = max(1, _MAX_DRAWS // num_examples)
    means = np.empty(num_bootstrap)
    for start in range(0, num_bootstrap, rows):
        stop = min(start + rows, num_bootstrap)
        drawn = generator.integers(0, num_examples, size=(stop - start, num_examples))
        means[start:stop] = values_N[drawn].mean(axis=1)
    low, high = np.quantile(means, _TAILS)
    return Interval(float(values_N.mean()), float(low), float(high))
