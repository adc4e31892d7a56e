"""Rouge equal to `rouge_score` to the last digit, with each tokenizer; and texts whose letters it loses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from support.toys import ROOT

from dpkd.evaluate.metrics.rouge import RougeTokenizer, find_lost_text, longest_common_subsequence, rouge

_KINDS = ["rouge1", "rouge2", "rougeL"]
_DOLLY = ROOT / "examples" / "dolly" / "heldout.jsonl"


class _Plain(Tokenizer):
    """The library's own seam for tokens."""

    def __init__(self, split: Callable[[str], list[str]]) -> None:
        self._split = split

    def tokenize(self, text: str) -> list[str]:
        return self._split(text.lower())


def _library(prediction: str, references: list[str], scorer: RougeScorer) -> tuple[float, ...]:
    scores = scorer.score_multi(references, prediction)
    return tuple(100.0 * scores[kind].fmeasure for kind in _KINDS)


_SCORER = RougeScorer(_KINDS, use_stemmer=True)
_BY_TOKENIZER: dict[RougeTokenizer, RougeScorer] = {
    "whitespace": RougeScorer(_KINDS, tokenizer=_Plain(str.split)),
    "character": RougeScorer(_KINDS, tokenizer=_Plain(lambda text: [c for c in text if not c.isspace()])),
}
_WORDS = st.lists(
    st.sampled_from(["the", "cats", "running", "Running", "ran", "42", "don't", "été", "猫が", "a", "b", "generously"])
)
_TEXTS = st.one_of(st.text(max_size=80), _WORDS.map(" ".join))


@given(prediction=_TEXTS, references=st.lists(_TEXTS, min_size=1, max_size=3))
def test_every_digit_is_the_librarys(prediction: str, references: list[str]) -> None:
    assert tuple(rouge(prediction, references)) == _library(prediction, references, _SCORER)


@pytest.mark.parametrize("tokenizer", list(_BY_TOKENIZER))
@given(prediction=_TEXTS, reference=_TEXTS)
def test_other_tokenizers_are_the_librarys_with_those_tokens(
    tokenizer: RougeTokenizer, prediction: str, reference: str
) -> None:
    expected = _library(prediction, [reference], _BY_TOKENIZER[tokenizer])
    assert tuple(rouge(prediction, [reference], tokenizer)) == expected


def test_every_digit_is_the_librarys_on_real_answers() -> None:
    outputs = [json.loads(line)["output"] for line in _DOLLY.read_text(encoding="utf-8").splitlines()]
    for prediction, reference in zip(outputs, outputs[1:] + outputs[:1], strict=True):
        assert tuple(rouge(prediction, [reference])) == _library(prediction, [reference], _SCORER)


def test_rouge_1_and_2_by_hand() -> None:
    # unigrams: the x1, cat, sat in common, 3 of 3 and 3 of 6; bigrams: "the cat", "cat sat", 2 of 2 and 2 of 5
    found = rouge("the cat sat", ["the cat sat on the mat"])
    assert found.rouge_1 == pytest.approx(100 * 2 / 3)
    assert found.rouge_2 == pytest.approx(100 * 4 / 7)


def test_each_score_takes_its_own_best_reference() -> None:
    # the first reference has the words, the second a pair of them
    found = rouge("a b c d", ["d c b a", "a b x y"])
    assert found.rouge_1 == 100.0
    assert found.rouge_2 == pytest.approx(100 / 3)


@pytest.mark.parametrize(("left", "right", "common"), [("", "abc", 0), ("abc", "", 0), ("abcbdab", "bdcaba", 4)])
def test_longest_common_subsequence_by_hand(left: str, right: str, common: int) -> None:
    # Cormen et al., section 15.4: BCBA is one of the longest of ABCBDAB and BDCABA
    assert longest_common_subsequence(left, right) == common


def test_no_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        rouge("anything", [])


def test_texts_of_other_scripts_are_found_and_the_way_out_scores_them() -> None:
    chinese, mixed, english = "\u732b\u304c\u5ea7\u3063\u305f", "\u043c\u043e\u0441\u043a\u0432\u0430 ok", "a cat"
    rows = [(chinese,), (mixed,), (english,), (chinese, english)]
    lost = find_lost_text(rows, "default")
    assert lost._asdict() == {"num_rows": 4, "num_all_lost": 1, "num_mostly_lost": 1}
    assert lost.message is not None
    assert "of 4 rows, 1 have no reference with a letter a-z or a digit and always score Rouge 0" in lost.message
    assert "--rouge-tokenizer whitespace, or character" in lost.message
    assert rouge(chinese, [chinese]).rouge_l == 0.0
    assert rouge(chinese, [chinese], "character").rouge_l == 100.0
    assert find_lost_text(rows, "character").message is None
    assert find_lost_text([("Caf\u00e9 au lait",)], "default").message is None
