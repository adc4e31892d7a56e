"""A judge's replies on disk, a line each as they come in: a killed run asks for those that are missing alone.

The first line says who is asked and how; every other line is a question, by content, and what was replied to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import differences, fingerprint
from dpkd.evaluate.judge.questions import Form, parse_reply

_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of the judge: its text, why it ended, and what the server says of its model and the tokens used."""

    content: str
    finish_reason: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of one question: its replies (two where it was asked once more), or the server's refusal."""

    question: str
    replies: tuple[Reply, ...] = ()
    refused: str | None = None

    def parsed(self, form: Form) -> tuple[str, ...] | None:
        """What the first reply of the right form says; None where there is none."""
        for reply in self.replies:
            if (found := parse_reply(form, reply.content)) is not None:
                return found
        return None


class Verdicts:
    """The file of replies at `path`, given by the judge that `judge` describes."""

    def __init__(self, path: Path, judge: Mapping[str, Any]) -> None:
        self.path = path
        self._first: dict[str, Any] = {
            "format_version": _FORMAT_VERSION,
            "fingerprint": fingerprint(dict(judge)),
            "judge": dict(judge),
        }
        self._num_bytes = 0  # up to the end of the last whole line

    def read(self) -> dict[str, Answered]:
        """Everything answered so far, by the question's key; a last line that was cut short is left out.

        Raises `UserError` for the file of another judge, and for a line that cannot be read: replies cost money, so
        nothing is thrown away unseen.
        """
        found: dict[str, Answered] = {}
        self._num_bytes = 0
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was cut short
            try:
                value = json.loads(line)
                if number == 1:
                    self._check_first(value)
                else:
                    replies = tuple(Reply(**reply) for reply in value["replies"])
                    found[value["question"]] = Answered(value["question"], replies, value["refused"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"line {number} of the verdicts cannot be read: {type(error).__name__}",
                    where=self.path,
                    advice="Delete the line to have its question asked again"
                    if number > 1
                    else "Give another --verdicts or --out",
                ) from None
            self._num_bytes += len(line) + 1
        return found

    def _check_first(self, value: Mapping[str, Any]) -> None:
        if value != self._first:
            changed = differences(dict(value["judge"]), self._first["judge"]) or ["format_version"]
            raise UserError(
                "the verdicts were given by another judge, or asked for in another way",
                found="; ".join(changed),
                where=self.path,
                advice="Give another --out (or --verdicts); nothing was overwritten",
            )

    def append(self, answered: Answered) -> None:
        """Add a line, whole and on the disk when this returns; `read` must have been called before the first."""
        lines = ([self._first] if self._num_bytes == 0 else []) + [asdict(answered)]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.truncate(self._num_bytes)
                file.seek(self._num_bytes)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"a verdict cannot be written: {error.strerror}",
                where=self.path,
                advice="The verdicts before it are kept: free space, and the same command goes on",
            ) from error
        self._num_bytes += len(data)
