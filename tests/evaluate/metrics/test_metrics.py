"""Rouge-L and exact match by hand arithmetic, and against an LCS written here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from dpkd.evaluate.metrics.rouge import rouge
from dpkd.evaluate.metrics.scores import distinct, exact_match, normalise, score, self_repetition


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # LCS 3: precision 3/3, recall 3/6, F = 2 * 1 * 0.5 / 1.5
        ("the cat sat", "the cat sat on the mat", 100 * 2 / 3),
        # Lin (2004), section 3.1: LCS "police the gunman" is 3 of 4; stemming makes kill = killed, hence 4 of 4
        ("police kill the gunman", "police killed the gunman", 100.0),
        # Lin (2004): "the gunman kill police" keeps only "the gunman" in order, 2 of 4
        ("the gunman kill police", "police killed the gunman", 50.0),
        # a subsequence need not be contiguous: a c e, precision 3/5, recall 3/3
        ("a b c d e", "a c e", 75.0),
        ("no word in common", "entirely different text", 0.0),
        ("", "anything", 0.0),
        ("Case, and punctuation!", "case and PUNCTUATION", 100.0),
    ],
)
def test_rouge_l_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert rouge(prediction, [reference]).rouge_l == pytest.approx(expected)


def test_rouge_l_takes_the_best_reference_wherever_it_stands() -> None:
    references = ["entirely different text", "the cat sat on the mat", "a dog ran"]
    for order in (references, references[::-1]):
        assert rouge("the cat sat", order).rouge_l == pytest.approx(100 * 2 / 3)


def _longest_common_subsequence(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for a in left:
        previous = row
        row = [0]
        for j, b in enumerate(right):
            row.append(previous[j] + 1 if a == b else max(previous[j + 1], row[j]))
    return row[-1]


# words of at most three characters are not stemmed, so the arithmetic here is all there is
_WORDS = st.lists(st.sampled_from(["a", "b", "cat", "dog", "7"]), min_size=1, max_size=12)


@given(prediction=_WORDS, reference=_WORDS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
    prediction: list[str], reference: list[str]
) -> None:
    common = _longest_common_subsequence(prediction, reference)
    expected = 100 * 2 * common / (len(prediction) + len(reference))
    assert rouge(" ".join(prediction), [" ".join(reference)]).rouge_l == pytest.approx(expected)


@given(prediction=st.text(max_size=60), references=st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_rouge_l_is_rouge_scores_own(prediction: str, references: list[str]) -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = scorer.score_multi(references, prediction)["rougeL"].fmeasure
    assert rouge(prediction, references).rouge_l == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Answer, is:\n42!", "the answer is 42"),  # articles stay, unlike in SQuAD
        ("well-known", "wellknown"),  # punctuation is dropped, not replaced by a space
        ("\u201cquoted\u201d", "\u201cquoted\u201d"),  # string.punctuation is ASCII
        (" . ", ""),
    ],
)
def test_normalise_by_value(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_exact_match_is_all_or_nothing_over_references() -> None:
    assert exact_match("Paris.", ["London", "paris"]) == 100.0
    assert exact_match("the Paris", ["Paris"]) == 0.0
    assert exact_match("Paris, France", ["Paris", "France"]) == 0.0


@pytest.mark.parametrize("metric", [rouge, exact_match])
def test_no_reference_is_an_error(metric: object) -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        metric("anything", [])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", 0.0),  # no run of four words
        ("a b c d e", 0.0),
        ("a b c d a b c d", 20.0),  # runs abcd bcda cdab dabc abcd: 1 of 5 is a repetition
        ("no no no no No no", 200 / 3),  # one run three times
    ],
)
def test_self_repetition_by_hand(text: str, expected: float) -> None:
    assert self_repetition(text) == pytest.approx(expected)


def test_distinct_by_hand() -> None:
    # words a b a | a c: 3 different of 5; pairs ab ba | ac: no pair over the seam, 3 of 3
    assert distinct(["a b A", "a c"], 1) == pytest.approx(60.0)
    assert distinct(["a b A", "a c"], 2) == 100.0
    assert distinct(["a", ""], 2) is None


def test_all_scores_of_an_answer() -> None:
    found = score("The cat sat.", ["the cat sat"])
    assert found == (100.0, 100.0, 100.0, 100.0, 3.0, 0.0)
    assert found._fields == ("rouge_l", "exact_match", "rouge_1", "rouge_2", "num_words", "self_repetition")
