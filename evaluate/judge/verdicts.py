"""A judge's replies on disk, one line each, written as they arrive: a killed run asks only the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint
from dpkd.core.json_lines import AppendOnlyLines
from dpkd.evaluate.judge.questions import Form, parse_reply

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of the judge: its text, why it ended, and the server's own name for its model and token counts."""

    content: str
    finish_reason: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Answered:
    """The outcome of one question: its replies (two if it was asked again), or the reason why the server refused it."""

    question: str
    replies: tuple[Reply, ...] = ()
    refused: str | None = None

    def parsed(self, form: Form) -> tuple[str, ...] | None:
        """What the first readable reply says; None if no reply has the right form."""
        for reply in self.replies:
            if (parsed := parse_reply(form, reply.content)) is not None:
                return parsed
        return None


class Verdicts:
    """The file of replies at `path`; its first line, the description `judge`, says who gave them."""

    def __init__(self, path: Path, judge: Mapping[str, Any]) -> None:
        self.path = path
        described = dict(judge)
        header = {"format_version": _FORMAT_VERSION, "fingerprint": fingerprint(described), "judge": described}
        self._lines = AppendOnlyLines(path, header)

    def read(self) -> dict[str, Answered]:
        """All answers so far by the question's key; a last line that a crash cut short is dropped.

        Raises `UserError` if the file belongs to another judge or a line cannot be read: replies cost money, so none
        is dropped silently.
        """
        advice = "Choose another --out (or --verdicts); nothing was overwritten"
        answered = self._lines.read(_parse, strict=("verdicts", advice))
        return {one.question: one for one in answered}

    def append(self, answered: Answered) -> None:
        """Add a line; it is on disk when this returns. Call `read` before the first."""
        try:
            self._lines.append(asdict(answered), durable=True)
        except OSError as error:
            raise UserError(
                f"a verdict cannot be written: {error.strerror}",
                where=self.path,
                advice="Earlier verdicts are kept: free space and run the same command again",
            ) from error


def _parse(value: Any) -> Answered:
    return Answered(value["question"], tuple(Reply(**reply) for reply in value["replies"]), value["refused"])
