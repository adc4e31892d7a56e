"""The engine `ray`: vLLM replicas on a Ray cluster, fed with blocks of prompts by Ray Data; they write the shards.

The cluster is that of `RAY_ADDRESS`, or one on this machine that ends with the job. Every node needs dpkd with vLLM,
the model under the same path (or the hub), and the cache's folder: on a disk that all nodes share, or a URL. A replica
reserves `ray_cpus` and `ray_gpus`; with `--engine-arg tensor_parallel_size=N` `ray_gpus` must be N. What a replica
says goes to Ray's logs on its node, and variables such as `VLLM_CPU_KVCACHE_SPACE` are those that the node has.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from dpkd.teacher_cache.assembling import ShardAssembler, ShardLayout, fill
from dpkd.teacher_cache.engine import Engine, EngineOptions, Sampling, open_engine
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.folders import Folder, LocalFolder, open_folder
from dpkd.teacher_cache.job import JOB, Job
from dpkd.teacher_cache.models import ModelSource, locate_model
from dpkd.teacher_cache.progress import Progress, say
from dpkd.teacher_cache.schema import PlannedRow
from dpkd.teacher_cache.shards import ShardRecord

if TYPE_CHECKING:
    from dpkd.teacher_cache.config import CacheConfig

_FULL_BATCHES = 16  # rows of a block, in batches of the engine, which runs empty at the end of every block
_LEAST_ROWS = 512  # of a block, unless the job is small
_BLOCKS_PER_REPLICA = 2  # at least, so that a fast replica can help a slow one
_MOST_BLOCKS = 1024  # in Ray's object store at one time; replicas start anew after so many
_RETRIES = 3  # of a block whose replica dies: rows that kill whoever takes them up end the job
_RESTARTS = 20  # of a replica, for the same reason
_KNOCK_S = 10.0
_LOCAL = "local"
_SETTLE_S = 60.0  # a shared disk may show a node an old listing for so long

_ROW_TYPE = pa.struct(
    {
        "index": pa.int64(),
        "example_id": pa.string(),
        "sample": pa.int32(),
        "origin": pa.string(),
        "prompt": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "seed": pa.int64(),
        "response_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "failed": pa.string(),
    }
)
# one row of the dataset is a whole block: to replicas with a GPU Ray Data hands a number of rows, never a block
_BLOCK_SCHEMA = pa.schema({"rows": pa.list_(_ROW_TYPE)})
# a committed shard, or the `refusal` that ends the job: of an exception Ray Data would make another, and log it
_REPORT_SCHEMA = pa.schema({"path": pa.string(), "rows": pa.int64(), "positions": pa.int64(), "refusal": pa.string()})


def to_block(rows: list[PlannedRow]) -> pa.Table:
    """Planned rows as an Arrow table of one row."""
    values = [{field.name: getattr(row, field.name) for field in _ROW_TYPE} for row in rows]
    return pa.table([[values]], schema=_BLOCK_SCHEMA)


def from_block(block: pa.Table) -> list[PlannedRow]:
    """Inverse of `to_block`."""
    return [PlannedRow(**values) for values in block["rows"][0].as_py()]


def split_blocks(
    rows: Iterable[PlannedRow], layout: ShardLayout, committed: Set[str], most_rows: int, num_replicas: int
) -> Iterator[list[PlannedRow]]:
    """The rows of shards that are not in `committed`, in blocks of whole shards.

    A block has up to `most_rows` rows, but at least one shard; a small job has smaller ones, for every replica some.
    """
    shards = (
        list(members)
        for number, members in itertools.groupby(rows, lambda row: row.index // layout.rows_per_shard)
        if layout.path(number) not in committed
    )
    most = max(1, most_rows // layout.rows_per_shard)
    least_blocks = _BLOCKS_PER_REPLICA * num_replicas
    head = list(itertools.islice(shards, least_blocks * most))  # all of a small job
    size = max(1, len(head) // least_blocks)
    shards_again = itertools.chain(head, shards)
    while part := list(itertools.islice(shards_again, size)):
        yield list(itertools.chain.from_iterable(part))


def _paths(rows: Iterable[PlannedRow], layout: ShardLayout) -> set[str]:
    return {layout.path(number) for number in {row.index // layout.rows_per_shard for row in rows}}


@dataclass(frozen=True)
class _Assignment:
    """What a replica works on. `witness` is the job file of a local folder, path and content."""

    model: ModelSource
    options: EngineOptions
    location: str
    witness: tuple[Path, bytes] | None
    kind: str
    layout: ShardLayout
    sampling: Sampling | None


class _ReplicaJob(Job):
    """A job's folder as a replica sees it: commits are reported, and the lock is the driver's."""

    def __init__(self, folder: Folder, kind: str) -> None:
        super().__init__(folder, kind, {})
        # a replica that died starts anew, and learns here what it had committed of the block that it gets again
        self.committed = self.ledger.committed()
        self.reports: queue.SimpleQueue[ShardRecord | None] = queue.SimpleQueue()

    def commit(self, data: bytes, record: ShardRecord) -> None:
        """See `Job.commit`."""
        super().commit(data, record)
        self.reports.put(record)


class Replica:
    """The actor around one vLLM engine: takes a block, commits its shards, reports each."""

    def __init__(self, assignment: _Assignment) -> None:
        self._assignment = assignment
        self._refusal: str | None = None
        # one thread for all that the engine does; the actor's own thread reports meanwhile
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        try:
            self._job, self._model, self._engine = self._thread.submit(self._open).result()
        except UserError as error:
            self._refusal = str(error)

    def _open(self) -> tuple[_ReplicaJob, ModelSource, Engine]:
        _check_witness(self._assignment.witness)
        job = _ReplicaJob(open_folder(self._assignment.location), self._assignment.kind)
        model = _found_here(self._assignment.model)
        return job, model, open_engine("vllm", model, self._assignment.options)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Fill the block's shards; a report of each once it is committed, and one of the `UserError` that stops it.

        Shards that are there already are reported too: a block that Ray tries again has to yield as much as before.
        """
        if self._refusal is None:
            rows = from_block(block)
            for path in sorted(_paths(rows, self._assignment.layout) & self._job.committed.keys()):
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
            with ShardAssembler(self._job, self._assignment.layout, self._model.decode) as assembler:
                fill(assembler, rows, self._engine, self._assignment.sampling)
        finally:
            self._job.reports.put(None)


