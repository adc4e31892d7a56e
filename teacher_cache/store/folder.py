"""The few file operations that a cache needs, and a local directory behind them.

Every write is atomic. A local file is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from dpkd.core.errors import UserError
from dpkd.core.files import is_temporary, write_atomic

#: the file of a finished cache or round that describes it, and that of an unfinished one
MANIFEST, JOB = "manifest.json", "job.json"


class StoredFile(NamedTuple):
    """A file in a listing: its size in bytes, and its `Folder.version` where the listing has it."""

    size: int
    version: str | None


class Folder(Protocol):
    """Files with names such as `shards/teacher-000000.parquet`. `str(folder)` is its path or URL."""

    #: whether `create` and `replace` are atomic
    is_conditional: bool = False

    def __hash__(self) -> int:
        return id(self)

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises `FileNotFoundError` if it does not exist."""
        ...

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` up to `end`, and no others: fewer where the file ends before.

        Raises `FileNotFoundError` if it does not exist.
        """
        ...

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of those files that exist."""
        contents = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                contents[name] = self.read(name)
        return contents

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically; raises `UserError` if it cannot be written."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; returns whether it was written."""
        ...

    def version(self, name: str) -> str | None:
        """Changes whenever the file does; None if it does not exist."""
        ...

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Write a file that still has that `version`; returns whether it was written."""
        ...

    def write_checked(self, name: str, data: bytes, check: Callable[[], None]) -> None:
        """Write a file if `check`, which raises `UserError`, allows it.

        An object store also makes sure that nobody has written the file since `check`: a process that is paused in
        between writes nothing when it continues. On a disk, the lock of the kernel keeps others out.
        """
        check()
        self.write(name, data)

    def files(self, prefix: str = "") -> dict[str, StoredFile]:
        """Every file under the folder `prefix`, by name, without temporary files."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Size in bytes of every file under the folder `prefix`, by name, without temporary files."""
        return {name: file.size for name, file in self.files(prefix).items()}

    def exists(self, name: str) -> bool:
        """Whether the file exists."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, or everything under the folder of that name, if it exists."""
        ...

    def clean_up(self) -> None:
        """Remove the temporary files of interrupted writes, here and in `shards/`. An object store has none."""
        return

    def child(self, name: str) -> Folder:
        """The folder `name` inside this one."""
        ...

    def where(self, name: str) -> str:
        """Path or URL of the file `name`."""
        ...


class LocalFolder(Folder):
    """A directory on a disk of this machine, mounted ones included."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def where(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from None

    def read_range(self, name: str, start: int, end: int) -> bytes:
        try:
            with (self.path / name).open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from None

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.path / name, data)

    def create(self, name: str, data: bytes) -> bool:
        try:
            with (self.path / name).open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"the file cannot be written: {error.strerror}", where=self.where(name)) from error
        return True

    def version(self, name: str) -> str | None:
        try:
            return _version_of((self.path / name).stat())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def replace(self, name: str, data: bytes, version: str) -> bool:
        if self.version(name) != version:
            return False
        self.write(name, data)
        return True

    def files(self, prefix: str = "") -> dict[str, StoredFile]:
        files: dict[str, StoredFile] = {}
        folders = [prefix]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(self.path / folder))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise UserError(f"the directory cannot be read: {error.strerror}", where=self.where(folder)) from error
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    folders += [] if entry.is_symlink() else [name]
                elif not is_temporary(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # a job that finishes removes its ledger meanwhile
                        status = entry.stat()
                        files[name] = StoredFile(status.st_size, _version_of(status))
        return files

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def delete(self, name: str) -> None:
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def clean_up(self) -> None:
        # not in `rounds/`, where other jobs may be writing
        for folder in (self.path, self.path / "shards"):
            for path in folder.glob(".*.tmp*"):
                path.unlink(missing_ok=True)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)


def _version_of(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
