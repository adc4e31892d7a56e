"""Rouge-1, Rouge-2 and Rouge-L, equal to `rouge_score` to the last digit and more than ten times as fast.

Tokens and stems are the library's; each distinct word is stemmed once. Only the longest common subsequence is ours:
`rouge_score` fills a table of |prediction| x |reference| cells in Python for each pair; here each row of the table is
the bits of one integer (Hyyro, 2004, "Bit-parallel LCS-length computation revisited").
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
    """The Rouge scores of `prediction`; each is the best over `references`, as in the library's `score_multi`.

    Raises `ValueError` without a reference.
    """
    if not references:
        raise ValueError("Rouge needs at least one reference")
    tokens = tokenize(prediction, tokenizer)
    pairs = [_of_pair(tokens, tokenize(reference, tokenizer)) for reference in references]
    return Rouge(*(max(scores) for scores in zip(*pairs, strict=True)))


def tokenize(text: str, tokenizer: RougeTokenizer) -> tuple[str, ...]:
    """The tokens that Rouge compares, in lower case.

    `default` is `rouge_score`'s tokenizer: sequences of a-z and 0-9, stemmed (Porter) if longer than three characters;
    letters of all other scripts are lost. `whitespace` keeps whole words, `character` each character except white
    space; neither stems.
    """
    if tokenizer == "whitespace":
        return tuple(text.lower().split())
    if tokenizer == "character":
        return tuple("".join(text.lower().split()))
    return _default_tokens(text)


@lru_cache(maxsize=16384)  # each reference is compared with the answers of every model and seed
def _default_tokens(text: str) -> tuple[str, ...]:
    return tuple(_library_tokenizer().tokenize(text))


@cache
def _library_tokenizer() -> DefaultTokenizer:
    # late: importing nltk takes 0.2 s, and the command line imports this module for its options
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=True)
    # words repeat: without a cache, stemming takes most of the scoring time
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
    # the library's order of operations: any other changes the last digits
    precision = common / max(num_predicted, 1)
    recall = common / max(num_reference, 1)
    return 100.0 * (2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence of two texts, in tokens."""
    if len(left) > len(right):
        left, right = right, left
    positions: dict[str, int] = {}  # of each token in `left`, as bits
    for index, token in enumerate(left):
        positions[token] = positions.get(token, 0) | 1 << index
    all_ones = (1 << len(left)) - 1
    row = all_ones  # bit i is 0 if the row's value increases at token i
    for token in right:
        matches = row & positions.get(token, 0)
        if matches:
            row = ((row + matches) | (row - matches)) & all_ones
    return len(left) - row.bit_count()


class LostText(NamedTuple):
    """In how many rows the references lose letters: all of them (the row always scores 0), or more than half."""

    num_rows: int
    num_all_lost: int
    num_mostly_lost: int

    @property
    def message(self) -> str | None:
        """What is lost and how to avoid it; None if no row loses most of its letters."""
        if self.num_all_lost + self.num_mostly_lost == 0:
            return None
        return (
            f"of {self.num_rows} rows, {self.num_all_lost} have no reference with a letter a-z or a digit and always "
            f"score Rouge 0; {self.num_mostly_lost} more lose over half of their letters. Give --rouge-tokenizer "
            "whitespace, or character for scripts without spaces"
        )


def find_lost_text(references: Sequence[Sequence[str]], tokenizer: RougeTokenizer) -> LostText:
    """Count the rows of which `tokenizer` loses letters; the best reference of a row counts."""
    kept = [max(_share_kept(reference, tokenizer) for reference in row) for row in references]
    all_lost = sum(share == 0 for share in kept)
    return LostText(len(kept), all_lost, sum(share < 0.5 for share in kept) - all_lost)


def _share_kept(text: str, tokenizer: RougeTokenizer) -> float:
    if tokenizer != "default":
        return 1.0 if tokenize(text, tokenizer) else 0.0
    letters = [character for character in text.lower() if character.isalnum()]
    return sum(character.isascii() for character in letters) / len(letters) if letters else 0.0
