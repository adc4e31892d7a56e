"""The engine `ray`: vLLM replicas on a Ray cluster. Ray Data gives them blocks of prompts, and they write the shards.

The cluster is the one at `RAY_ADDRESS`, or one on this machine that ends with the job. Every node needs dpkd with vLLM,
the model under the same path (or from the hub), and the cache's folder: on a shared disk, or a URL. A replica reserves
`ray_cpus` and `ray_gpus`; with `--engine-arg tensor_parallel_size=N`, `ray_gpus` must be N. The output of a replica is
in Ray's logs on its node, and variables such as `VLLM_CPU_KVCACHE_SPACE` are those of the node.
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
from dpkd.teacher_cache.build.ray.cluster import check_resources, connect, last_line
from dpkd.teacher_cache.build.ray.replica import Assignment, Replica, counts_of, find_witness
from dpkd.teacher_cache.engines.engine import EngineOptions, Sampling
from dpkd.teacher_cache.store.folder import Folder, LocalFolder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.rows import PlannedRow
from dpkd.teacher_cache.store.shards import ShardRecord

if TYPE_CHECKING:
    from dpkd.teacher_cache.options.cache import CacheConfig

_FULL_BATCHES = 16  # size of a block in engine batches: the engine runs empty at the end of every block
_MIN_ROWS = 512  # of a block, unless the job is small
_MAX_BLOCKS = 1024  # in Ray's object store at one time; replicas are restarted after this many
_RETRIES = 3  # of a block whose replica dies: rows that kill every replica end the job
_RESTARTS = 20  # of a replica, for the same reason
_SETTLE_S = 60.0  # a shared disk may show an old listing for this long


class RayFiller:
    """A filler whose engines are the replicas of a Ray cluster. Ray restarts a replica that dies."""

    def __init__(self, model: ModelSource, options: EngineOptions, config: CacheConfig) -> None:
        # a copy without the tokenizer that `model` may have loaded
        self._model = ModelSource(model.name, model.path.absolute(), model.revision)
        self._options, self._config = options, config
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        import ray

        with contextlib.ExitStack() as opened:
            if not ray.is_initialized():
                connect()
                opened.callback(ray.shutdown)  # stops a cluster that we started; only disconnects from another
            check_resources(self._config)
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

        assignment = Assignment(
            model=self._model,
            options=self._options,
            location=_everywhere(job.folder),
            lock=None if job.lock is None else (_everywhere(job.lock.folder), job.lock.token),
            witness=find_witness(job.folder),
            kind=job.kind,
            layout=layout,
            sampling=sampling,
        )
        most_rows = max(_MIN_ROWS, _FULL_BATCHES * self._options.max_num_seqs)
        blocks = split_blocks(rows, layout, job.committed.keys(), most_rows, self._config.ray_replicas)
        planned: set[str] = set()

        def in_object_store(block: list[PlannedRow]) -> Any:
            planned.update(paths_of(block, layout))
            return ray.put(to_block(block))

        # blocks go to the object store, which spills to disk: the driver never has all rows in memory
        tally = _Tally(progress)
        while references := [in_object_store(block) for block in itertools.islice(blocks, _MAX_BLOCKS)]:
            self._run(references, assignment, tally)
        job.committed = _settled(job, planned)
        for path in planned:
            tally.add(path, *counts_of(job.committed[path]))

    def _run(self, references: list[Any], assignment: Assignment, tally: _Tally) -> None:
        from ray.exceptions import RayActorError

        try:
            # closing stops the replicas
            with contextlib.closing(iter(self._reports(references, assignment))) as batches:
                for report in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
                    if report["refusal"] is not None:
                        raise UserError(report["refusal"])
                    tally.add(report["path"], report["rows"], report["positions"])
        except RayActorError as error:
            raise UserError(
                f"a replica on the Ray cluster died, and so did its replacements: {last_line(error)}",
                advice="Committed shards are kept. Look at Ray's logs (/tmp/ray/session_latest/logs on the nodes), "
                "then run the same command again",
            ) from error

    def _reports(self, references: list[Any], assignment: Assignment) -> Any:
        import ray.data

        # the user gets our own errors and progress
        for handler in logging.getLogger("ray.data").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.CRITICAL)
        num_replicas = min(self._config.ray_replicas, len(references))
        with warnings.catch_warnings():
            # Ray Data 2.64 will remove the last two arguments; earlier versions have no other name for them
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            dataset = ray.data.from_arrow_refs(references).map_batches(
                Replica,
                fn_constructor_args=(assignment,),
                batch_size=1,
                batch_format="pyarrow",
                # no block waits for a busy replica while another is free
                compute=ray.data.ActorPoolStrategy(size=num_replicas, max_tasks_in_flight_per_actor=1),
                num_cpus=self._config.ray_cpus,
                num_gpus=self._config.ray_gpus,
                max_restarts=_RESTARTS,
                max_task_retries=_RETRIES,
            )
        dataset.context.target_max_block_size = 1  # yield every report at once, not in batches of 128 MiB
        dataset.context.execution_no_progress_timeout_s = -1  # a large model takes long to start
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        return dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _everywhere(folder: Folder) -> str:
    """The path or URL by which every node finds the folder."""
    return str(folder.path.absolute() if isinstance(folder, LocalFolder) else folder)


class _Tally:
    """Adds each reported shard to `progress` once."""

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
    """All committed shards, once they include those of `planned`; raises `UserError` if they do not appear in time."""
    deadline_s = time.monotonic() + _SETTLE_S
    while missing := planned - (committed := job.ledger.committed()).keys():
        if time.monotonic() > deadline_s:
            raise UserError(
                "shards that the Ray cluster has written cannot be seen from this machine",
                found=f"{len(planned) - len(missing)} of {len(planned)}",
                where=job.folder,
                advice="Choose an --out on a disk that all nodes share, or a URL such as s3://bucket/key",
            )
        time.sleep(1.0)
    return job.committed | committed
