"""From an engine's answers to committed shards, beside the engine and in whatever order they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

import numpy as np

from dpkd.core.progress import Progress
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.schema import Origin, PlannedRow, to_table
from dpkd.teacher_cache.store.shards import encode_shard

_SHARDS_IN_FLIGHT = 4  # encoded or waiting to be written; bounds memory when the disk is slow


def by_length(rows: Iterable[PlannedRow], window: int) -> Iterator[PlannedRow]:
    """`rows`, the longest first inside every `window` of them: neighbours in a batch are then of like length.

    The short ones come last because an engine is emptied at the end of a job, and they leave soonest. The window is a
    shard: a larger one would keep more shards open at one time, and a kill would cost their rows.
    """
    source = iter(rows)
    while part := list(itertools.islice(source, window)):
        part.sort(key=lambda row: len(row.prompt_ids) + len(row.response_ids or ()), reverse=True)
        yield from part


def fill(
    assembler: ShardAssembler,
    rows: Iterable[PlannedRow],
    engine: Engine,
    sampling: Sampling | None,
    progress: Progress | None = None,
) -> None:
    """Have `engine` answer the rows whose shards are not committed yet: draw responses, or (None) score given ones."""
    pending = by_length(assembler.pending(rows), assembler.layout.rows_per_shard)
    results: Iterator[EngineResult | FailedRequest]
    if sampling is not None:
        results = engine.generate((GenerateRequest(row.index, row.prompt_ids, row.seed) for row in pending), sampling)
    else:
        results = engine.score(
            ScoreRequest(row.index, row.prompt_ids, row.response_ids) for row in pending if row.response_ids is not None
        )
    tokens = 0
    for result in results:
        assembler.add(result)
        tokens += len(result.response_ids) if isinstance(result, EngineResult) else 0
        if progress is not None:
            progress.advance(1, tokens=tokens)


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that is not in its shard, because the engine could not answer it."""

    example_id: str
    sample: int
    origin: Origin
    reason: str


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Row i of an origin belongs to shard i // `rows_per_shard`, named `stem`-NUMBER."""

    origin: Origin
    rows_per_shard: int
    stem: str

    def path(self, shard: int) -> str:
        """Path of a shard inside the folder."""
        return f"shards/{self.stem}-{shard:06d}.parquet"


class ShardAssembler:
    """Gathers results that arrive in any order into shards of fixed membership.

    A cache has the same rows in the same places however often it was interrupted. Encoding and disk run on a thread of
    their own.
    """

    def __init__(self, job: Job, layout: ShardLayout, to_text: Callable[[list[int]], str]) -> None:
        self._job, self.layout, self._to_text = job, layout, to_text
        self._planned: dict[int, list[PlannedRow]] = {}
        self._results: dict[int, dict[int, EngineResult | FailedRequest]] = {}
        self._closed: set[int] = set()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer")
        self._writing: list[Future[None]] = []

    def pending(self, rows: Iterable[PlannedRow]) -> Iterator[PlannedRow]:
        """The rows of shards that are not committed yet, taken note of as they pass."""
        current: int | None = None
        for row in rows:
            shard = row.index // self.layout.rows_per_shard
            if shard != current and current is not None:
                self._close(current)
            current = shard
            if self.layout.path(shard) not in self._job.committed:
                self._planned.setdefault(shard, []).append(row)
                if row.failed is None:
                    yield row
                else:
                    self.add(FailedRequest(row.index, row.failed))
        if current is not None:
            self._close(current)

    def add(self, result: EngineResult | FailedRequest) -> None:
        """Take a result; its shard is committed once all its rows are in."""
        if isinstance(result, EngineResult) and not np.isfinite(result.logprobs_T).all():
            result = FailedRequest(result.index, "the model's log-probabilities are not finite numbers")
        shard = result.index // self.layout.rows_per_shard
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

    def _write(self, shard: int, planned: list[PlannedRow], results: dict[int, EngineResult | FailedRequest]) -> None:
        rows, failed = [], []
        for row in planned:
            result = results[row.index]
            if isinstance(result, FailedRequest):
                failed.append(asdict(SetAside(row.example_id, row.sample, row.origin, result.reason)))
            else:
                rows.append((row, result, self._to_text(result.response_ids.tolist())))
        data, record = encode_shard(to_table(rows), self.layout.path(shard), self.layout.origin, failed)
        self._job.commit(data, record)

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
            raise RuntimeError(f"{len(self._planned)} shards of {self.layout.origin} rows are incomplete")
