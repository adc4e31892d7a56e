"""Files and directories that exist complete or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` when the block ends without an error.

    Missing folders are created. The bytes are on disk before the name is: a crash leaves the old file or the new
    one, never half of one. On an error the temporary file is removed and `path` stays as it was.
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


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A new temporary directory beside `path`, which it replaces when the block ends without an error.

    Everything in it is on disk before the name is. On an error it is removed and `path` stays as it was. Raises
    `UserError` when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            _sync(entry)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        _sync(path.parent)
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise _cannot_write("directory", path, reason) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(*paths: Path) -> None:
    """Wait until the bytes of files, or the names in directories, are on the disk; `UserError` when it refuses."""
    for path in paths:
        try:
            _sync(path)
        except OSError as error:
            raise _cannot_write("file", path, error.strerror or str(error)) from error


def is_temporary(name: str) -> bool:
    """Whether `name` is one of `replacing`'s temporary names."""
    return name.startswith(".") and ".tmp" in name


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, completely or not at all; raises `UserError` when the disk refuses."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise _cannot_write("file", path, error.strerror or str(error)) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, completely or not at all; raises `UserError` when the disk refuses."""
    write_atomic(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, completely or not at all. Raises ValueError for NaN."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _reason(error: Exception) -> str | None:
    """What the system said when it refused a read or write; None for an error of another kind.

    safetensors and tokenizers have errors of their own for a full disk, with the system's number in the text.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # an error of `shutil.copytree` has a list of those of the files
    number = re.search(r"\[Errno (\d+)\]" if isinstance(error, OSError) else r"\(os error (\d+)\)", str(error))
    if number is None or isinstance(error, UserError):
        return str(error) if isinstance(error, OSError) else None
    return os.strerror(int(number[1]))


def _cannot_write(what: str, path: Path, reason: str) -> UserError:
    advice = "Free space and run the same command again: it resumes"
    return UserError(f"the {what} cannot be written: {reason}", where=path, advice=advice)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
