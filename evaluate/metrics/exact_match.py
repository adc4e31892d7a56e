"""Scores of one answer against its references, and measures of the answers alone."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dpkd.evaluate.metrics.rouge import RougeTokenizer, rouge

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
#: words in the runs whose repetition within an answer is measured
REPEATED_RUN = 4


class Scores(NamedTuple):
    """What is measured of one answer; the names are those of the report.

    Rouge and exact match run from 0 to 100, `num_words` counts white-space words, `self_repetition` is the share of the
    answer's runs of four words that stand in it before (0 to 100).
    """

    rouge_l: float
    exact_match: float
    rouge_1: float
    rouge_2: float
    num_words: float
    self_repetition: float


def score(prediction: str, references: Sequence[str], tokenizer: RougeTokenizer = "default") -> Scores:
    """All scores of one answer; raises `ValueError` when there is no reference."""
    found = rouge(prediction, references, tokenizer)
    return Scores(
        rouge_l=found.rouge_l,
        exact_match=exact_match(prediction, references),
        rouge_1=found.rouge_1,
        rouge_2=found.rouge_2,
        num_words=float(len(prediction.split())),
        self_repetition=self_repetition(prediction),
    )


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure of `prediction`, the best over `references`, from 0 to 100, with Rouge's own tokens.

    Raises `ValueError` when there is no reference.
    """
    return rouge(prediction, references).rouge_l


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 when `prediction` equals one of `references` after `normalise`, else 0.

    Raises `ValueError` when there is no reference.
    """
    if not references:
        raise ValueError("exact match needs at least one reference")
    ours = normalise(prediction)
    return 100.0 if any(ours == normalise(reference) for reference in references) else 0.0


def normalise(text: str) -> str:
    """`text` lower-cased, without ASCII punctuation, white space squeezed to single spaces; articles stay.

    Source: `normalize_answer` of MiniLLM's `rouge_metric.py`; SQuAD's namesake drops articles too.
    """
    return " ".join(text.lower().translate(_DROP_PUNCTUATION).split())


def self_repetition(text: str) -> float:
    """Share of the runs of four lower-cased words that repeat an earlier one, from 0 to 100; 0 for fewer words."""
    runs = _runs(text, REPEATED_RUN)
    return 100.0 * (1 - len(set(runs)) / len(runs)) if runs else 0.0


def distinct(texts: Iterable[str], size: int) -> float | None:
    """Distinct-n (Li et al., 2016): different runs of `size` lower-cased words over all runs of all texts, 0 to 100.

    It falls as there is more text, so compare sets of like size. None where no text has so many words.
    """
    total, different = 0, set()
    for text in texts:
        runs = _runs(text, size)
        total += len(runs)
        different.update(runs)
    return 100.0 * len(different) / total if total else None


def _runs(text: str, size: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]
