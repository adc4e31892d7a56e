"""A directory being filled: what it will be, what is committed, and how results become shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpkd.teacher_cache.engine import EngineResult
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.files import write_atomic
from dpkd.teacher_cache.identity import (
    canonical_json,
    differences,
    file_sha256,
    fingerprint,
    software_versions,
)
from dpkd.teacher_cache.manifest import MANIFEST, Manifest, read_manifest
from dpkd.teacher_cache.schema import Origin, PlannedRow, to_table
from dpkd.teacher_cache.shards import Ledger, ShardRecord, encode_shard

_JOB = "job.json"
_SHARDS_IN_FLIGHT = 4  # encoded or waiting to be written; bounds memory when the disk is slow


class Job:
    """A cache (or round) under construction in `directory`.

    The identities are written first; another run with other identities is refused, one with the same goes on.
    """

    def __init__(self, directory: Path, kind: str, identities: dict[str, Any]) -> None:
        self.directory, self.kind, self.identities = directory, kind, identities
        self.ledger = Ledger(directory)
        self.committed: dict[str, ShardRecord] = {}

    def open(self, config_toml: str) -> Manifest | None:
        """Create or take up the directory; the manifest when there is nothing left to do.

        Raises `UserError` when the directory holds something else.
        """
        if (self.directory / MANIFEST).is_file():
            manifest = read_manifest(self.directory, self.kind)
            self._refuse_other(manifest.identities, "a finished cache of other options")
            self._clean_up()
            return manifest
        job_path = self.directory / _JOB
        if job_path.is_file():
            try:
                held = json.loads(job_path.read_bytes())["identities"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    "the job file cannot be read",
                    where=job_path,
                    advice="Delete the directory and start again",
                ) from None
            self._refuse_other(held, "an unfinished cache of other options")
        else:
            self._refuse_foreign_files()
            write_atomic(job_path, canonical_json({"kind": self.kind, "identities": self.identities}))
        write_atomic(self.directory / "dpkd.toml", config_toml.encode())
        self.committed = self.ledger.committed()
        return None

    def _refuse_other(self, held: dict[str, Any], what: str) -> None:
        if fingerprint(held) != fingerprint(self.identities):
            raise UserError(
                f"the output directory holds {what}; differing: {'; '.join(differences(held, self.identities))}",
                where=self.directory,
                advice="Choose another --out, or repeat the options that it was started with",
            )

    def _refuse_foreign_files(self) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError("the output is a file, not a directory", where=self.directory)
        held = sorted(path.name for path in self.directory.iterdir()) if self.directory.is_dir() else []
        held = [name for name in held if not (name.startswith(".") and ".tmp" in name)]
        if held:
            raise UserError(
                "the output directory holds other files",
                found=", ".join(held[:4]),
                expected="an empty or absent directory",
                where=self.directory,
                advice="Choose another --out",
            )

    def finish(self, skipped: list[dict[str, Any]]) -> Manifest:
        """Write the manifest over the committed shards, in order of their names."""
        manifest = Manifest(
            kind=self.kind,
            identities=self.identities,
            shards=[self.committed[path] for path in sorted(self.committed)],
            skipped=skipped,
            files={"dpkd.toml": file_sha256(self.directory / "dpkd.toml")},
            software=software_versions(),
        )
        manifest.write(self.directory)
        self._clean_up()
        return manifest

    def _clean_up(self) -> None:
        self.ledger.discard()
        (self.directory / _JOB).unlink(missing_ok=True)
        for left in self.directory.rglob(".*.tmp*"):
            left.unlink(missing_ok=True)


class ShardAssembler:
    """Gathers results that arrive in any order into shards of fixed membership, named `stem`-NUMBER.

    Row i of an origin belongs to shard i // rows_per_shard, so a cache has the same rows in the same places however
    often it was interrupted. Encoding and disk run on a thread of their own.
    """

    def __init__(
        self,
        job: Job,
        origin: Origin,
        rows_per_shard: int,
        to_text: Callable[[list[int]], str],
        stem: str | None = None,
    ) -> None:
        self._job, self._origin, self._rows_per_shard, self._to_text = job, origin, rows_per_shard, to_text
        self._stem = stem or origin
        self._planned: dict[int, list[PlannedRow]] = {}
        self._results: dict[int, dict[int, EngineResult]] = {}
        self._closed: set[int] = set()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer")
        self._writing: list[Future[None]] = []

    def path(self, shard: int) -> str:
        """Path of a shard inside the directory."""
        return f"shards/{self._stem}-{shard:06d}.parquet"

    def pending(self, rows: Iterable[PlannedRow]) -> Iterator[PlannedRow]:
        """The rows of shards that are not committed yet, taken note of as they pass."""
        current: int | None = None
        for row in rows:
            shard = row.index // self._rows_per_shard
            if shard != current and current is not None:
                self._close(current)
            current = shard
            if self.path(shard) not in self._job.committed:
                self._planned.setdefault(shard, []).append(row)
                yield row
        if current is not None:
            self._close(current)

    def add(self, result: EngineResult) -> None:
        """Take a result; its shard is committed once all its rows are in."""
        shard = result.index // self._rows_per_shard
        self._results.setdefault(shard, {})[result.index] = result
        self._write_if_complete(shard)

    def _close(self, shard: int) -> None:
        self._closed.add(shard)
        self._write_if_complete(shard)

    def _write_if_complete(self, shard: int) -> None:
        planned, results = self._planned.get(shard, []), self._results.get(shard, {})
        if shard not in self._closed or not planned or len(results) < len(planned):
            return
        del self._planned[shard], self._results[shard]
        self._settle(_SHARDS_IN_FLIGHT - 1)
        self._writing.append(self._writer.submit(self._write, shard, planned, results))

    def _write(self, shard: int, planned: list[PlannedRow], results: dict[int, EngineResult]) -> None:
        rows = [(row, results[row.index], self._to_text(results[row.index].response_ids.tolist())) for row in planned]
        data, record = encode_shard(to_table(rows), self.path(shard), self._origin)
        self._job.ledger.commit(data, record)
        self._job.committed[record.path] = record

    def _settle(self, most: int) -> None:
        while len(self._writing) > most:
            self._writing.pop(0).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # an interrupt still commits the shards that are complete
        try:
            self._settle(0)
        finally:
            self._writer.shutdown(wait=True)
        if kind is None and (self._planned or self._results):
            raise RuntimeError(f"{len(self._planned)} shards of {self._origin} rows are incomplete")
