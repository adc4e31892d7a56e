"""Rouge-L and exact match of one answer against its references, as the paper's family (MiniLLM) does."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure of `prediction`, the best over `references`, from 0 to 100.

    Tokens are `rouge_score`'s: lower-cased runs of a-z and 0-9, stemmed (Porter) when over three characters.
    Raises `ValueError` when there is no reference.
    """
    if not references:
        raise ValueError("Rouge-L needs at least one reference")
    return max(_rouge_l_of_pair(prediction, reference) for reference in references)


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


@lru_cache(maxsize=65536)  # greedy models and short answers give the same text for many seeds
def _rouge_l_of_pair(prediction: str, reference: str) -> float:
    return 100.0 * float(_scorer().score(target=reference, prediction=prediction)["rougeL"].fmeasure)


@cache
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
