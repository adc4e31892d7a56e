"""Files that are there whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpkd.core.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` when the block ends without an error.

    The folder is made. The bytes are on disk before the name is: a machine that dies leaves the old file or
    the new one, never half of one. On an error the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last: matplotlib picks its format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether `name` is one of `replacing`'s temporary names."""
    return name.startswith(".") and ".tmp" in name


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; a disk that refuses is a `UserError`."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"the file cannot be written: {error.strerror}",
            where=path,
            advice="Free space or choose another --out; what is committed is kept, the same command goes on",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
