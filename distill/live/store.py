"""The student's responses of a live run, kept in the run's directory, drawn and scored.

`samples/` holds Parquet shards with the rows of a teacher cache (docs/cache-format.md, origin `student`), one for each
block of steps and rank, and a ledger of their checksums. `samples/drawn/` holds the token ids of blocks that are drawn
but not yet scored, one JSON lines file a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.json_lines import AppendOnlyLines
from dpkd.core.models import ModelSource
from dpkd.teacher_cache.engines.engine import EngineResult, FailedRequest, FinishReason
from dpkd.teacher_cache.store.folder import LocalFolder
from dpkd.teacher_cache.store.ledger import Ledger
from dpkd.teacher_cache.store.rows import CachedRow, PlannedRow
from dpkd.teacher_cache.store.shards import encode_shard, read_shard
from dpkd.teacher_cache.store.tables import to_table

SAMPLES = "samples"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A response of the student: ids with their EOS, and log q of each at temperature 1 (nats), q the student that drew
    it. `index` is that of its request.
    """

    index: int
    response_ids: np.ndarray
    finish_reason: FinishReason
    logprobs: list[float]


class SampleStore:
    """The blocks of one rank of a run. A block is identified by its first step, its rows by their order."""

    def __init__(self, run_dir: Path, rank: int, student: ModelSource) -> None:
        self._folder = LocalFolder(run_dir / SAMPLES)
        self._ledger = Ledger(self._folder)
        self._records = self._ledger.committed()
        self._rank, self._student = rank, student

    def is_drawn(self, first_step: int, planned: Sequence[PlannedRow]) -> bool:
        """Whether the block's responses are stored, scored or not."""
        return self._shard(first_step) in self._records or self.drawn(first_step, planned) is not None

    def keep_drawn(self, first_step: int, planned: Sequence[PlannedRow], drawn: Sequence[Drawn]) -> None:
        """Store a block as it was drawn."""
        lines = [asdict(response) | {"response_ids": response.response_ids.tolist()} for response in drawn]
        self._draft(first_step, planned).append(*lines, durable=True)

    def drawn(self, first_step: int, planned: Sequence[PlannedRow]) -> list[Drawn] | None:
        """The responses of a block that is drawn but not scored; None if some are missing or of other rows."""

        def parse(line: dict[str, Any]) -> Drawn:
            return Drawn(
                int(line["index"]), np.array(line["response_ids"], np.int32), line["finish_reason"], line["logprobs"]
            )

        responses = self._draft(first_step, planned).read(parse)
        return responses if responses and len(responses) == len(planned) else None

    def keep_scored(
        self,
        first_step: int,
        planned: Sequence[PlannedRow],
        drawn: Sequence[Drawn],
        answers: Mapping[int, EngineResult | FailedRequest],
    ) -> None:
        """Store a block with the teacher's scores; responses that it could not score are recorded as failed."""
        responses = {response.index: response for response in drawn}
        rows, failed = [], []
        for plan in planned:
            answer = answers[plan.index]
            if isinstance(answer, FailedRequest):
                failed.append({"index": plan.index} | plan.as_failed(answer.reason))
                continue
            ids, response = answer.response_ids, responses[plan.index]
            result = EngineResult(plan.index, ids, response.finish_reason, answer.logprobs_T, answer.distributions)
            sampled = replace(plan, sampling_logprobs=response.logprobs)
            rows.append((sampled, result, self._student.decode(ids.tolist())))
        data, record = encode_shard(to_table(rows), self._shard(first_step), "student", failed)
        self._ledger.commit(data, record)
        self._records[record.path] = record
        self._draft(first_step, planned).delete()

    def scored(self, first_step: int, planned: Sequence[PlannedRow]) -> list[CachedRow | None] | None:
        """The rows of a scored block in order, with None for failed ones; None when the block is not stored.

        Raises `UserError` when the stored rows are not the planned ones.
        """
        record = self._records.get(self._shard(first_step))
        if record is None:
            return None
        shard = read_shard(self._folder, record)
        failed = {int(failure["index"]) for failure in record.failed}
        expected = [plan for plan in planned if plan.index not in failed]
        actual_keys, expected_keys = [shard.key(index) for index in range(len(shard))], _keys(expected)
        if actual_keys != expected_keys:
            raise UserError(
                "the stored samples belong to other rows than these steps read",
                found=f"{len(actual_keys)} rows, first {actual_keys[:1]}",
                expected=f"{len(expected_keys)} rows, first {expected_keys[:1]}",
                where=self._folder.where(record.path),
                advice="Resume with as many processes as the run was started with, or choose another --out",
            )
        rows = {plan.index: shard.row(index) for index, plan in enumerate(expected)}
        return [rows.get(plan.index) for plan in planned]

    def _shard(self, first_step: int) -> str:
        return f"shards/{self._name(first_step)}.parquet"

    def _draft(self, first_step: int, planned: Sequence[PlannedRow]) -> AppendOnlyLines:
        path = self._folder.path / "drawn" / f"{self._name(first_step)}.jsonl"
        return AppendOnlyLines(path, {"rows": [list(key) for key in _keys(planned)]})

    def _name(self, first_step: int) -> str:
        return f"step-{first_step:08d}-rank-{self._rank:04d}"


def _keys(planned: Sequence[PlannedRow]) -> list[tuple[str, int]]:
    return [(plan.example_id, plan.sample) for plan in planned]
