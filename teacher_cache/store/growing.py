"""A cache that a running job is still writing: committed shards are visible at once, in the order they are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.teacher_cache.store.folders import Folder, open_folder
from dpkd.teacher_cache.store.job import read_job
from dpkd.teacher_cache.store.locks import holder
from dpkd.teacher_cache.store.manifest import MANIFEST, Manifest, read_manifest
from dpkd.teacher_cache.store.reader import CACHE_KIND, CacheReader
from dpkd.teacher_cache.store.shards import Ledger, ShardRecord


class GrowingCache(CacheReader):
    """A cache under construction, or one that has been finished meanwhile.

    `num_rows` are the rows that the job plans, by origin; `manifest` is None until the cache is finished.
    """

    def __init__(
        self, folder: Folder, identities: dict[str, Any], planned: dict[str, int], manifest: Manifest | None = None
    ) -> None:
        super().__init__(folder, identities)
        self.manifest = manifest
        self._planned = planned
        self._known: set[str] = set()

    @classmethod
    def open(cls, location: str | Path) -> GrowingCache | None:
        """The cache at `location`; None when no job has begun it. `UserError` for one of another kind."""
        folder = open_folder(location)
        if folder.exists(MANIFEST):
            manifest = read_manifest(folder, CACHE_KIND)
            return cls(folder, manifest.identities, {}, manifest)
        job = read_job(folder)
        if job is None:
            return None
        if job["kind"] != CACHE_KIND:
            raise UserError(
                "the directory holds another kind of thing", found=job["kind"], expected=CACHE_KIND, where=folder
            )
        return cls(folder, job["identities"], job["num_rows"])

    def num_rows(self, origin: str | None) -> int:
        """Rows of `origin` (None: of all) that the cache has or, unfinished, will have but for any set aside."""
        if self.manifest is not None:
            return sum(shard.rows for shard in self.manifest.shards if origin in (None, shard.origin))
        return sum(count for name, count in self._planned.items() if origin in (None, name))

    def new_shards(self) -> list[ShardRecord]:
        """Shards that were committed since the last call, in order of their names.

        The manifest is looked for first: when it appears, the ledger goes.
        """
        if self.finished():
            assert self.manifest is not None
            found = {shard.path: shard for shard in self.manifest.shards}
        else:
            found = Ledger(self.folder).committed(self._known)
        new = [found[path] for path in sorted(found.keys() - self._known)]
        self.pass_over(new)
        return new

    def pass_over(self, records: list[ShardRecord]) -> None:
        """Take `records` for known: `new_shards` does not give them again."""
        self._known.update(record.path for record in records)

    def finished(self) -> bool:
        """Whether the manifest is there; reads it when it is."""
        if self.manifest is None and self.folder.exists(MANIFEST):
            self.manifest = read_manifest(self.folder, CACHE_KIND)
            if self.manifest.fingerprint != self.fingerprint:
                raise UserError("the cache has been replaced by another one while it was followed", where=self.folder)
        return self.manifest is not None

    def writer(self) -> str | None:
        """Host and process of the job that is writing the cache; None when none is at work."""
        return holder(self.folder)
