"""One job at a time in a folder: a second one is refused with the first one's name, and a dead one's lock is ignored.

On a local disk the kernel holds the lock (`job.flock`), and a killed process cannot keep it. Object stores, and disks
without such locks, have only `job.lock`: its holder renews it every `RENEW_S` seconds, and it is stale when it has not
been renewed for `STALE_S` seconds or its process on this machine has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.outputs import another_writer, lock_directory
from dpkd.core.progress import say
from dpkd.teacher_cache.store.folders import Folder, LocalFolder

LOCK, FLOCK = "job.lock", "job.flock"
RENEW_S = 20.0
STALE_S = 120.0
_SETTLE_S = 2.0  # two jobs that replace one stale lock see each other after this long


class Lock:
    """A lock that this process holds, unless `lost_to` names another process."""

    def __init__(self) -> None:
        self.lost_to: str | None = None

    def check(self) -> None:
        """Raise `UserError` if another process has taken the lock."""
        if self.lost_to is not None:
            raise UserError(
                "another dpkd job has taken over this directory",
                found=self.lost_to,
                advice="Committed shards are kept; leave the directory to that job",
            )


@contextlib.contextmanager
def hold(folder: Folder) -> Iterator[Lock]:
    """Hold the folder's lock while the block runs; raises `UserError` if another process holds it."""
    with contextlib.ExitStack() as stack:
        locked = isinstance(folder, LocalFolder) and stack.enter_context(
            lock_directory(folder.path, FLOCK, lambda: holder(folder))
        )
        yield stack.enter_context(_heartbeat(folder, locked))


def holder(folder: Folder) -> str | None:
    """The process that writes to `folder`, as text; None if there is none."""
    existing = _read(folder)
    return None if existing is None or _stale_reason(existing) else _name(existing)


@contextlib.contextmanager
def _heartbeat(folder: Folder, locked: bool) -> Iterator[Lock]:
    """Keep `job.lock` fresh. `locked`: the kernel says that no other process of this machine is in the folder."""
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex, "renewed": time.time()}
    if not folder.create(LOCK, _to_bytes(ours)):
        existing = _read(folder)
        reason = "it names no process" if existing is None and locked else existing and _stale_reason(existing, locked)
        if not reason:
            raise another_writer(folder, None if existing is None else _name(existing))
        if existing is not None:
            say(f"the lock of {_name(existing)} on {folder} is stale ({reason}); taking it over")
        folder.write(LOCK, _to_bytes(ours))
        if not locked:
            time.sleep(_SETTLE_S)
    lock = Lock()

    def renew() -> None:
        now = _read(folder)
        if now is not None and now["token"] != ours["token"]:
            lock.lost_to = _name(now)
        else:
            folder.write(LOCK, _to_bytes(ours))

    renew()
    lock.check()
    try:
        with _repeating(renew):
            yield lock
    finally:
        existing = _read(folder)
        if existing is not None and existing["token"] == ours["token"]:
            folder.delete(LOCK)


@contextlib.contextmanager
def _repeating(renew: Callable[[], None]) -> Iterator[None]:
    """Call `renew` every `RENEW_S` seconds until the block ends; one that fails is tried again."""
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


def _to_bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record | {"renewed": time.time()}).encode()


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        record = json.loads(folder.read(LOCK))
        return record if {"host", "pid", "token", "renewed"} <= record.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _name(record: dict[str, Any]) -> str:
    return f"process {record['pid']} on {record['host']}"


def _stale_reason(record: dict[str, Any], locked: bool = False) -> str | None:
    if record["host"] == socket.gethostname() and (locked or not _runs(int(record["pid"]))):
        return "that process no longer runs"
    silent_s = time.time() - float(record["renewed"])
    return f"it was last renewed {silent_s:.0f} s ago" if silent_s > STALE_S else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
