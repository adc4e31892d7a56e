"""Scores of one answer against its references, and metrics of the answers alone."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dpkd.evaluate.metrics.rouge import RougeTokenizer, rouge

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_REPEATED_WORDS = 4


class Scores(NamedTuple):
    """The scores of one answer, by their names in the report.

    Rouge and exact match run from 0 to 100, `num_words` counts white-space words, `self_repetition` is the percentage
    of the answer's four-word sequences that repeat an earlier one.
    """

    rouge_l: float
    exact_match: float
    rouge_1: float
    rouge_2: float
    num_words: float
    self_repetition: float


def score(prediction: str, references: Sequence[str], tokenizer: RougeTokenizer = "default") -> Scores:
    """All scores of one answer; raises `ValueError` without a reference."""
    f_measures = rouge(prediction, references, tokenizer)
    return Scores(
        rouge_l=f_measures.rouge_l,
        exact_match=exact_match(prediction, references),
        rouge_1=f_measures.rouge_1,
        rouge_2=f_measures.rouge_2,
        num_words=float(len(prediction.split())),
        self_repetition=self_repetition(prediction),
    )


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if `prediction` equals one of `references` after `normalise`, else 0; `ValueError` without a reference."""
    if not references:
        raise ValueError("exact match needs at least one reference")
    normalised = normalise(prediction)
    return 100.0 if any(normalised == normalise(reference) for reference in references) else 0.0


def normalise(text: str) -> str:
    """`text` in lower case, without ASCII punctuation, white space reduced to single spaces; articles stay.

    Source: `normalize_answer` in MiniLLM's `rouge_metric.py`; the function of that name in SQuAD drops articles too.
    """
    return " ".join(text.lower().translate(_DROP_PUNCTUATION).split())


def self_repetition(text: str) -> float:
    """Percentage of the sequences of four lower-case words that repeat an earlier one; 0 for fewer words."""
    sequences = _word_sequences(text, _REPEATED_WORDS)
    return 100.0 * (1 - len(set(sequences)) / len(sequences)) if sequences else 0.0


def distinct(texts: Iterable[str], size: int) -> float | None:
    """Distinct-n (Li et al., 2016): different sequences of `size` lower-case words over all sequences, in per cent.

    It falls as the amount of text grows, so compare sets of similar size. None if no text has that many words.
    """
    total, different = 0, set()
    for text in texts:
        sequences = _word_sequences(text, size)
        total += len(sequences)
        different.update(sequences)
    return 100.0 * len(different) / total if total else None


def _word_sequences(text: str, size: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[index : index + size]) for index in range(len(words) - size + 1)]
