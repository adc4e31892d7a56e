"""A folder being filled: what it will be, who works in it, and what is committed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import canonical_json, differences, fingerprint, software_versions
from dpkd.teacher_cache.store import locks
from dpkd.teacher_cache.store.folders import Folder, LocalFolder
from dpkd.teacher_cache.store.locks import FLOCK, LOCK, Lock
from dpkd.teacher_cache.store.manifest import MANIFEST, Manifest, read_manifest
from dpkd.teacher_cache.store.schema import Origin
from dpkd.teacher_cache.store.shards import Ledger, ShardRecord

JOB = "job.json"


class Job:
    """A cache (or round) under construction in `folder`.

    The identities are written first; another run with other identities is refused, one with the same goes on. One
    process at a time works in a folder (`opened` holds its lock); workers of the same job may commit shards too.
    """

    def __init__(self, folder: Folder, kind: str, identities: dict[str, Any]) -> None:
        self.folder, self.kind, self.identities = folder, kind, identities
        self.ledger = Ledger(folder)
        self.committed: dict[str, ShardRecord] = {}
        self._lock: Lock | None = None

    @contextlib.contextmanager
    def opened(self, config_toml: str, num_rows: Mapping[Origin, int]) -> Iterator[Manifest | None]:
        """Create or take up the folder, which stays locked while the block runs; the manifest when all is done.

        `num_rows` is how many rows the job will make, by origin. Raises `UserError` when the folder holds something
        else, or another process works in it.
        """
        manifest = self._finished()
        if manifest is not None:
            yield manifest
            return
        self._refuse_foreign_files()
        with locks.hold(self.folder) as self._lock:
            # another process may have finished it while this one looked
            manifest = self._finished()
            if manifest is None:
                self._take_up(config_toml, num_rows)
            yield manifest

    def _finished(self) -> Manifest | None:
        if not self.folder.exists(MANIFEST):
            return None
        manifest = read_manifest(self.folder, self.kind)
        self._refuse_other(manifest.identities, "a finished cache of other options")
        if self.folder.exists(JOB):  # killed between the manifest and the tidying up
            self._clean_up()
        return manifest

    def _take_up(self, config_toml: str, num_rows: Mapping[Origin, int]) -> None:
        held = read_job(self.folder)
        if held is None:
            body = {"kind": self.kind, "identities": self.identities, "num_rows": dict(num_rows)}
            self.folder.write(JOB, canonical_json(body))
        else:
            self._refuse_other(held["identities"], "an unfinished cache of other options")
        self.folder.write("dpkd.toml", config_toml.encode())
        self.committed = self.ledger.committed()

    def _refuse_other(self, held: dict[str, Any], what: str) -> None:
        if fingerprint(held) != fingerprint(self.identities):
            raise UserError(
                f"the output directory holds {what}; differing: {'; '.join(differences(held, self.identities))}",
                where=self.folder,
                advice="Choose another --out, or repeat the options that it was started with",
            )

    def _refuse_foreign_files(self) -> None:
        if isinstance(self.folder, LocalFolder) and self.folder.path.is_file():
            raise UserError("the output is a file, not a directory", where=self.folder)
        if self.folder.exists(JOB):
            return
        held = sorted({name.split("/")[0] for name in self.folder.sizes()} - {LOCK, FLOCK})
        if held:
            raise UserError(
                "the output directory holds other files",
                found=", ".join(held[:4]),
                expected="an empty or absent directory",
                where=self.folder,
                advice="Choose another --out",
            )

    def commit(self, data: bytes, record: ShardRecord) -> None:
        """Write a shard and the record that makes it count; `UserError` when the lock is lost or the disk refuses."""
        if self._lock is not None:
            self._lock.check()
        self.ledger.commit(data, record)
        self.committed[record.path] = record

    def num_done(self, prefix: str = "shards/") -> int:
        """Rows that are settled, set aside ones among them, in committed shards whose path starts with `prefix`."""
        records = [record for path, record in self.committed.items() if path.startswith(prefix)]
        return sum(record.num_settled for record in records)

    def finish(self, skipped: list[dict[str, Any]]) -> Manifest:
        """Write the manifest over the committed shards, in order of their names."""
        manifest = Manifest(
            kind=self.kind,
            identities=self.identities,
            shards=[self.committed[path] for path in sorted(self.committed)],
            skipped=skipped,
            files={"dpkd.toml": hashlib.sha256(self.folder.read("dpkd.toml")).hexdigest()},
            software=software_versions(),
        )
        manifest.write(self.folder)
        self._clean_up()
        return manifest

    def _clean_up(self) -> None:
        self.ledger.discard()
        self.folder.delete(JOB)
        self.folder.clean_up()


def read_job(folder: Folder) -> dict[str, Any] | None:
    """What an unfinished folder will be: `kind`, `identities`, `num_rows` by origin; None where no job is begun."""
    try:
        held = json.loads(folder.read(JOB))
        return {"kind": held["kind"], "identities": held["identities"], "num_rows": held["num_rows"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            "the job file cannot be read", where=folder.where(JOB), advice="Delete the directory and start again"
        ) from None
