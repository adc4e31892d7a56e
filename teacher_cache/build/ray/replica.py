"""The actor on a node of a Ray cluster: a vLLM engine that gets blocks of prompts and commits their shards."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.teacher_cache.build.assembling import ShardLayout, fill
from dpkd.teacher_cache.build.ray.blocks import from_block, paths_of
from dpkd.teacher_cache.engines.engine import Engine, EngineOptions, Sampling
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.store.folder import JOB, Folder, LocalFolder
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.locks import Lock
from dpkd.teacher_cache.store.rows import PlannedRow
from dpkd.teacher_cache.store.shards import ShardRecord

# a committed shard, or the `refusal` that ends the job: Ray Data would wrap an exception in another and log it
_REPORT_SCHEMA = pa.schema({"path": pa.string(), "rows": pa.int64(), "positions": pa.int64(), "refusal": pa.string()})


@dataclass(frozen=True)
class Assignment:
    """The work of a replica.

    `lock` is the folder and the token of the job's lock, if it has one. `witness`: path and content of the job file of
    a local folder.
    """

    model: ModelSource
    options: EngineOptions
    location: str
    lock: tuple[str, str] | None
    witness: tuple[Path, bytes] | None
    kind: str
    layout: ShardLayout
    sampling: Sampling | None


class _ReplicaJob(Job):
    """A job in a replica: commits are reported, and need the lock that the driver holds."""

    def __init__(self, folder: Folder, kind: str, lock: Lock | None) -> None:
        super().__init__(folder, kind, {})
        self.lock = lock
        # a restarted replica gets the same block again and must know what it had committed
        self.committed = self.ledger.committed()
        self.reports: queue.SimpleQueue[ShardRecord | None] = queue.SimpleQueue()

    def commit(self, data: bytes, record: ShardRecord) -> None:
        super().commit(data, record)
        self.reports.put(record)


class Replica:
    """The actor with one vLLM engine: gets a block, commits its shards and reports each."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._refusal: str | None = None
        # the engine has its own thread, so that the actor's thread can report in the meantime
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        try:
            self._job, self._model, self._engine = self._thread.submit(self._open).result()
        except UserError as error:
            self._refusal = str(error)

    def _open(self) -> tuple[_ReplicaJob, ModelSource, Engine]:
        _check_witness(self._assignment.witness)
        held = self._assignment.lock
        lock = None if held is None else Lock(open_folder(held[0]), held[1])
        job = _ReplicaJob(open_folder(self._assignment.location), self._assignment.kind, lock)
        model = _found_here(self._assignment.model)
        return job, model, open_engine("vllm", model, self._assignment.options)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Fill the block's shards; yields a report of each committed shard, and of the `UserError` that stops it.

        Shards that already exist are reported too: when Ray retries a block, it must yield as much as before.
        """
        if self._refusal is None:
            rows = from_block(block)
            for path in sorted(paths_of(rows, self._assignment.layout) & self._job.committed.keys()):
                yield _report(self._job.committed[path])
            work = self._thread.submit(self._fill, rows)
            for record in iter(self._job.reports.get, None):
                yield _report(record)
            try:
                work.result()
            except UserError as error:
                self._refusal = str(error)
        if self._refusal is not None:
            yield pa.table([[None], [None], [None], [self._refusal]], schema=_REPORT_SCHEMA)

    def _fill(self, rows: list[PlannedRow]) -> None:
        try:
            fill(self._engine, self._model.decode, self._job, self._assignment.layout, rows, self._assignment.sampling)
        finally:
            self._job.reports.put(None)


def _report(record: ShardRecord) -> pa.Table:
    return pa.table([[record.path], *([count] for count in counts_of(record)), [None]], schema=_REPORT_SCHEMA)


def find_witness(folder: Folder) -> tuple[Path, bytes] | None:
    """The job file of a local folder; for a round's `sampled` folder that of its parent."""
    if isinstance(folder, LocalFolder):
        for directory in (folder.path.absolute(), folder.path.absolute().parent):
            if (directory / JOB).is_file():
                return directory / JOB, (directory / JOB).read_bytes()
    return None


def _check_witness(witness: tuple[Path, bytes] | None) -> None:
    if witness is not None and not (witness[0].is_file() and witness[0].read_bytes() == witness[1]):
        raise UserError(
            "a node of the Ray cluster does not see the cache's directory",
            where=f"{witness[0].parent} on {socket.gethostname()}",
            advice="Choose an --out on a disk that all nodes share, or a URL such as s3://bucket/key",
        )


def _found_here(model: ModelSource) -> ModelSource:
    """The model on this node, where the hub's files may be in another directory."""
    if model.path.is_dir():
        return model
    if model.revision is not None:
        found = locate_model(model.name, "model")
        if found.revision == model.revision:
            return found
    raise UserError(
        "a node of the Ray cluster does not have the model",
        where=f"{model.path} on {socket.gethostname()}",
        advice="Put it on a disk that all nodes share",
    )


def counts_of(record: ShardRecord) -> tuple[int, int]:
    """Rows, failed ones included, and response tokens."""
    return record.num_settled, record.positions
