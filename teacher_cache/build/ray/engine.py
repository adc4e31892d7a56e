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
import time
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.progress import Progress
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.ray.blocks import paths_of, split_blocks, to_block
from dpkd.teacher_cache.build.ray.cluster import check_room, connect, last_line
from dpkd.teacher_cache.build.ray.replica import Assignment, Replica, counts_of, find_witness
from dpkd.teacher_cache.engines.engine import EngineOptions, Sampling
from dpkd.teacher_cache.store.folders import LocalFolder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.schema import PlannedRow
from dpkd.teacher_cache.store.shards import ShardRecord

if TYPE_CHECKING:
    from dpkd.teacher_cache.options.cache import CacheConfig

_FULL_BATCHES = 16  # rows of a block, in batches of the engine, which runs empty at the end of every block
_LEAST_ROWS = 512  # of a block, unless the job is small
_MOST_BLOCKS = 1024  # in Ray's object store at one time; replicas start anew after so many
_RETRIES = 3  # of a block whose replica dies: rows that kill whoever takes them up end the job
_RESTARTS = 20  # of a replica, for the same reason
_SETTLE_S = 60.0  # a shared disk may show a node an old listing for so long


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
                connect()
                opened.callback(ray.shutdown)  # ends a cluster of ours and leaves another
            check_room(self._config)
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
        assignment = Assignment(
            self._model, self._options, location, find_witness(job.folder), job.kind, layout, sampling
        )
        most_rows = max(_LEAST_ROWS, _FULL_BATCHES * self._options.max_num_seqs)
        blocks = split_blocks(rows, layout, job.committed.keys(), most_rows, self._config.ray_replicas)
        planned: set[str] = set()

        def in_object_store(block: list[PlannedRow]) -> Any:
            planned.update(paths_of(block, layout))
            return ray.put(to_block(block))

        # the object store takes block after block (and spills to disk): the driver never holds the whole plan
        tally = _Tally(progress)
        while references := [in_object_store(block) for block in itertools.islice(blocks, _MOST_BLOCKS)]:
            self._run(references, assignment, tally)
        job.committed = _settled(job, planned)
        for path in planned:
            tally.add(path, *counts_of(job.committed[path]))

    def _run(self, references: list[Any], assignment: Assignment, tally: _Tally) -> None:
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
                f"a replica on the Ray cluster died, and so did those that took its place: {last_line(error)}",
                advice="What is committed is kept. Look at Ray's logs (/tmp/ray/session_latest/logs on the nodes), "
                "then run the same command again",
            ) from error

    def _reports(self, references: list[Any], assignment: Assignment) -> Any:
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
