"""What a reader of another program's files offers: facts of the whole source, and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dpkd.teacher_cache.engines.engine import EngineResult


@dataclass(frozen=True)
class SourceFacts:
    """What a source says of its rows.

    Attributes:
        num_rows: rows, unusable ones included.
        top_k: largest number of entries at a position; 0 without distributions.
        longest_prompt: tokens.
        longest_response: tokens.
        unknown: what is unknown of the log-probs: `end` (log-prob of the EOS), `responses` (log-probs of the responses'
            own tokens), `remainder` (tail mass).
        template: identity of the prompt template.
        data: identity of the files.
    """

    num_rows: int
    top_k: int
    longest_prompt: int
    longest_response: int
    unknown: tuple[str, ...]
    template: dict[str, Any]
    data: dict[str, Any]


@dataclass(frozen=True)
class ImportedRow:
    """A row of the source; `result` (index 0) is None for one that cannot be used, for the reason `failed`."""

    example_id: str
    prompt: str
    prompt_ids: list[int]
    result: EngineResult | None
    failed: str | None = None


class ImportSource(Protocol):
    """What a format's reader offers."""

    def facts(self) -> SourceFacts:
        """Reads the whole source once; raises `UserError` if it is not of the format."""
        ...

    def rows(self) -> Iterator[ImportedRow]:
        """The rows in the order of the source."""
        ...

    def check_unchanged(self) -> None:
        """Raise `UserError` if the files are not those that `facts` read."""
        ...
