"""Length buckets: rows by the length of their gold response (paper, Tables 4-5 and Fig. 5), or answers by their own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, NamedTuple

#: an edge of the buckets: a length, or a statistic of the set's gold responses
Statistic = Literal["median", "mean"]
Edge = int | Statistic


class Bucket(NamedTuple):
    """Rows of at least `low` words (or tokens) and fewer than `high`; `high` None: no upper end."""

    low: int
    high: int | None

    @property
    def label(self) -> str:
        """The half-open range as text: `[30,70)`."""
        return f"[{self.low},{'inf' if self.high is None else self.high})"


def resolve_edges(edges: Sequence[Edge], lengths: Sequence[int]) -> tuple[int, ...]:
    """The edges as rising lengths; `median` and `mean` are those of `lengths`, rounded (at least 1).

    Equal edges become one: a set whose median equals its mean has one bucket less.
    """
    from statistics import mean, median  # late: the options import this module, and --help must be quick

    statistics = {"median": median, "mean": mean}
    known = (max(1, round(statistics[edge](lengths))) if isinstance(edge, str) else edge for edge in edges)
    return tuple(sorted({*known}))


def buckets_of(edges: Sequence[int]) -> list[Bucket]:
    """The `len(edges) + 1` buckets into which strictly rising, positive `edges` split [0, inf)."""
    bounds: list[int | None] = [*edges, None]
    return [Bucket(low, high) for low, high in zip([0, *edges], bounds, strict=True)]


def bucket_index(length: int, edges: Sequence[int]) -> int:
    """The index of the bucket of `length`. Left-closed: 30 words with edges (30, 70) are in bucket 1.

    The paper does not state the side; its percentages on DollyEval imply left-closed (233/108/159 rows).
    """
    return bisect_right(edges, length)


def num_words(references: Sequence[str]) -> int:
    """White-space words of the gold response, the first reference. Raises `ValueError` without one."""
    if not references:
        raise ValueError("a row without a reference has no length bucket")
    return len(references[0].split())
