"""Length buckets: which side of an edge, and the paper's counts on DollyEval."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.evaluate.metrics.buckets import Bucket, bucket_index, buckets_of, num_words, resolve_edges


@pytest.mark.parametrize(("words", "expected"), [(0, 0), (29, 0), (30, 1), (69, 1), (70, 2), (71, 2), (10**6, 2)])
def test_buckets_are_left_closed(words: int, expected: int) -> None:
    assert bucket_index(words, (30, 70)) == expected


def test_dolly_eval_falls_into_the_counts_of_the_paper() -> None:
    # word counts of the gold responses of DollyEval (databricks-dolly-15k, MiniLLM's test split); the counts are
    # what the percentages of the paper's Table 4 imply
    words = json.loads((Path(__file__).parent / "dolly_eval_words.json").read_text())
    counts = Counter(bucket_index(count, (30, 70)) for count in words)
    assert [counts[0], counts[1], counts[2]] == [233, 108, 159]


def test_labels_say_the_half_open_range() -> None:
    assert [bucket.label for bucket in buckets_of((30, 70))] == ["[0,30)", "[30,70)", "[70,inf)"]
    assert buckets_of((5,)) == [Bucket(0, 5), Bucket(5, None)]


@given(words=st.integers(0, 500), edges=st.lists(st.integers(1, 400), min_size=1, max_size=5, unique=True).map(sorted))
def test_every_row_is_within_its_bucket(words: int, edges: list[int]) -> None:
    bucket = buckets_of(edges)[bucket_index(words, edges)]
    assert bucket.low <= words
    assert bucket.high is None or words < bucket.high


def test_words_are_white_space_words_of_the_first_reference() -> None:
    assert num_words(("two  words\nand-a-third", "one")) == 3
    with pytest.raises(ValueError, match="without a reference"):
        num_words(())


def test_median_and_mean_are_those_of_the_set() -> None:
    words = json.loads((Path(__file__).parent / "dolly_eval_words.json").read_text())
    # the paper's 30 and 70 are these, rounded
    assert resolve_edges(("median", "mean"), words) == (33, 72)
    assert resolve_edges(("mean", 10, "median"), words) == (10, 33, 72)


def test_edges_that_fall_together_are_one() -> None:
    assert resolve_edges(("median", "mean"), [4, 4, 4]) == (4,)
    assert resolve_edges(("median", 4), [3, 4, 5]) == (4,)
    assert resolve_edges(("mean",), [0, 0]) == (1,)  # no bucket is empty by itself
