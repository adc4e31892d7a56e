"""JSON lines: reading them with line numbers, and logs that only grow and survive a crash in the middle of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dpkd.core.errors import UserError
from dpkd.core.identity import differences


def read_text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number (from 1) and text of each line of a UTF-8 file; `UserError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            for line, data in enumerate(file, start=1):  # as text, it would also split at a bare carriage return
                try:
                    yield line, data.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(f"line {line} is not UTF-8: {error.reason}", where=path) from None
    except FileNotFoundError:
        raise UserError("the file is missing", where=path) from None
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", where=path) from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and value of each line that is not blank; `UserError` when it cannot be read."""
    for line, text in read_text_lines(path):
        if text.strip():
            try:
                value = parse_json(text, path, f"line {line}")
            except json.JSONDecodeError as error:
                raise UserError(f"line {line} is not JSON: {error.msg} at column {error.colno}", where=path) from None
            yield line, value


def loads(data: str | bytes) -> Any:
    """`json.loads`, which raises ValueError for every text that it cannot read: for too deep nesting as well."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json(text: str, where: object, which: str) -> Any:
    """The value of a JSON text; `which` names the text.

    Raises `json.JSONDecodeError`, and `UserError` for JSON that Python cannot hold.
    """
    try:
        return loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        what = "is nested too deeply" if "nested" in str(error) else "has a number with too many digits"
        raise UserError(f"{which} {what}", where=where) from None


def complete_lines(path: Path) -> list[bytes]:
    """Lines of a log, each with its line break; a last one that a crash cut short is left out. No file, no lines."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


T = TypeVar("T")


class AppendOnlyLines:
    """A file of JSON lines that grows line by line; its first line, `header`, says what the others belong to.

    A crash may cut the last line short: it is dropped when the file is read, and overwritten by the next line. Call
    `read` before the first `append`.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._header = dict(header)
        self._num_bytes = 0  # up to the end of the last line that was read or written

    def read(self, parse: Callable[[Any], T], strict: tuple[str, str] | None = None) -> list[T]:
        """Parsed lines without the header, none when the file has another header.

        A line that is not JSON, or that `parse` refuses with ValueError, TypeError or KeyError, is dropped with all
        lines after it: the next `append` overwrites them. With `strict`, for lines too dear to drop, both raise
        `UserError`; it says what the lines are, and what to do.
        """
        parsed: list[T] = []
        self._num_bytes = 0
        for number, line in enumerate(complete_lines(self.path), start=1):
            try:
                value = loads(line)
                if number > 1:
                    parsed.append(parse(value))
            except (ValueError, TypeError, KeyError) as error:
                if strict is None:
                    break
                raise UserError(
                    f"line {number} of the {strict[0]} cannot be read: {type(error).__name__}",
                    where=self.path,
                    advice=strict[1] if number == 1 else f"Delete the line to make it again. {strict[1]}",
                ) from None
            if number == 1 and value != self._header:
                if strict is None:
                    break
                actual = value if isinstance(value, dict) else {}
                raise UserError(
                    f"the {strict[0]} were made with other options or models",
                    found="; ".join(differences(actual, self._header)),
                    where=self.path,
                    advice=strict[1],
                )
            self._num_bytes += len(line)
        return parsed

    def append(self, *values: Any, durable: bool = False) -> None:
        """Add a line for each value; `durable` waits until they are on the disk. Raises OSError."""
        lines = values if self._num_bytes else (self._header, *values)
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._num_bytes)
            file.seek(self._num_bytes)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        self._num_bytes += len(data)

    def delete(self) -> None:
        """Remove the file: its lines are kept elsewhere now."""
        self.path.unlink(missing_ok=True)
        self._num_bytes = 0
