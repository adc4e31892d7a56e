"""One job at a time in a folder: a second one is refused with the first one's name, and a dead one's lock is ignored.

On a local disk the kernel holds the lock (`job.flock`), and a killed process cannot keep it. Object stores, and disks
without such locks, have only `job.lock`: its holder renews it every `RENEW_S` seconds. It is stale when its process has
ended, which can be known only in the same boot and process namespace as ours, or when it has not been renewed for
`STALE_S` seconds and does not change while we watch it: clocks of two machines may differ.
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
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.outputs import another_writer, lock_directory
from dpkd.core.progress import say
from dpkd.teacher_cache.store.folders import Folder, LocalFolder

LOCK, FLOCK = "job.lock", "job.flock"
RENEW_S = 20.0
STALE_S = 120.0
WATCH_S = 50.0  # a lock that looks old must stay unchanged for this long: two renewals and a half
_SETTLE_S = 2.0  # two jobs that replace one stale lock see each other after this long


class Lock:
    """A lock that this process holds, unless `lost_to` names another process. A lock that is gone is lost too."""

    def __init__(self, folder: Folder, record: dict[str, Any]) -> None:
        self._folder, self._record = folder, record
        self.lost_to: str | None = None

    def _look(self) -> None:
        existing = _read(self._folder)
        if existing is None:
            self.lost_to = f"no {LOCK}"
        elif existing["token"] != self._record["token"]:
            self.lost_to = _name(existing)

    def renew(self) -> None:
        """Tell other processes that this one still runs, unless the lock is lost."""
        self._look()
        if self.lost_to is None:
            self._folder.write(LOCK, _to_bytes(self._record))

    def check(self) -> None:
        """Raise `UserError` if the lock, as it is in the folder now, is not this process's."""
        if self.lost_to is None:
            self._look()
        if self.lost_to is not None:
            raise UserError(
                "another dpkd job has taken over this directory",
                found=self.lost_to,
                where=self._folder,
                advice="Committed shards are kept. Leave the directory to that job; without one, run the same command",
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
    ours |= _place()
    if isinstance(folder, LocalFolder) and (folder.path / LOCK).is_symlink():
        raise UserError(
            "the lock is a symbolic link", where=folder.where(LOCK), advice="Remove the link; dpkd creates no links"
        )
    if not folder.create(LOCK, _to_bytes(ours)):
        existing = _read(folder)
        reason = "it names no process" if existing is None and locked else existing and _stale_reason(existing, locked)
        if not reason or (existing is not None and not _has_ended(existing, locked) and _changes(folder, existing)):
            raise another_writer(folder, None if existing is None else _name(existing))
        if existing is not None:
            say(f"the lock of {_name(existing)} on {folder} is stale ({reason}); taking it over")
        folder.write(LOCK, _to_bytes(ours))
        if not locked:
            time.sleep(_SETTLE_S)
    lock = Lock(folder, ours)
    lock.renew()
    lock.check()
    try:
        with _repeating(lock.renew):
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


def _place() -> dict[str, str]:
    """Boot and process namespace of this process, where a process id means something; empty where unknown."""
    place = {}
    with contextlib.suppress(OSError):
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place["pid_namespace"] = str(Path("/proc/self/ns/pid").readlink())
    return place


def _has_ended(record: dict[str, Any], locked: bool) -> bool:
    """Whether the holder is known to have ended. `locked`: as in `_heartbeat`."""
    ours = _place()
    if locked and ours and record.get("boot") == ours["boot"]:
        return True  # the same kernel would not have given us the flock
    if record["host"] != socket.gethostname() or any(record.get(key) != value for key, value in ours.items()):
        return False
    return locked or not _runs(int(record["pid"]))


def _changes(folder: Folder, record: dict[str, Any]) -> bool:
    """Whether the lock is renewed or replaced within `WATCH_S` seconds."""
    say(f"watching the lock of {_name(record)} on {folder} for {WATCH_S:.0f} s: it looks old")
    deadline_s = time.monotonic() + WATCH_S
    while time.monotonic() < deadline_s:
        time.sleep(min(1.0, WATCH_S / 10))
        now = _read(folder)
        if now is not None and (now["token"], now["renewed"]) != (record["token"], record["renewed"]):
            return True
    return False


def _stale_reason(record: dict[str, Any], locked: bool = False) -> str | None:
    if _has_ended(record, locked):
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
