"""Texts that Rouge's own tokens lose: it keeps a to z and 0 to 9 alone, and the rest would score 0 in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dpkd.evaluate.metrics.rouge import RougeTokenizer, tokenize


@dataclass(frozen=True, slots=True)
class LostText:
    """How many rows' references lose letters: all of them (the row scores 0 whatever the answer), or more than half."""

    num_rows: int
    num_all_lost: int
    num_mostly_lost: int

    @property
    def message(self) -> str | None:
        """A sentence for the person, with the way out; None where no row loses most of its letters."""
        if self.num_all_lost + self.num_mostly_lost == 0:
            return None
        return (
            f"of {self.num_rows} rows {self.num_all_lost} have no reference with a letter a-z or a digit and score "
            f"Rouge 0 whatever the answer, {self.num_mostly_lost} more lose over half of their letters: give "
            "--rouge-tokenizer whitespace, or character for scripts without spaces"
        )

    def as_dict(self) -> dict[str, int]:
        """The form that `report.json` holds."""
        return asdict(self)


def find_lost_text(references: Sequence[Sequence[str]], tokenizer: RougeTokenizer) -> LostText:
    """Count the rows of which `tokenizer` loses letters; a row is as good as its best reference."""
    kept = [max(_share_kept(reference, tokenizer) for reference in row) for row in references]
    all_lost = sum(share == 0 for share in kept)
    return LostText(len(kept), all_lost, sum(share < 0.5 for share in kept) - all_lost)


def _share_kept(text: str, tokenizer: RougeTokenizer) -> float:
    if tokenizer != "default":
        return 1.0 if tokenize(text, tokenizer) else 0.0
    letters = [character for character in text.lower() if character.isalnum()]
    kept = sum(character.isascii() for character in letters)
    return kept / len(letters) if letters else 0.0
