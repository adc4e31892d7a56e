"""Log-probs as differences between ranks on a grid: two bytes each, which compress to half a byte.

Entries are in rank order, so their negated log-probs increase. Each is rounded to a multiple of `GRID_NATS` and stored
as the difference to the one before; the first entry of a position is stored as its distance from 0. Rounding happens
before the difference, so errors do not add up: a decoded log-prob differs from the original by at most `GRID_NATS / 2`
(1/256 nat) plus float32 rounding.
"""

from __future__ import annotations

import numpy as np

GRID_NATS = 1 / 128
MAX_ERROR_NATS = GRID_NATS / 2
_STEPS_PER_NAT = 128


def encode_logprobs(logprobs_E: np.ndarray, counts_T: np.ndarray) -> np.ndarray:
    """Steps (uint16) of log-probs (nats) that are in rank order within each position; `counts_T` entries per position.

    Raises ValueError if entries are not in rank order or are below -511 nats.
    """
    levels_E = np.rint(-logprobs_E.astype(np.float64) * _STEPS_PER_NAT).astype(np.int64)
    levels_E = np.maximum(levels_E, 0)  # a float32 log-softmax can end a hair above 0
    steps_E = np.diff(levels_E, prepend=0)
    starts = _starts(counts_T)
    steps_E[starts] = levels_E[starts]
    if len(steps_E) and (steps_E.min() < 0 or steps_E.max() > np.iinfo(np.uint16).max):
        raise ValueError(f"log-probs out of rank order or below -511 nats: steps {steps_E.min()} to {steps_E.max()}")
    return steps_E.astype(np.uint16)


def decode_logprobs(steps_E: np.ndarray, counts_T: np.ndarray) -> np.ndarray:
    """Log-probs (float32, nats) from the steps of `encode_logprobs`."""
    if len(steps_E) == 0:
        return np.zeros(0, np.float32)
    width = int(counts_T[0])
    if (counts_T == width).all():
        # the same number everywhere, the usual case: as a table this is about 1.5 times as fast
        levels_E = np.cumsum(steps_E.reshape(-1, width), axis=1, dtype=np.uint32).reshape(-1)
    else:
        # sums run over position bounds and may wrap; their differences do not
        sums_E = np.cumsum(steps_E, dtype=np.uint32)
        starts = _starts(counts_T)
        before = sums_E[starts] - steps_E[starts]
        levels_E = sums_E - np.repeat(before, counts_T[counts_T > 0])
    return np.multiply(levels_E, np.float32(-GRID_NATS), dtype=np.float32)


def _starts(counts_T: np.ndarray) -> np.ndarray:
    """Index of the first entry of each position that has entries."""
    return (np.cumsum(counts_T, dtype=np.int64) - counts_T)[counts_T > 0]
