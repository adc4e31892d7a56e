"""Rouge-1, Rouge-2 and Rouge-L, equal to `rouge_score` to the last digit and several times as fast.

Tokens and stems are the library's own, each distinct word stemmed once. Only the longest common subsequence is ours:
`rouge_score` fills a table of |prediction| x |reference| cells in Python for each pair; here a row is computed at a
time in the bits of one integer (Hyyro, 2004, "Bit-parallel LCS-length computation revisited").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from rouge_score.tokenizers import DefaultTokenizer

RougeTokenizer = Literal["default", "whitespace", "character"]


class Rouge(NamedTuple):
    """F-measures from 0 to 100, each the best over the references."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


def rouge(prediction: str, references: Sequence[str], tokenizer: RougeTokenizer = "default") -> Rouge:
    """The Rouge scores of `prediction`; each is the best over `references` by itself, as `score_multi` has it.

    Raises `ValueError` when there is no reference.
    """
    if not references:
        raise ValueError("Rouge needs at least one reference")
    tokens = tokenize(prediction, tokenizer)
    pairs = [_of_pair(tokens, tokenize(reference, tokenizer)) for reference in references]
    return Rouge(*(max(scores) for scores in zip(*pairs, strict=True)))


def tokenize(text: str, tokenizer: RougeTokenizer) -> tuple[str, ...]:
    """What Rouge compares.

    `default` is `rouge_score`'s: lower-cased runs of a-z and 0-9, stemmed (Porter) when over three characters; letters
    of every other script are lost. `whitespace` keeps lower-cased words whole, `character` every lower-cased character
    but white space; neither stems.
    """
    if tokenizer == "whitespace":
        return tuple(text.lower().split())
    if tokenizer == "character":
        return tuple("".join(text.lower().split()))
    return _default_tokens(text)


@lru_cache(maxsize=16384)  # a reference meets the answers of every model and seed
def _default_tokens(text: str) -> tuple[str, ...]:
    return tuple(_library_tokenizer().tokenize(text))


@cache
def _library_tokenizer() -> DefaultTokenizer:
    # imported late: nltk takes a fifth of a second, and the command line reads this module for its options
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=True)
    # words repeat: without a cache the stemmer takes most of the time of scoring
    tokenizer._stemmer.stem = lru_cache(maxsize=2**18)(tokenizer._stemmer.stem)
    return tokenizer


def _of_pair(prediction: tuple[str, ...], reference: tuple[str, ...]) -> Rouge:
    return Rouge(
        _n_gram_f(prediction, reference),
        _n_gram_f(tuple(pairwise(prediction)), tuple(pairwise(reference))),
        _f_measure(longest_common_subsequence(prediction, reference), len(prediction), len(reference)),
    )


def _n_gram_f(prediction: Sequence[object], reference: Sequence[object]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    return _f_measure(common, len(prediction), len(reference))


def _f_measure(common: int, num_predicted: int, num_reference: int) -> float:
    # the library's own order of operations: any other gives other last digits
    precision = common / max(num_predicted, 1)
    recall = common / max(num_reference, 1)
    return 100.0 * (2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """How many tokens the two have in common in the same order."""
    if len(left) > len(right):
        left, right = right, left
    places: dict[str, int] = {}
    for place, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << place
    all_ones = (1 << len(left)) - 1
    row = all_ones  # bit i is 0 where the row's value rises at token i
    for token in right:
        matches = row & places.get(token, 0)
        if matches:
            row = ((row + matches) | (row - matches)) & all_ones
    return len(left) - row.bit_count()
