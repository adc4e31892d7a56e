"""One job at a time in one folder: the second is refused by name, and a dead one's lock is recognised.

On a local disk the kernel's `flock` decides, which a killed process cannot keep. On an object store, and on disks
without `flock`, the holder renews its lock every `RENEW_S` seconds, and one that has not been renewed for `STALE_S`
seconds (or whose process is gone from this host) is stale.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.teacher_cache.store.folders import Folder, LocalFolder, RemoteFolder

LOCK = "job.lock"
RENEW_S = 20.0
STALE_S = 120.0
_SETTLE_S = 2.0  # two takers of one stale lock on an object store see each other after this long
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """A held lock. `check` raises `UserError` when another process has taken it meanwhile."""

    def __init__(self) -> None:
        self._lost: str | None = None

    def lose(self, holder: str) -> None:
        """Note that `holder` has the lock now."""
        self._lost = holder

    def check(self) -> None:
        """Raise `UserError` when the lock is lost."""
        if self._lost is not None:
            raise UserError(
                "another job has taken the lock of the directory",
                found=self._lost,
                advice="What is committed is kept; leave the directory to that job",
            )


@contextlib.contextmanager
def hold(folder: Folder) -> Iterator[Lock]:
    """Hold the folder's lock while the block runs; `UserError` when another process holds it."""
    if isinstance(folder, LocalFolder):
        with _hold_local(folder) as lock:
            yield lock
    else:
        assert isinstance(folder, RemoteFolder)
        with _hold_remote(folder) as lock:
            yield lock


def holder(folder: Folder) -> str | None:
    """Host and process of the job that works in `folder`, as far as its lock tells; None when none does."""
    held = _read(folder)
    return None if held is None or _stale_reason(held) else _name(held)


def _ours() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex, "renewed": time.time()}


def _renewed(held: dict[str, Any]) -> bytes:
    return json.dumps(held | {"renewed": time.time()}).encode()


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        held = json.loads(folder.read(LOCK))
        return held if {"host", "pid", "token", "renewed"} <= held.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _name(held: dict[str, Any]) -> str:
    return f"process {held['pid']} on {held['host']}"


def _stale_reason(held: dict[str, Any]) -> str | None:
    if held["host"] == socket.gethostname() and not _runs(int(held["pid"])):
        return "that process no longer runs"
    silent_s = time.time() - float(held["renewed"])
    return f"it was last renewed {silent_s:.0f} s ago" if silent_s > STALE_S else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refuse(folder: Folder, held: dict[str, Any] | None) -> UserError:
    return UserError(
        "another job is at work in the directory",
        found="a lock without a name" if held is None else _name(held),
        where=folder,
        advice=f"Wait for it, or end it. A lock that is not renewed for {STALE_S:.0f} s counts as stale",
    )


def _say_stale(folder: Folder, held: dict[str, Any], reason: str) -> None:
    say(f"the lock of {_name(held)} on {folder} is stale ({reason}); taken over")


@contextlib.contextmanager
def _hold_local(folder: LocalFolder) -> Iterator[Lock]:
    import fcntl

    path = folder.path / LOCK
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            with_flock = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_FLOCK:
                    with_flock = False
                else:
                    os.close(descriptor)
                    raise _refuse(folder, _read(folder)) from None
            # the holder before us may have removed the file between our opening and our locking it
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"the directory cannot be written to: {error.strerror}", where=folder, advice="Choose another --out"
        ) from error
    try:
        held = _read(folder)
        if held is not None and held["pid"] != os.getpid():
            reason = _stale_reason(held)
            # flock says that no process of this host holds it; one elsewhere may, where disks do not share flock
            elsewhere = held["host"] != socket.gethostname() or not with_flock
            if reason is None and elsewhere:
                raise _refuse(folder, held)
            _say_stale(folder, held, reason or "no process holds it")
        ours = _ours()

        def renew() -> None:
            data = _renewed(ours)
            os.pwrite(descriptor, data, 0)
            os.ftruncate(descriptor, len(data))

        try:
            with _renewing(renew):
                yield Lock()
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _hold_remote(folder: RemoteFolder) -> Iterator[Lock]:
    ours = _ours()
    if not folder.create(LOCK, _renewed(ours)):
        held = _read(folder)
        reason = None if held is None else _stale_reason(held)
        if held is None or reason is None:
            raise _refuse(folder, held)
        _say_stale(folder, held, reason)
        folder.write(LOCK, _renewed(ours))
        time.sleep(_SETTLE_S)
    lock = Lock()

    def renew() -> None:
        now = _read(folder)
        if now is not None and now["token"] != ours["token"]:
            lock.lose(_name(now))
        else:
            folder.write(LOCK, _renewed(ours))

    renew()
    lock.check()
    try:
        with _renewing(renew):
            yield lock
    finally:
        held = _read(folder)
        if held is not None and held["token"] == ours["token"]:
            folder.delete(LOCK)


@contextlib.contextmanager
def _renewing(renew: Any) -> Iterator[None]:
    """Call `renew` now and every `RENEW_S` seconds until the block ends; a renewal that fails is tried again."""
    renew()
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(Exception):
                renew()

    thread = threading.Thread(target=keep, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
