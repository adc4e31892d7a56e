"""The stemmer is NLTK's, which `rouge_score` uses, on real words and on made-up ones that meet every rule."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from support.toys import ROOT

from dpkd.evaluate.metrics.porter import _IRREGULAR, _STEP_2, _STEP_3, _STEP_4, porter_stem

_DOLLY = ROOT / "examples" / "dolly"
_THEIRS = PorterStemmer()
_SUFFIXES = [
    *(suffix for rules in (_STEP_2, _STEP_3, _STEP_4) for same in rules.values() for suffix, _ in same),
    *("s", "es", "ies", "ied", "eed", "ed", "ing", "sses", "y", "e", "ll", "ly", "at", "bl", "iz"),
]


def _differing(words: set[str]) -> list[tuple[str, str, str]]:
    found = [(word, porter_stem(word), _THEIRS.stem(word)) for word in sorted(words - {""})]
    return [item for item in found if item[1] != item[2]]


def test_words_of_dolly() -> None:
    words: set[str] = set()
    for file in _DOLLY.glob("*.jsonl"):
        words.update(re.findall("[a-z0-9]+", file.read_text(encoding="utf-8").lower()))
    assert len(words) > 5000
    assert _differing(words | set(_IRREGULAR) | set(_THEIRS.pool)) == []


def test_every_suffix_after_made_up_stems() -> None:
    generator = random.Random(0)
    words = {
        "".join(generator.choices("aeioubcdlstyyzwx1", k=generator.randint(0, 5)))
        + "".join(generator.choices(_SUFFIXES, k=generator.randint(1, 3)))
        for _ in range(20_000)
    }
    assert _differing(words) == []


@given(st.text("abdeginlosty1", min_size=1, max_size=12))
def test_any_word(word: str) -> None:
    assert porter_stem(word) == _THEIRS.stem(word)
