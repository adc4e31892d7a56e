"""Shards of a finished cache or round that are not as they were committed, and the job that makes them again.

A shard that is made again is committed as in any job: the file, then its record in `ledger/`. The manifest is replaced
last, and only if a shard has other bytes than the lost one. Until then it has the old checksum, so a repair that is
killed leaves a cache whose bad shards every reader still refuses, and the next repair resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dpkd.core.errors import UserError
from dpkd.teacher_cache.store import locks
from dpkd.teacher_cache.store.folder import JOB, MANIFEST, Folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.ledger import LEDGER, is_sound
from dpkd.teacher_cache.store.locks import LOCK
from dpkd.teacher_cache.store.manifest import Manifest, load_manifest
from dpkd.teacher_cache.store.shards import ShardRecord, check_shard


class RepairJob(Job):
    """Makes shards of a finished cache or round again.

    Args:
        manifest: that of the folder.
        bad: the shards to make again.
        num_rows: rows of each shard, failed ones included, by path.
    """

    def __init__(self, folder: Folder, manifest: Manifest, bad: list[ShardRecord], num_rows: Mapping[str, int]) -> None:
        super().__init__(folder, manifest.kind, manifest.identities)
        self.manifest, self.bad = manifest, {record.path: record for record in bad}
        self._rows_of_shards = num_rows

    @contextlib.contextmanager
    def repairing(self) -> Iterator[None]:
        """Hold the folder's lock while the block runs. `bad` is looked at again: another repair may have ended."""
        with locks.hold(self.folder) as self.lock:
            self.manifest = load_manifest(self.folder, self.kind)
            records = {record.path: record for record in self.manifest.shards}
            self.bad = {path: records[path] for path in self.bad if not is_sound(self.folder, records[path])}
            self.committed = {path: record for path, record in records.items() if path not in self.bad}
            made = self.ledger.committed()
            # of a repair that was killed
            self.committed |= {path: made[path] for path in self.bad & made.keys() if is_sound(self.folder, made[path])}
            yield

    def changed(self) -> dict[str, ShardRecord]:
        """The shards that were made again and have other bytes than the lost ones, by path."""
        return {path: self.committed[path] for path, record in self.bad.items() if self.committed.get(path) != record}

    def also_remake(self, paths: Iterable[str]) -> None:
        """Delete sound shards that do not fit those that were made again; a later repair finds them missing too."""
        for path in paths:
            self.bad[path] = next(record for record in self.manifest.shards if record.path == path)
            del self.committed[path]
            self.folder.delete(path)

    def remade(self) -> dict[str, ShardRecord]:
        """The shards that were bad, as they are now, by path.

        Raises `UserError` if the lock is lost, or if one is missing, has other rows or is already bad again.
        """
        self._check_hold()
        made = self.ledger.committed()
        for path in self.bad:
            actual, expected = made[path].num_settled if path in made else 0, self._rows_of_shards[path]
            if actual != expected:
                raise UserError(
                    "a shard was not made again",
                    found=f"{actual} rows",
                    expected=f"{expected}",
                    where=self.folder.where(path),
                    advice="Run the same command again",
                )
            check_shard(self.folder, made[path])
        return {path: made[path] for path in self.bad}

    def replace_records(self, remade: Mapping[str, ShardRecord]) -> None:
        """Write `remade` into the manifest if it has other records, then remove what a job leaves behind."""
        self._check_hold()
        shards = [remade.get(record.path, record) for record in self.manifest.shards]
        if shards != self.manifest.shards:
            self.manifest = replace(self.manifest, shards=shards)
            self.folder.write_checked(MANIFEST, self.manifest.to_bytes(), self._check_hold)
        self._clean_up()


def has_leftovers(folder: Folder) -> bool:
    """Whether a killed job or repair has left its files in a finished folder."""
    return folder.exists(LOCK) or folder.exists(JOB) or bool(folder.sizes(LEDGER))
