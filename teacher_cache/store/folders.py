"""Where a cache lies: a local directory or an object store by URL, behind the few operations that a cache needs.

Every write is whole or not at all: a local file is written beside its name, synced and renamed; an object store's PUT
is atomic by itself, so nothing is ever renamed there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from dpkd.core.errors import UserError, first_line
from dpkd.core.files import is_temporary, write_atomic


class Folder(Protocol):
    """A place of files with names like `shards/teacher-000000.parquet`. `str(folder)` is what people call it."""

    def __hash__(self) -> int: ...

    def read(self, name: str) -> bytes:
        """The bytes of a file; `FileNotFoundError` when it is not there."""
        ...

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of several files; those that are not there are left out."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; `UserError` when the place refuses."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; returns whether it was written."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file under the folder `prefix`, by name; leftovers of cut-off writes do not count."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, or everything under the folder of that name; absent is fine."""
        ...

    def clean_up(self) -> None:
        """Remove what cut-off writes left behind."""
        ...

    def child(self, name: str) -> Folder:
        """The folder `name` inside this one."""
        ...

    def where(self, name: str) -> str:
        """What people call the file `name`."""
        ...


def open_folder(location: str | Path) -> Folder:
    """The folder at a path or an fsspec URL (`s3://bucket/key`, `gs://`, `memory://`, `file://`); it need not exist.

    Raises `UserError` when the URL's protocol has no driver. Credentials and endpoints come from the environment, as
    the driver documents them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...).
    """
    text = str(location)
    if text.startswith("file://"):
        return LocalFolder(Path(text.removeprefix("file://")))
    if "://" not in text:
        return LocalFolder(Path(text))
    import fsspec

    try:
        # without a listing cache: other processes write to the same place
        filesystem, root = fsspec.url_to_fs(text, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"the URL cannot be used: {error}", where=text, advice="Install its fsspec driver") from None
    return RemoteFolder(filesystem, root.rstrip("/"), text.rstrip("/"))


class LocalFolder:
    """A directory of this machine, or of a disk that it mounts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def where(self, name: str) -> str:
        """See `Folder.where`."""
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        """See `Folder.read`."""
        try:
            return (self.path / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from None

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """See `Folder.read_many`."""
        found = {}
        for name in names:
            try:
                found[name] = self.read(name)
            except FileNotFoundError:
                continue
        return found

    def write(self, name: str, data: bytes) -> None:
        """See `Folder.write`."""
        write_atomic(self.path / name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See `Folder.create`."""
        try:
            with (self.path / name).open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"the file cannot be written: {error.strerror}", where=self.where(name)) from error
        return True

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Folder.sizes`."""
        found = {}
        pending = [self.path / prefix]
        while pending:
            try:
                entries = list(os.scandir(pending.pop()))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                if entry.is_dir():
                    pending.append(Path(entry.path))
                elif not is_temporary(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # a job that ends removes its ledger
                        found[os.path.relpath(entry.path, self.path)] = entry.stat().st_size
        return found

    def exists(self, name: str) -> bool:
        """See `Folder.exists`."""
        return (self.path / name).is_file()

    def delete(self, name: str) -> None:
        """See `Folder.delete`."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def clean_up(self) -> None:
        """See `Folder.clean_up`."""
        for path in self.path.rglob(".*.tmp*"):
            if is_temporary(path.name):
                path.unlink(missing_ok=True)

    def child(self, name: str) -> LocalFolder:
        """See `Folder.child`."""
        return LocalFolder(self.path / name)


class RemoteFolder:
    """A prefix of an object store, through fsspec."""

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self._filesystem, self._root, self._url = filesystem, root, url

    def __str__(self) -> str:
        return self._url

    def where(self, name: str) -> str:
        """See `Folder.where`."""
        return f"{self._url}/{name}"

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _refusals(self, name: str, *, absent_is_known: bool = False) -> Iterator[None]:
        """Whatever the driver raises as a `UserError`, but (with `absent_is_known`) for `FileNotFoundError`."""
        try:
            yield
        except Exception as error:
            if absent_is_known and isinstance(error, FileNotFoundError):
                raise
            raise self._refused(error, name) from error

    def _refused(self, error: Exception, name: str) -> UserError:
        reason = first_line(error)
        return UserError(
            f"the storage refuses: {type(error).__name__}: {reason}",
            where=self.where(name),
            advice="Check the URL, the credentials and the network, then run the same command again",
        )

    def read(self, name: str) -> bytes:
        """See `Folder.read`."""
        with self._refusals(name, absent_is_known=True):
            return bytes(self._filesystem.cat_file(self._key(name)))

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """See `Folder.read_many`."""
        keys = {self._key(name): name for name in names}
        if not keys:
            return {}
        with self._refusals(""):
            found = self._filesystem.cat(list(keys), on_error="return")
        contents = {}
        for key, value in found.items():
            if isinstance(value, FileNotFoundError):
                continue
            if isinstance(value, Exception):
                raise self._refused(value, keys[key])
            contents[keys[key]] = bytes(value)
        return contents

    def write(self, name: str, data: bytes) -> None:
        """See `Folder.write`."""
        with self._refusals(name):
            self._filesystem.pipe_file(self._key(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless one of that name is there; False when it is.

        Atomic where the store has conditional writes; elsewhere the file is looked for first.
        """
        if self.exists(name):
            return False
        try:
            self._filesystem.pipe_file(self._key(name), data, mode="create")
        except FileExistsError:
            return False
        except Exception as error:
            if "PreconditionFailed" in str(error) or "412" in str(error):
                return False
            raise self._refused(error, name) from error
        return True

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Folder.sizes`."""
        try:
            with self._refusals(prefix, absent_is_known=True):
                found = self._filesystem.find(self._key(prefix).rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._filesystem._strip_protocol(self._root).rstrip("/")) + 1
        return {key[start:]: int(info["size"]) for key, info in found.items()}

    def exists(self, name: str) -> bool:
        """See `Folder.exists`."""
        with self._refusals(name):
            return bool(self._filesystem.isfile(self._key(name)))

    def delete(self, name: str) -> None:
        """See `Folder.delete`."""
        with contextlib.suppress(FileNotFoundError), self._refusals(name, absent_is_known=True):
            self._filesystem.rm(self._key(name), recursive=True)

    def clean_up(self) -> None:
        """See `Folder.clean_up`: a PUT that was cut off leaves nothing."""

    def child(self, name: str) -> RemoteFolder:
        """See `Folder.child`."""
        return RemoteFolder(self._filesystem, self._key(name), f"{self._url}/{name}")