def _report(record: ShardRecord) -> pa.Table:
    return pa.table([[record.path], *([count] for count in _counts(record)), [None]], schema=_REPORT_SCHEMA)


def _witness(folder: Folder) -> tuple[Path, bytes] | None:
    """The job file of a local folder; a round's `sampled` folder has it above."""
    if isinstance(folder, LocalFolder):
        for place in (folder.path.absolute(), folder.path.absolute().parent):
            if (place / JOB).is_file():
                return place / JOB, (place / JOB).read_bytes()
    return None


def _check_witness(witness: tuple[Path, bytes] | None) -> None:
    if witness is not None and not (witness[0].is_file() and witness[0].read_bytes() == witness[1]):
        raise UserError(
            "a node of the Ray cluster does not see the cache's directory",
            where=f"{witness[0].parent} on {socket.gethostname()}",
            advice="Choose an --out on a disk that all nodes share, or a URL such as s3://bucket/key",
        )


def _found_here(model: ModelSource) -> ModelSource:
    """The model on this node, where the hub's files may lie elsewhere than on the driver's."""
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


class RayFiller:
    """A filler whose engines are the replicas of a Ray cluster; Ray starts one that dies anew."""

    def __init__(self, model: ModelSource, options: EngineOptions, config: CacheConfig) -> None:
        # made anew, without the tokenizer that `model` may hold
        self._model = ModelSource(model.name, model.path.absolute(), model.revision)
        self._options, self._config = options, config
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        import ray

        with contextlib.ExitStack() as opened:
            if not ray.is_initialized():
                _connect()
                opened.callback(ray.shutdown)  # ends a cluster of ours and leaves another
            _check_room(self._config)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def __call__(
        self,
        job: Job,
        layout: ShardLayout,
        rows: Iterable[PlannedRow],
        sampling: Sampling | None,
        progress: Progress,
    ) -> None:
        """See `Filler`."""
        import ray

        location = str(job.folder.path.absolute() if isinstance(job.folder, LocalFolder) else job.folder)
        assignment = _Assignment(self._model, self._options, location, _witness(job.folder), job.kind, layout, sampling)
        most_rows = max(_LEAST_ROWS, _FULL_BATCHES * self._options.max_num_seqs)
        blocks = split_blocks(rows, layout, job.committed.keys(), most_rows, self._config.ray_replicas)
        planned: set[str] = set()

        def in_object_store(block: list[PlannedRow]) -> Any:
            planned.update(_paths(block, layout))
            return ray.put(to_block(block))

        # the object store takes block after block (and spills to disk): the driver never holds the whole plan
        tally = _Tally(progress)
        while references := [in_object_store(block) for block in itertools.islice(blocks, _MOST_BLOCKS)]:
            self._run(references, assignment, tally)
        job.committed = _settled(job, planned)
        for path in planned:
            tally.add(path, *_counts(job.committed[path]))

    def _run(self, references: list[Any], assignment: _Assignment, tally: _Tally) -> None:
        from ray.exceptions import RayActorError

        try:
            # closing ends the replicas, whatever happens here
            with contextlib.closing(iter(self._reports(references, assignment))) as batches:
                for report in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
                    if report["refusal"] is not None:
                        raise UserError(report["refusal"])
                    tally.add(report["path"], report["rows"], report["positions"])
        except RayActorError as error:
            raise UserError(
                f"a replica on the Ray cluster died, and so did those that took its place: {_last_line(error)}",
                advice="What is committed is kept. Look at Ray's logs (/tmp/ray/session_latest/logs on the nodes), "
                "then run the same command again",
            ) from error

    def _reports(self, references: list[Any], assignment: _Assignment) -> Any:
        import ray.data

        # errors and progress come to the person in our own words
        for handler in logging.getLogger("ray.data").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.CRITICAL)
        num_replicas = min(self._config.ray_replicas, len(references))
        with warnings.catch_warnings():
            # the last two arguments leave Ray Data with 2.64, until when it has no other name for them
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            dataset = ray.data.from_arrow_refs(references).map_batches(
                Replica,
                fn_constructor_args=(assignment,),
                batch_size=1,
                batch_format="pyarrow",
                # no block waits at a busy replica while another is free
                compute=ray.data.ActorPoolStrategy(size=num_replicas, max_tasks_in_flight_per_actor=1),
                num_cpus=self._config.ray_cpus,
                num_gpus=self._config.ray_gpus,
                max_restarts=_RESTARTS,
                max_task_retries=_RETRIES,
            )
        dataset.context.target_max_block_size = 1  # every report at once instead of 128 MiB of them
        dataset.context.execution_no_progress_timeout_s = -1  # a large model takes its time to start
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        return dataset.iter_batches(batch_size=None, batch_format="pyarrow")


