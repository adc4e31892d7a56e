"""From an engine's answers, in any order, to committed shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np

from dpkd.core.progress import Progress
from dpkd.core.prompts.thinking import count_thinking
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.engines.top_k import answer_problem
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.rows import PlannedRow
from dpkd.teacher_cache.store.shards import encode_shard
from dpkd.teacher_cache.store.tables import select_positions, to_table

_SHARDS_IN_FLIGHT = 4  # being encoded or written; limits memory when the disk is slow


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Row i of an origin belongs to shard i // `rows_per_shard`, whose file is named `stem`-NUMBER."""

    origin: str
    rows_per_shard: int
    stem: str

    @property
    def prefix(self) -> str:
        """How the paths of its shards begin."""
        return f"shards/{self.stem}-"

    def path(self, shard: int) -> str:
        """Path of a shard inside the folder."""
        return f"{self.prefix}{shard:06d}.parquet"


class ShardAssembler:
    """Collects results, which arrive in any order, into shards with fixed rows, and commits each complete shard.

    The rows of a shard do not depend on how often the job was interrupted. A thread encodes and writes.
    """

    def __init__(
        self,
        job: Job,
        layout: ShardLayout,
        to_text: Callable[[list[int]], str],
        on_commit: Callable[[list[int]], None] | None = None,
    ) -> None:
        self._job, self.layout, self._to_text, self._on_commit = job, layout, to_text, on_commit
        self._planned: dict[int, list[PlannedRow]] = {}
        self._results: dict[int, dict[int, EngineResult | FailedRequest]] = {}
        self._closed: set[int] = set()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer")
        self._writing: list[Future[None]] = []

    def pending(self, rows: Iterable[PlannedRow]) -> Iterator[PlannedRow]:
        """The rows of shards that are not committed yet; remembers them."""
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
        """Add a result; its shard is committed once all its rows have one."""
        if isinstance(result, EngineResult) and (problem := answer_problem(result)):
            result = FailedRequest(result.index, problem)
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
            if row.drops_thinking and isinstance(result, EngineResult):
                row, result = _without_thinking(row, result, self._to_text)
            if isinstance(result, FailedRequest):
                failed.append(row.as_failed(result.reason))
            else:
                learnt = result.response_ids[row.in_spans(len(result.response_ids))]
                rows.append((row, result, self._to_text(learnt.tolist())))
        data, record = encode_shard(to_table(rows), self.layout.path(shard), self.layout.origin, failed)
        self._job.commit(data, record)
        if self._on_commit is not None:
            self._on_commit([row.index for row in planned])

    def _settle(self, most: int) -> None:
        while len(self._writing) > most:
            self._writing.pop(0).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # after an interrupt too: complete shards are committed
        try:
            self._settle(0)
        finally:
            self._writer.shutdown(wait=True)
        if kind is None and (self._planned or self._results):
            raise RuntimeError(f"{len(self._planned)} shards of {self.layout.origin} rows are incomplete")


def _without_thinking(
    row: PlannedRow, result: EngineResult, to_text: Callable[[list[int]], str]
) -> tuple[PlannedRow, EngineResult | FailedRequest]:
    """The row without the thinking of its response, under which the teacher answered: it is the teacher's alone."""
    ids = result.response_ids.tolist()
    number = count_thinking(ids, to_text)
    if number is None or number >= len(ids):
        return row, FailedRequest(row.index, "the response ends inside its thinking: raise --max-new-tokens")
    asked = [*row.asked_ids, *ids[:number]]
    answer = np.arange(len(ids)) >= number
    return replace(row, teacher_prompt_ids=asked), select_positions(result, answer)


def fill(
    engine: Engine,
    to_text: Callable[[list[int]], str],
    job: Job,
    layout: ShardLayout,
    rows: Iterable[PlannedRow],
    sampling: Sampling | None,
    progress: Progress | None = None,
) -> None:
    """Commit every shard of `rows` that is missing, with one engine.

    Args:
        to_text: decodes response ids.
        sampling: how to draw responses; None: score the given ones.
    """
    with ShardAssembler(job, layout, to_text, engine.forget) as assembler:
        pending = by_length(assembler.pending(rows), layout.rows_per_shard)
        results: Iterator[EngineResult | FailedRequest]
        if sampling is not None:
            requests = map(_question, pending)
            results = engine.generate(requests, sampling)
        else:
            results = engine.score(
                ScoreRequest(row.index, row.asked_ids, row.response_ids)
                for row in pending
                if row.response_ids is not None
            )
        tokens = 0
        for result in results:
            assembler.add(result)
            tokens += len(result.response_ids) if isinstance(result, EngineResult) else 0
            if progress is not None:
                progress.advance(1, tokens=tokens)


def _question(row: PlannedRow) -> GenerateRequest:
    asked = row.question
    if asked is None:
        return GenerateRequest(row.index, row.asked_ids, row.seed)
    turns = [turn.for_template() for turn in asked.turns]
    return GenerateRequest(row.index, row.asked_ids, row.seed, asked.text, turns or None, asked.tools)


def by_length(rows: Iterable[PlannedRow], window: int) -> Iterator[PlannedRow]:
    """`rows` with the longest first inside every `window` of them, so that the rows of a batch are of similar length.

    The short ones come last because they finish soonest when the engine runs empty at the end. The window is a shard: a
    larger one would keep more shards open at one time, and a crash would lose their rows.
    """
    source = iter(rows)
    while part := list(itertools.islice(source, window)):
        part.sort(key=lambda row: len(row.asked_ids) + len(row.response_ids or ()), reverse=True)
        yield from part
