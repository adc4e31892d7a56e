"""Length buckets: rows by the white-space words of their gold response (paper, Tables 4-5 and Fig. 5)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows whose gold response has `low` words or more and fewer than `high`; `high` None is without end."""

    low: int
    high: int | None

    @property
    def label(self) -> str:
        """The half-open range as text, in words: `[30,70)`."""
        return f"[{self.low},{'inf' if self.high is None else self.high})"


def buckets_of(edges: Sequence[int]) -> list[Bucket]:
    """The `len(edges) + 1` buckets that strictly rising, positive `edges` (words) cut [0, inf) into."""
    bounds: list[int | None] = [*edges, None]
    return [Bucket(low, high) for low, high in zip([0, *edges], bounds, strict=True)]


def bucket_index(num_words: int, edges: Sequence[int]) -> int:
    """Which bucket `num_words` falls in. Left-closed: 30 words with edges (30, 70) are in bucket 1.

    The paper does not state the side; its percentages on DollyEval imply left-closed (233/108/159 rows).
    """
    return bisect_right(edges, num_words)


def num_words(references: Sequence[str]) -> int:
    """White-space words of the gold response, the first reference. Raises `ValueError` without one."""
    if not references:
        raise ValueError("a row without a reference has no length bucket")
    return len(references[0].split())
