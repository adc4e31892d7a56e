"""The committed shards of a job, and whether their files are still as they were committed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from dpkd.core.identity import canonical_json, fingerprint
from dpkd.core.json_lines import loads
from dpkd.core.progress import Progress
from dpkd.teacher_cache.store.folder import Folder
from dpkd.teacher_cache.store.shards import ShardRecord

LEDGER = "ledger"
_READERS = 4  # shards that are read and hashed at the same time


class Ledger:
    """The committed shards of an unfinished directory: one small record file each, written after the shard.

    A shard without a record was interrupted and is written again. Each record is a file, not a line of a common file:
    several writers then need no lock, and an interrupted write affects only its own shard. A record has the fields of
    `ShardRecord`, the `version` that the shard's file had when it was committed (`Folder.version`), and a `checksum` of
    all of this. Records of 0.1.0 have neither.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._hashed: dict[str, str | None] = {}  # version of each file whose bytes this object has found sound

    def committed(self, known: Collection[str] = ()) -> dict[str, ShardRecord]:
        """Records by shard path, without those of the `known` paths, which are not read again.

        A record that cannot be read or has another checksum is left out, and so is one whose shard is missing or has
        another size.
        """
        commits = self._commits(known)
        sizes = self._folder.sizes("shards") if commits else {}
        return {path: record for path, (record, _) in commits.items() if sizes.get(path) == record.num_bytes}

    def examine(self, *, read_all: bool = False) -> tuple[dict[str, ShardRecord], dict[str, str]]:
        """Records of the shards that are as they were committed, and what has become of the others, by path.

        One listing gives size and version of every file. A file that has the version of its commit has its bytes and
        is not read. A file with another version, and one of a store that gives none, is read and hashed. `read_all`:
        every file is, for a disk, where bytes can change behind the same version.
        """
        commits = self._commits()
        files = self._folder.files("shards") if commits else {}
        changed, doubtful = {}, []
        for path, (record, version) in commits.items():
            file = files.get(path)
            if file is None:
                changed[path] = "no file"
            elif file.size != record.num_bytes:
                changed[path] = f"{file.size} bytes instead of {record.num_bytes}"
            elif read_all or file.version is None or file.version not in (version, self._hashed.get(path)):
                doubtful.append(record)
        if doubtful:
            with Progress("compare with checksums", len(doubtful), "committed shards") as progress:
                changed |= {record.path: "checksum mismatch" for record in bad_shards(self._folder, doubtful, progress)}
        self._hashed |= {record.path: files[record.path].version for record in doubtful if record.path not in changed}
        return {path: record for path, (record, _) in commits.items() if path not in changed}, changed

    def _commits(self, known: Collection[str] = ()) -> dict[str, tuple[ShardRecord, str | None]]:
        names = self._folder.sizes(LEDGER).keys() - set(map(_record_name, known))
        commits = {}
        for name, content in self._folder.read_many(sorted(names)).items():
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                values = loads(content)
                checksum = values.pop("checksum", None)
                if (checksum is not None or "version" in values) and checksum != fingerprint(values):
                    continue  # it is as if the shard had not been committed
                version = values.pop("version", None)
                record = ShardRecord.from_json(values, self._folder.where(name))
                commits[record.path] = record, version
        return commits

    def commit(self, data: bytes, record: ShardRecord, check: Callable[[], None] = lambda: None) -> None:
        """Write the shard, then its record, each if `check` allows it (`Folder.write_checked`)."""
        self._folder.write_checked(record.path, data, check)
        values = asdict(record) | {"version": self._folder.version(record.path)}
        content = canonical_json(values | {"checksum": fingerprint(values)})
        self._folder.write_checked(_record_name(record.path), content, check)

    def withdraw(self, path: str) -> None:
        """Remove the record of a shard, which every process then takes as not committed."""
        self._folder.delete(_record_name(path))

    def discard(self) -> None:
        """Remove the records once they are in the manifest."""
        self._folder.delete(LEDGER)


def _record_name(shard_path: str) -> str:
    return f"{LEDGER}/{shard_path.replace('/', '--').removesuffix('.parquet')}.json"


def bad_shards(folder: Folder, records: Sequence[ShardRecord], progress: Progress | None = None) -> list[ShardRecord]:
    """Those of `records` whose file is missing or has another checksum; reads every file."""
    bad = []
    with ThreadPoolExecutor(_READERS, thread_name_prefix="check-shards") as pool:
        for record, sound in zip(records, pool.map(lambda record: is_sound(folder, record), records), strict=True):
            if not sound:
                bad.append(record)
            if progress is not None:
                progress.advance()
    return bad


def is_sound(folder: Folder, record: ShardRecord) -> bool:
    """Whether the shard has the bytes of its record. Raises `UserError` if the storage does not answer."""
    try:
        return hashlib.sha256(folder.read(record.path)).hexdigest() == record.sha256
    except FileNotFoundError:
        return False
