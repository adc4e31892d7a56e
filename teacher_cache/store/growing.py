"""A cache that a job is still writing: its shards can be read as soon as they are committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.teacher_cache.store.folder import MANIFEST, Folder
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import read_job
from dpkd.teacher_cache.store.ledger import Ledger
from dpkd.teacher_cache.store.locks import Watch
from dpkd.teacher_cache.store.manifest import Manifest, read_manifest
from dpkd.teacher_cache.store.reader import CACHE_KIND, CacheReader
from dpkd.teacher_cache.store.shards import ShardRecord


class GrowingCache(CacheReader):
    """A cache that is being built, or has been finished in the meantime. `manifest` is None until it is finished."""

    def __init__(
        self, folder: Folder, identities: dict[str, Any], planned: dict[str, int], manifest: Manifest | None = None
    ) -> None:
        super().__init__(folder, identities)
        self.manifest = manifest
        self._planned = planned
        self._known: set[str] = set()
        self._watch = Watch(folder)

    @classmethod
    def open(cls, location: str | Path) -> GrowingCache | None:
        """The cache at `location`; None if no job has started it. Raises `UserError` for a round."""
        folder = open_folder(location)
        if folder.exists(MANIFEST):
            manifest = read_manifest(folder, CACHE_KIND)
            return cls(folder, manifest.identities, {}, manifest)
        job = read_job(folder)
        if job is None:
            return None
        if job["kind"] != CACHE_KIND:
            raise UserError(
                "the directory contains something else", found=job["kind"], expected=CACHE_KIND, where=folder
            )
        return cls(folder, job["identities"], job["num_rows"])

    def num_rows(self, origin: str | None) -> int:
        """Rows of `origin` (None: all); in an unfinished cache those that are planned, which may fail."""
        if self.manifest is not None:
            return sum(shard.rows for shard in self.manifest.shards if origin in (None, shard.origin))
        return sum(count for name, count in self._planned.items() if origin in (None, name))

    def new_shards(self) -> list[ShardRecord]:
        """Shards that were committed since the last call, in the order of their names."""
        if self.finished():  # asked first, because a job that finishes removes its ledger
            assert self.manifest is not None
            committed = {shard.path: shard for shard in self.manifest.shards}
        else:
            committed = Ledger(self.folder).committed(self._known)
        new = [committed[path] for path in sorted(committed.keys() - self._known)]
        self.pass_over(new)
        return new

    def pass_over(self, records: list[ShardRecord]) -> None:
        """Keep `new_shards` from returning `records`."""
        self._known.update(record.path for record in records)

    def finished(self) -> bool:
        """Whether the cache is finished; reads the manifest if it is."""
        if self.manifest is None and self.folder.exists(MANIFEST):
            self.manifest = read_manifest(self.folder, CACHE_KIND)
            if self.manifest.fingerprint != self.fingerprint:
                raise UserError("the cache was replaced by another one during training", where=self.folder)
        return self.manifest is not None

    def writer(self) -> str | None:
        """The process that is writing the cache, as text; None if there is none."""
        return self._watch.holder()
