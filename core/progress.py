"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any, Self

_LINE_EVERY_S = 10.0


def say(text: str) -> None:
    """One plain line for the person, on standard error; standard output is kept for results.

    A standard error that is closed or full stops no work.
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`seconds` for a person, to two or three digits: 41 s, 3.5 min, 12.1 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.1f} s" if seconds < 10 else f"{seconds:.0f} s"


class Progress:
    """Counts `unit`s done towards `total` (None when unknown). `done` is what an earlier run already did."""

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = done
        self._fields = ""
        self._started_s = self._said_s = time.monotonic()
        self._bar: Any = None
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar, self._task = _rich_bar(label, total, unit, done)

    def advance(self, amount: int = 1, **fields: object) -> None:
        """Count `amount` more; `fields` are shown beside the count."""
        self.done += amount
        if fields:
            self._fields = " ".join(f"{key} {value}" for key, value in fields.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, fields=f"{self._rate():.1f}/s {self._fields}".rstrip())
        elif time.monotonic() - self._said_s >= _LINE_EVERY_S:
            self._said_s = time.monotonic()
            say(self._line())

    def _rate(self) -> float:
        return (self.done - self._first) / max(time.monotonic() - self._started_s, 1e-9)

    def _line(self) -> str:
        rate = self._rate()
        text = f"{self.label}: {self.done}" + (f"/{self.total}" if self.total is not None else "")
        text += f" {self.unit}, {rate:.1f}/s"
        if self.total is not None and rate > 0 and self.done < self.total:
            text += f", {(self.total - self.done) / rate:.0f} s left"
        return f"{text}  {self._fields}".rstrip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            say(self._line())


def _rich_bar(label: str, total: int | None, unit: str, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[fields]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.start()
    return bar, bar.add_task(label, total=total, completed=done, fields="")
