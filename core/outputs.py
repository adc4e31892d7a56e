"""Who an output directory belongs to: a marker file records what it is made of, a lock keeps other jobs out."""

from __future__ import annotations

import contextlib
import errno
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.files import is_temporary
from dpkd.core.identity import content_differences
from dpkd.core.json_lines import loads
from dpkd.core.progress import say

#: file of `lock_directory` in an output directory
LOCK = "job.lock"
ADVICE = "Choose another --out; nothing was overwritten"
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def output_exists(
    directory: Path,
    marker: str,
    made_of: Mapping[str, Any],
    what: str,
    *,
    ignore: frozenset[str] = frozenset(),
    upgraded: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    result: str | None = None,
    advice: str = ADVICE,
) -> bool:
    """Whether `directory` already belongs to the `what` made of `made_of`; False when it is free.

    Args:
        directory: the output; it may be missing or empty.
        marker: file in it, `.json` or `.toml`, that records what it is made of.
        made_of: the same record for the present command; JSON values. Models are compared by content, so their
            identities are whole ones.
        what: what the directory holds, in words: "student", "run".
        ignore: top-level keys of the record that may differ, such as paths.
        upgraded: what a record of an earlier version would be in this one.
        result: file that must not exist without the marker. None: no file may, except a lock and what a killed
            process has left of a file that it was writing.
        advice: what to do about another output.

    Raises:
        UserError: the directory holds something else, or the same kind of thing made of something else.
    """
    path = directory / marker
    if directory.exists() and not directory.is_dir():
        raise UserError("the output is a file, not a directory", where=directory, advice=advice)
    if not path.is_file():
        if (directory / result).exists() if result else _has_files(directory):
            raise UserError(
                f"the output directory is not empty and holds no {what} of dpkd",
                expected=f"a file {marker}, or an empty directory",
                where=directory,
                advice=advice,
            )
        return False
    try:
        text = path.read_text(encoding="utf-8")
        existing = tomllib.loads(text) if path.suffix == ".toml" else loads(text)
        record = {key: value for key, value in upgraded(existing).items() if key not in ignore}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the record of the output cannot be read: {error}", where=path, advice=advice) from None
    ours = {key: value for key, value in made_of.items() if key not in ignore}
    # JSON knows no tuples, and a TOML file no null
    if changed := content_differences(record, json.loads(json.dumps(ours))):
        raise UserError(
            f"the output directory holds another {what}; differing: {'; '.join(changed)}",
            where=directory,
            advice=advice,
        )
    return True


def _has_files(directory: Path) -> bool:
    there = directory.iterdir() if directory.exists() else ()
    return any(entry.name != LOCK and not is_temporary(entry.name) for entry in there)


@contextlib.contextmanager
def lock_directory(directory: Path, name: str, holder: Callable[[], str | None] = lambda: None) -> Iterator[bool]:
    """Keep other dpkd jobs out of `directory`, which is created if it is missing, while the block runs.

    The kernel releases the lock when the process ends, however it ends. The block gets False, and a warning is printed,
    on a disk that has no such locks.

    Args:
        name: the lock's file in the directory; it is removed at the end.
        holder: names the process that holds the lock, for the error.

    Raises:
        UserError: another process holds the lock, or the directory cannot be written to.
    """
    import filelock

    lock = filelock.FileLock(directory / name, timeout=0, fallback_to_soft=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise another_writer(directory, holder()) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise UserError(
                f"the directory cannot be written to: {error.strerror}", where=directory, advice="Choose another --out"
            ) from error
        say(f"the disk of {directory} has no file locks: run one job at a time in it")
    try:
        yield lock.is_locked
    finally:
        # filelock checks that the file it has locked still exists, so it can be removed while it is locked
        (directory / name).unlink(missing_ok=True)
        lock.release()


def another_writer(where: object, holder: str | None) -> UserError:
    """The error for a directory that another job (`holder`, where its name is known) is writing to."""
    return UserError(
        "another dpkd job is writing to this directory",
        found=holder,
        where=where,
        advice="Wait until it has finished, or stop it",
    )