class _Tally:
    """Counts reported shards towards `progress`, each once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seen: set[str] = set()
        self._tokens = 0

    def add(self, path: str, rows: int, positions: int) -> None:
        if path not in self._seen:
            self._seen.add(path)
            self._tokens += positions
            self._progress.advance(rows, tokens=self._tokens)


def _counts(record: ShardRecord) -> tuple[int, int]:
    """Rows that are settled, set aside ones among them, and response tokens."""
    return record.num_settled, record.positions


def _settled(job: Job, planned: set[str]) -> dict[str, ShardRecord]:
    """All committed shards, once those of `planned` are among them; `UserError` when they do not turn up."""
    deadline_s = time.monotonic() + _SETTLE_S
    while missing := planned - (committed := job.ledger.committed()).keys():
        if time.monotonic() > deadline_s:
            raise UserError(
                "shards that replicas on the Ray cluster have written are not here",
                found=f"{len(planned) - len(missing)} of {len(planned)}",
                where=job.folder,
                advice="Choose an --out on a disk that all nodes share, or a URL such as s3://bucket/key",
            )
        time.sleep(1.0)
    return committed


def _connect() -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine."""
    import ray

    # Ray's notes on its own work; what ends a job is raised
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS", _LOCAL)
    try:
        if address == _LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # a dead replica's own processes would keep its GPU (Ray's default from 2.57 on)
            os.environ.setdefault("RAY_process_group_cleanup_enabled", "true")
            ray.init(_LOCAL, include_dashboard=False, **quiet)
        else:
            _knock(address)
            ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"Ray cannot be started or reached: {_last_line(error)}",
            where=f"RAY_ADDRESS={address}",
            advice="Check the address, the token (RAY_AUTH_MODE), and that Python and Ray are the cluster's versions",
        ) from error
    finally:
        # Ray sets a handler of its own, with which a terminated job would not end as an interrupted one
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def _knock(address: str) -> None:
    """Raise `OSError` when nobody listens at `address`, which Ray would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:300]


def _check_room(config: CacheConfig) -> None:
    """Raise `UserError` when this machine's own cluster cannot hold the replicas; another may grow, so it is said."""
    import ray

    if config.device == "cuda" and not config.ray_gpus:
        raise UserError("--device cuda needs replicas with a GPU", found="ray_gpus 0", advice="Add --set ray_gpus=1")
    reserved = {"CPU": config.ray_cpus, "GPU": config.ray_gpus}
    room = sum(
        min(
            (int(node["Resources"].get(name, 0) / amount + 1e-9) for name, amount in reserved.items() if amount),
            default=config.ray_replicas,
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    if room >= config.ray_replicas:
        return
    found = f"room for {room} replicas of {config.ray_cpus:g} CPUs and {config.ray_gpus:g} GPUs"
    if os.environ.get("RAY_ADDRESS", _LOCAL) == _LOCAL:
        raise UserError(
            "this machine does not hold the replicas",
            found=found,
            expected=f"for {config.ray_replicas}",
            advice="Lower --set ray_replicas, ray_cpus or ray_gpus, or set RAY_ADDRESS",
        )
    say(f"the Ray cluster has {found}; the others of {config.ray_replicas} start when it grows")
