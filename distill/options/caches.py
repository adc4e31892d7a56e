"""Several caches as one option: `PATH=WEIGHT` or `NAME:PATH=WEIGHT`, each with a name of its own in logs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.core.urls import url_problem

#: `NAME:` in front of a path; `s3://` is no name
_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*):(?!//)(.+)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CacheChoice:
    """A cache to learn from: its name in logs, its directory or URL, and its weight.

    The weight is None for a single cache, and where each cache counts with as many rows as it has.
    """

    name: str
    location: str
    weight: float | None = None

    @property
    def text(self) -> str:
        """Name and weight, for a message."""
        return self.name if self.weight is None else f"{self.name}={self.weight:g}"


def normalised_caches(value: Any) -> Any:
    """The texts of a repeatable `--cache`: one as a text, several as a tuple.

    Raises ValueError for a URL that may hold a secret, and for caches that do not go together.
    """
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, (list, tuple)):
        return value
    texts = tuple(str(item) for item in value)
    if len(texts) < 2:
        return texts[0] if texts else None
    for choice in parse_caches(texts):
        if problem := url_problem(choice.location):
            raise ValueError(problem)
    return texts


def parse_caches(value: str | Sequence[str] | None) -> tuple[CacheChoice, ...]:
    """The caches of the option's value by name; a single one is a path as it stands, whatever characters it has.

    Raises ValueError for a bad weight, for weights of some caches only or of sum 0, and for equal names.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (CacheChoice(_last_part(value), value),)
    choices = tuple(sorted(map(_parse, value), key=lambda choice: choice.name))
    listed = ", ".join(choice.text for choice in choices)
    weights = [choice.weight for choice in choices if choice.weight is not None]
    if weights and len(weights) < len(choices):
        raise ValueError(f"some caches have a weight and others have none, found {listed}: give all or none")
    if weights and sum(weights) == 0:
        raise ValueError(f"the weights sum to 0, found {listed}: give one of them a weight above 0")
    repeated = [name for name, count in Counter(choice.name for choice in choices).items() if count > 1]
    if repeated:
        where = " and ".join(choice.location for choice in choices if choice.name == repeated[0])
        raise ValueError(f"two caches have the name {repeated[0]!r}, found {where}: give NAME:PATH=WEIGHT")
    for choice in choices:
        if not _NAME.fullmatch(choice.name):
            raise ValueError(f"{choice.name!r} cannot be a name in logs (in {choice.location}): give NAME:PATH=WEIGHT")
    return choices


def _parse(text: str) -> CacheChoice:
    named = _NAMED.fullmatch(text)
    name, rest = (named[1], named[2]) if named else (None, text)
    path, equals, number = rest.rpartition("=")
    try:
        weight = float(number) if equals and path else None
    except ValueError:  # a path with `=` in it
        weight = None
    if weight is None:
        path = rest
    elif not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"a weight must be a number of 0 or more, found {number} for {path}")
    return CacheChoice(name or _last_part(path), path, weight)


def _last_part(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2] or location
