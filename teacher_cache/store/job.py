"""An unfinished cache: what it will contain, which process writes to it, and which shards are committed."""

from __future__ import annotations

import contextlib
import hashlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import canonical_json, software_versions
from dpkd.core.json_lines import loads
from dpkd.core.progress import say
from dpkd.core.settings import SAVED_OPTIONS
from dpkd.teacher_cache.store import locks
from dpkd.teacher_cache.store.folder import JOB, MANIFEST, Folder, LocalFolder
from dpkd.teacher_cache.store.ledger import Ledger
from dpkd.teacher_cache.store.locks import FLOCK, LOCK, Lock
from dpkd.teacher_cache.store.manifest import Manifest, changed_identities, read_manifest
from dpkd.teacher_cache.store.rows import Origin
from dpkd.teacher_cache.store.schema import format_of
from dpkd.teacher_cache.store.shards import ShardRecord

#: answers of an endpoint whose rows are not committed yet
ANSWERS = "answers"


class Job:
    """A cache (or round) that is being built in `folder`.

    The identities are written first: a later run with the same ones resumes, one with others is refused. One process at
    a time writes to a folder (`opened` holds its lock); workers of that process may commit shards too.
    """

    def __init__(self, folder: Folder, kind: str, identities: dict[str, Any]) -> None:
        self.folder, self.kind, self.identities = folder, kind, identities
        self.ledger = Ledger(folder)
        self.committed: dict[str, ShardRecord] = {}
        self.lock: Lock | None = None
        self._num_rows: dict[Origin, int] = {}
        #: called before each commit; raises `UserError` if the rows may not be those that the job is about
        self.check_source: Callable[[], None] | None = None

    @contextlib.contextmanager
    def opened(self, config_toml: str, num_rows: Mapping[Origin, int]) -> Iterator[Manifest | None]:
        """Create the folder or resume in it, and lock it while the block runs; gives the manifest if it is finished.

        `num_rows` is the number of rows that the job will make, by origin. Raises `UserError` if the folder contains
        something else, or another process writes to it.
        """
        manifest = self._finished()
        if manifest is not None and not (self.folder.exists(JOB) or self.folder.exists(LOCK)):
            yield manifest
            return
        self._refuse_foreign_files()
        with locks.hold(self.folder) as self.lock:
            # another process may have finished it in the meantime
            manifest = self._finished()
            if manifest is None:
                self._start(config_toml, num_rows)
            else:  # it may have been killed between writing the manifest and cleaning up
                self._clean_up()
            yield manifest

    def _finished(self) -> Manifest | None:
        if not self.folder.exists(MANIFEST):
            return None
        manifest = read_manifest(self.folder, self.kind)
        self._refuse_other(manifest.identities, "a finished cache with other options")
        return manifest

    def _start(self, config_toml: str, num_rows: Mapping[Origin, int]) -> None:
        existing = read_job(self.folder)
        if existing is None:
            body = {"kind": self.kind, "identities": self.identities, "num_rows": dict(num_rows)}
            self.folder.write_checked(JOB, canonical_json(body), self._check_hold)
        else:
            self._refuse_other(existing["identities"], "an unfinished cache with other options")
            self.identities = existing["identities"]  # what readers of the unfinished cache know it by
        self.folder.write_checked(SAVED_OPTIONS, config_toml.encode(), self._check_hold)
        self._num_rows = dict(num_rows)
        self.committed = self._sound_shards()

    def _sound_shards(self) -> dict[str, ShardRecord]:
        """The shards that are as they were committed, by path; others are said, and are not committed any more."""
        # an object store checks the bytes that it keeps; on a disk they can change behind the same version
        sound, changed = self.ledger.examine(read_all=isinstance(self.folder, LocalFolder))
        for path, how in sorted(changed.items()):
            say(f"{path} has changed since it was committed ({how}): its rows are made again")
            self._check_hold()
            self.ledger.withdraw(path)
        return sound

    def part(self, name: str, done: Mapping[str, ShardRecord]) -> Job:
        """An earlier stage of this job, in a folder of its own under the same lock.

        The shards `done` need nothing of it any more, and count as committed.
        """
        part = Job(self.folder.child(name), name, self.identities)
        part.lock = self.lock
        part.committed = {**done, **part._sound_shards()}
        return part

    def _refuse_other(self, existing: dict[str, Any], what: str) -> None:
        if changed := changed_identities(existing, self.identities):
            raise UserError(
                f"the output directory contains {what}; differing: {'; '.join(changed)}",
                where=self.folder,
                advice="Choose another --out, or give the options that it was started with",
            )

    def _refuse_foreign_files(self) -> None:
        if isinstance(self.folder, LocalFolder) and self.folder.path.is_file():
            raise UserError("the output is a file, not a directory", where=self.folder)
        names = {name.split("/")[0] for name in self.folder.sizes()} - {LOCK, FLOCK}
        # one listing: another job may start or finish the cache at any moment
        if names and not names & {JOB, MANIFEST}:
            raise UserError(
                "the output directory contains other files",
                found=", ".join(sorted(names)[:4]),
                expected="an empty or missing directory",
                where=self.folder,
                advice="Choose another --out",
            )

    def commit(self, data: bytes, record: ShardRecord) -> None:
        """Write a shard, then its record. Raises `UserError` if the lock is lost or the shard cannot be written."""
        self.ledger.commit(data, record, self._check_hold)
        self.committed[record.path] = record

    def _check_hold(self) -> None:
        if self.lock is not None:
            self.lock.check()
        if self.check_source is not None:
            self.check_source()

    def num_done(self, prefix: str = "shards/") -> int:
        """Rows, failed ones included, of the committed shards whose path starts with `prefix`."""
        return sum(record.num_settled for path, record in self.committed.items() if path.startswith(prefix))

    def finish(self, skipped: list[dict[str, Any]], text: Mapping[str, int] | None = None) -> Manifest:
        """Write the manifest of the committed shards, in the order of their names; `text` as in `Manifest`.

        Raises `UserError`, and writes nothing, if the lock is lost, a shard or its record is not as it was committed,
        or the rows are not those that were planned.
        """
        self._check_hold()
        manifest = Manifest(
            kind=self.kind,
            identities=self.identities,
            shards=[self.committed[path] for path in sorted(self.committed)],
            skipped=skipped,
            text=dict(text or {}),
            files={SAVED_OPTIONS: hashlib.sha256(self.folder.read(SAVED_OPTIONS)).hexdigest()},
            software=software_versions(),
            format_version=format_of(self.kind, self.identities),
        )
        data = manifest.to_bytes()
        # looked at as late as possible: a shard that changes after it is in the manifest as it was
        self._check_stored()
        rows: dict[str, int] = dict.fromkeys(self._num_rows, 0)
        for record in self.committed.values():
            rows[record.origin] = rows.get(record.origin, 0) + record.num_settled
        if rows != self._num_rows:
            raise UserError(
                "the committed rows are not the planned ones",
                found=rows,
                expected=self._num_rows,
                where=self.folder,
                advice="Delete the directory and start again",
            )
        self.folder.write_checked(MANIFEST, data, self._check_hold)
        self._clean_up()
        return manifest

    def _check_stored(self) -> None:
        """Raise `UserError` unless shards and records are in the folder as this process knows them."""
        stored, changed = self.ledger.examine()
        for path, record in sorted(self.committed.items()):
            if path in changed:
                raise UserError(
                    "a shard changed while the job ran",
                    found=changed[path],
                    expected=f"{record.num_bytes} bytes with sha256 {record.sha256[:16]}…",
                    where=self.folder.where(path),
                    advice="Run the same command again: it makes the shard again",
                )
            if stored.get(path) != record:
                raise UserError(
                    "the record of a shard changed while the job ran",
                    found=path,
                    where=self.folder,
                    advice="Find out what else writes to the directory, then run the same command again",
                )

    def _clean_up(self) -> None:
        self.ledger.discard()
        self.folder.delete(ANSWERS)
        self.folder.delete(JOB)
        self.folder.clean_up()


def read_job(folder: Folder) -> dict[str, Any] | None:
    """What an unfinished folder will be: `kind`, `identities`, `num_rows` by origin. None if no job has started."""
    try:
        job = loads(folder.read(JOB))
        return {key: job[key] for key in ("kind", "identities", "num_rows")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            "the job file cannot be read", where=folder.where(JOB), advice="Delete the directory and start again"
        ) from None


def read_saved_options(folder: Folder, advice: str) -> dict[str, Any]:
    """The options that the cache or round in `folder` was built with; raises `UserError` where they cannot be read."""
    try:
        return tomllib.loads(folder.read(SAVED_OPTIONS).decode())
    except FileNotFoundError:
        problem = "is missing"
    except (ValueError, RecursionError) as error:
        problem = f"is not TOML: {error}"
    raise UserError(f"the file of options {problem}", where=folder.where(SAVED_OPTIONS), advice=advice)
