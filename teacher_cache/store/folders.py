"""The folder at a path or URL, and object stores. Their PUT is atomic by itself, so nothing is renamed there."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError, first_line
from dpkd.core.urls import url_problem
from dpkd.teacher_cache.store.folder import Folder, LocalFolder, StoredFile

_TRIES = 5  # to write a file that others write too
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "412")  # S3's errors for a condition that fails
_VERSION_KEYS = ("ETag", "etag")  # of S3; of Google Cloud Storage and Azure. They are in listings too


def open_folder(location: str | Path) -> Folder:
    """The folder at a path or an fsspec URL (`s3://bucket/key`, `gs://`, `memory://`, `file://`); it need not exist.

    Credentials and endpoints come from the environment, as the URL's driver documents them (`AWS_ACCESS_KEY_ID`,
    `AWS_ENDPOINT_URL`, ...). Raises `UserError` if no driver for the URL is installed.
    """
    text = str(location)
    for protocol in ("file://", "local://"):
        if text.startswith(protocol):
            return LocalFolder(Path(text.removeprefix(protocol)))
    if "://" not in text:
        return LocalFolder(Path(text))
    if problem := url_problem(text):
        raise UserError(problem)
    if "::" in text:
        raise UserError(
            "the URL is a chain of drivers, which can show an old copy of a lock or a listing",
            where=text,
            advice="Give the URL of the store alone",
        )
    import fsspec

    try:
        # without a listing cache: other processes write to the same folder
        filesystem, root = fsspec.url_to_fs(text, use_listings_cache=False)
    except Exception as error:  # whatever a driver's constructor may raise
        advice = "Install its fsspec driver, or give the URL of a store that it can open"
        raise UserError(f"the URL cannot be used: {first_line(error)}", where=text, advice=advice) from None
    return RemoteFolder(filesystem, root.rstrip("/"), text.rstrip("/"))


class RemoteFolder(Folder):
    """A prefix of an object store, through fsspec."""

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self._filesystem, self._root, self._url = filesystem, root, url
        self.is_conditional = "s3" in filesystem.protocol

    def __str__(self) -> str:
        return self._url

    def where(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _storage_errors(self, name: str, *, may_be_absent: bool = False) -> Iterator[None]:
        """Turn errors of the driver into `UserError`, except `FileNotFoundError` with `may_be_absent`."""
        try:
            yield
        except Exception as error:
            if may_be_absent and isinstance(error, FileNotFoundError):
                raise
            raise self._storage_error(error, name) from error

    def _storage_error(self, error: Exception, name: str) -> UserError:
        return UserError(
            f"the storage returned an error: {type(error).__name__}: {first_line(error)}",
            where=self.where(name),
            advice="Check the URL, the credentials and the network, then run the same command again",
        )

    def read(self, name: str) -> bytes:
        with self._storage_errors(name, may_be_absent=True):
            return bytes(self._filesystem.cat_file(self._key(name)))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        with self._storage_errors(name, may_be_absent=True):
            try:
                return bytes(self._filesystem.cat_file(self._key(name), start=start, end=end))
            except OSError as error:
                if error.errno != errno.EINVAL:  # S3's error for a range of which no byte exists
                    raise
                return b""

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        keys = {self._key(name): name for name in names}
        if not keys:
            return {}
        with self._storage_errors(""):
            found = self._filesystem.cat(list(keys), on_error="return")
        contents = {}
        for key, value in found.items():
            if isinstance(value, FileNotFoundError):
                continue
            if isinstance(value, Exception):
                raise self._storage_error(value, keys[key])
            contents[keys[key]] = bytes(value)
        return contents

    def write(self, name: str, data: bytes) -> None:
        with self._storage_errors(name):
            self._filesystem.pipe_file(self._key(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """See `Folder.create`. Atomic only if the store has conditional writes."""
        return not self.exists(name) and self._write_if(name, data, {"mode": "create"})

    def _info(self, name: str) -> dict[str, Any] | None:
        """What the driver says of a file; None if it does not exist. A store that does not answer is an error."""
        try:
            with self._storage_errors(name, may_be_absent=True):
                info: dict[str, Any] = self._filesystem.info(self._key(name))
        except FileNotFoundError:
            return None
        return None if info["type"] == "directory" else info

    def version(self, name: str) -> str | None:
        info = self._info(name)
        return None if info is None else _version_of(info) or str(sorted(info.items()))

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """See `Folder.replace`. Atomic only in S3 and stores with its interface."""
        if self.is_conditional:
            return self._write_if(name, data, {"IfMatch": version})
        if self.version(name) != version:
            return False
        self.write(name, data)
        return True

    def _write_if(self, name: str, data: bytes, condition: dict[str, str]) -> bool:
        one_request = {"chunksize": len(data) + 1} if self.is_conditional else {}
        try:
            self._filesystem.pipe_file(self._key(name), data, **condition, **one_request)
        except FileExistsError:
            return False
        except Exception as error:
            if isinstance(error, FileNotFoundError) and "IfMatch" in condition:
                return False  # it has just been removed; without a bucket, nothing can be created either
            response = getattr(error.__cause__, "response", None) or {}
            if response.get("Error", {}).get("Code") in _CONFLICTS:
                return False
            raise self._storage_error(error, name) from error
        return True

    def write_checked(self, name: str, data: bytes, check: Callable[[], None]) -> None:
        for _ in range(_TRIES):
            version = self.version(name)
            check()
            if self.create(name, data) if version is None else self.replace(name, data, version):
                return
        raise UserError(
            "another process keeps writing the same file", where=self.where(name), advice="Find out what writes to it"
        )

    def files(self, prefix: str = "") -> dict[str, StoredFile]:
        try:
            with self._storage_errors(prefix, may_be_absent=True):
                found = self._filesystem.find(self._key(prefix).rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._filesystem._strip_protocol(self._root).rstrip("/")) + 1
        # a folder is listed too if it is empty at first and another job writes into it meanwhile
        return {
            key[start:]: StoredFile(int(info["size"]), _version_of(info))
            for key, info in found.items()
            if info["type"] != "directory"
        }

    def exists(self, name: str) -> bool:
        return self._info(name) is not None

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._storage_errors(name, may_be_absent=True):
            self._filesystem.rm(self._key(name), recursive=True)

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(self._filesystem, self._key(name), f"{self._url}/{name}")


def _version_of(info: Mapping[str, Any]) -> str | None:
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), None)
