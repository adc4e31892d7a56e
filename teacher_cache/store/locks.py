"""One job at a time in a folder: a second one is refused with the first one's name, and a dead one's lock is ignored.

On a local disk the kernel holds the lock (`job.flock`), and a killed process cannot keep it. Object stores, and disks
without such locks, have only `job.lock`: its holder renews it every `RENEW_S` seconds. Whether the holder's process
runs can be known only in the same boot and process namespace as ours. Elsewhere a lock is stale once it has not changed
for `STALE_S` seconds while we watched it. No clock is compared with that of another machine.
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
from dpkd.core.json_lines import loads
from dpkd.core.outputs import another_writer, lock_directory
from dpkd.core.progress import say
from dpkd.teacher_cache.store.folder import Folder, LocalFolder

LOCK, FLOCK = "job.lock", "job.flock"
RENEW_S = 20.0
STALE_S = 120.0
_SETTLE_S = 2.0  # in a store without conditional writes, two jobs that replace one stale lock see each other then


class Lock:
    """A lock that this process (or the job that it works for) holds, unless `lost_to` names another process.

    A lock that is gone is lost too. `token` is the secret of the holder.
    """

    def __init__(self, folder: Folder, token: str, record: dict[str, Any] | None = None) -> None:
        self.folder, self.token = folder, token
        self._record = record
        self.lost_to: str | None = None

    def _look(self) -> None:
        existing = _read(self.folder)
        if existing is None:
            self.lost_to = f"no {LOCK}"
        elif existing["token"] != self.token:
            self.lost_to = _name_of(existing)

    def renew(self) -> None:
        """Tell other processes that this one still runs, unless the lock is lost."""
        version = self.folder.version(LOCK)
        self._look()
        if self.lost_to is None and version is not None and self._record is not None:
            self.folder.replace(LOCK, _to_bytes(self._record), version)

    def check(self) -> None:
        """Raise `UserError` if the lock, as it is in the folder now, is not this process's."""
        if self.lost_to is None:
            self._look()
        if self.lost_to is not None:
            raise UserError(
                "another dpkd job has taken over this directory",
                found=self.lost_to,
                where=self.folder,
                advice="Committed shards are kept. Leave the directory to that job; without one, run the same command",
            )


@contextlib.contextmanager
def hold(folder: Folder) -> Iterator[Lock]:
    """Hold the folder's lock while the block runs; raises `UserError` if another process holds it."""
    with contextlib.ExitStack() as stack:
        locked = isinstance(folder, LocalFolder) and stack.enter_context(
            lock_directory(folder.path, FLOCK, lambda: _name_of(_read(folder)))
        )
        yield stack.enter_context(_heartbeat(folder, locked))


class Watch:
    """Whether a process still writes to `folder`: it does until its lock stays the same for `STALE_S` seconds."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._seen: dict[str, Any] | None = None
        self._since_s = 0.0
        #: whether the lock has changed since the first look
        self.changed = False

    def holder(self) -> str | None:
        """The process that holds the lock, as text; None if there is none, or none any more."""
        existing = _read(self._folder)
        if existing is None or _runs(existing) is False:
            return None
        if existing != self._seen:
            self.changed = self._seen is not None
            self._seen, self._since_s = existing, time.monotonic()
        is_old = time.monotonic() - self._since_s > STALE_S
        return None if is_old and not _runs(existing) else _name_of(existing)


@contextlib.contextmanager
def _heartbeat(folder: Folder, locked: bool) -> Iterator[Lock]:
    """Keep `job.lock` fresh. `locked`: the kernel says that no other process of this machine is in the folder."""
    token = uuid.uuid4().hex
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "token": token, "renewed": time.time()}
    ours |= _place() | {"started": _started(os.getpid())}
    if isinstance(folder, LocalFolder) and (folder.path / LOCK).is_symlink():
        raise UserError(
            "the lock is a symbolic link", where=folder.where(LOCK), advice="Remove the link; dpkd creates no links"
        )
    while not folder.create(LOCK, _to_bytes(ours)):
        version, existing = folder.version(LOCK), _read(folder)
        if version is None:
            continue  # it has just been removed
        if existing is None and not locked:
            if folder.version(LOCK) != version:
                continue
            raise UserError(
                "the lock cannot be read, so nobody knows whether another dpkd job is writing to this directory",
                where=folder.where(LOCK),
                advice="Delete it if no job is",
            )
        reason = _why_stale(folder, existing, locked)
        if reason is None:
            raise another_writer(folder, _name_of(existing))
        if folder.replace(LOCK, _to_bytes(ours), version):
            say(f"the lock of {_name_of(existing) or 'nobody'} on {folder} is stale ({reason}); taking it over")
            time.sleep(0 if locked or folder.is_conditional else _SETTLE_S)
            break
    lock = Lock(folder, token, ours)
    lock.renew()
    lock.check()
    try:
        with _repeating(lock.renew):
            yield lock
    finally:
        with contextlib.suppress(UserError):  # a store that does not answer: the lock will be stale
            existing = _read(folder)
            if existing is not None and existing["token"] == token:
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
        record = loads(folder.read(LOCK))
        return record if {"host", "pid", "token", "renewed"} <= record.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _name_of(record: dict[str, Any] | None) -> str | None:
    return None if record is None else f"process {record['pid']} on {record['host']}"


def _place() -> dict[str, str]:
    """Boot and process namespace of this process, where a process id means something; empty where unknown."""
    place = {}
    with contextlib.suppress(OSError):
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place["pid_namespace"] = str(Path("/proc/self/ns/pid").readlink())
    return place


def _started(pid: int) -> str | None:
    """When the process started, in ticks since the boot: another one may get its number. None if unknown."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return None


def _is_here(record: dict[str, Any]) -> bool:
    """Whether the holder's process id means something here."""
    return bool(record["host"] == socket.gethostname()) and all(record.get(k) == v for k, v in _place().items())


def _runs(record: dict[str, Any]) -> bool | None:
    """Whether the holder's process runs; None if that cannot be known here."""
    if not _is_here(record):
        return None
    try:
        os.kill(int(record["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = _started(int(record["pid"]))
    return None if started is None or "started" not in record else bool(started == record["started"])


def _why_stale(folder: Folder, record: dict[str, Any] | None, locked: bool) -> str | None:
    """Why the lock may be taken over; None if it may not. `locked`: as in `_heartbeat`."""
    if record is None:
        return "it names no process"
    # the same kernel would not have given us the flock
    same_kernel = locked and (_is_here(record) or record.get("boot", "") == _place().get("boot"))
    if same_kernel or _runs(record) is False:
        return "that process no longer runs"
    if _runs(record):
        return None
    say(f"watching the lock of {_name_of(record)} on {folder} for up to {STALE_S:.0f} s: does that job renew it?")
    watch = Watch(folder)
    while watch.holder() is not None:
        if watch.changed:
            return None
        time.sleep(min(1.0, STALE_S / 10))
    return f"it did not change for {STALE_S:.0f} s"
