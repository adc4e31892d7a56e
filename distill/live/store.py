"""The student's responses of a live run, kept with the run: what was drawn, and what the teacher said of it.

`samples/` of a run holds Parquet shards with the rows of a teacher cache (docs/cache-format.md, origin `student`), one
a block of steps and process, and a ledger of their checksums. `samples/drawn/` holds the token ids of blocks that were
drawn and not yet scored, one JSON file a block; a block leaves it when it is scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.distill.live.sampler import Drawn
from dpkd.teacher_cache.build.assembling import SetAside
from dpkd.teacher_cache.engines.engine import EngineResult, FailedRequest
from dpkd.teacher_cache.store.folders import LocalFolder
from dpkd.teacher_cache.store.schema import CachedRow, PlannedRow, to_table
from dpkd.teacher_cache.store.shards import Ledger, encode_shard, read_shard

SAMPLES = "samples"
_DRAWN = "drawn"


class SampleStore:
    """The blocks of one process (`rank`) of a run. A block is known by its first step; its rows by their order."""

    def __init__(self, run_dir: Path, rank: int, tokenizer: ModelSource) -> None:
        self._folder = LocalFolder(run_dir / SAMPLES)
        self._ledger = Ledger(self._folder)
        self._records = self._ledger.committed()
        self._rank, self._tokenizer = rank, tokenizer

    def is_drawn(self, first_step: int) -> bool:
        """Whether the block's responses are here, scored or not."""
        return self._shard(first_step) in self._records or self._folder.exists(self._draft(first_step))

    def keep_drawn(self, first_step: int, planned: Sequence[PlannedRow], drawn: Sequence[Drawn]) -> None:
        """Store a block as it was drawn."""
        by_index = {response.index: response for response in drawn}
        rows = [
            {
                "example_id": plan.example_id,
                "sample": plan.sample,
                "finish_reason": by_index[plan.index].finish_reason,
                "response_ids": by_index[plan.index].response_ids.tolist(),
            }
            for plan in planned
        ]
        self._folder.write(self._draft(first_step), json.dumps(rows).encode())

    def drawn(self, first_step: int, planned: Sequence[PlannedRow]) -> list[Drawn] | None:
        """The responses of a block that is drawn and not scored, else None."""
        name = self._draft(first_step)
        try:
            rows = json.loads(self._folder.read(name))
            found = [
                Drawn(plan.index, np.array(row["response_ids"], np.int32), row["finish_reason"])
                for plan, row in zip(planned, rows, strict=False)
            ]
            keys = [(row["example_id"], row["sample"]) for row in rows]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                "the stored samples cannot be read", where=self._folder.where(name), advice="Choose another --out"
            ) from None
        self._check(keys, planned, name)
        return found

    def keep_scored(
        self,
        first_step: int,
        planned: Sequence[PlannedRow],
        drawn: Sequence[Drawn],
        answers: Mapping[int, EngineResult | FailedRequest],
    ) -> None:
        """Store a block with the teacher's scores; rows that it could not score are set aside by name."""
        ends = {response.index: response.finish_reason for response in drawn}
        rows, failed = [], []
        for plan in planned:
            answer = answers[plan.index]
            if isinstance(answer, FailedRequest):
                aside = SetAside(plan.example_id, plan.sample, plan.origin, answer.reason)
                failed.append({"index": plan.index, **asdict(aside)})
                continue
            ids, reason = answer.response_ids, ends[plan.index]
            result = EngineResult(plan.index, ids, reason, answer.logprobs_T, answer.distributions)
            rows.append((plan, result, self._tokenizer.decode(ids.tolist())))
        data, record = encode_shard(to_table(rows), self._shard(first_step), "student", failed)
        self._ledger.commit(data, record)
        self._records[record.path] = record
        self._folder.delete(self._draft(first_step))

    def scored(self, first_step: int, planned: Sequence[PlannedRow]) -> list[CachedRow | None] | None:
        """The rows of a scored block in order, None for one that is set aside; None when the block is not here."""
        record = self._records.get(self._shard(first_step))
        if record is None:
            return None
        shard = read_shard(self._folder, record)
        aside = {int(failure["index"]) for failure in record.failed}
        kept = [plan for plan in planned if plan.index not in aside]
        self._check([shard.key(place) for place in range(len(shard))], kept, record.path)
        rows = {plan.index: shard.row(place) for place, plan in enumerate(kept)}
        return [rows.get(plan.index) for plan in planned]

    def _check(self, keys: Sequence[tuple[str, int]], planned: Sequence[PlannedRow], name: str) -> None:
        if list(keys) != [(plan.example_id, plan.sample) for plan in planned]:
            raise UserError(
                "the stored samples are of other rows than these steps read",
                found=f"{len(keys)} rows, first {keys[:1]}",
                expected=f"{len(planned)} rows, first {[(plan.example_id, plan.sample) for plan in planned[:1]]}",
                where=self._folder.where(name),
                advice="Go on with as many processes as the run was started with, or choose another --out",
            )

    def _shard(self, first_step: int) -> str:
        return f"shards/{self._name(first_step)}.parquet"

    def _draft(self, first_step: int) -> str:
        return f"{_DRAWN}/{self._name(first_step)}.json"

    def _name(self, first_step: int) -> str:
        return f"step-{first_step:08d}-rank-{self._rank:04d}"


def stored_rows(run_dir: Path) -> Iterator[CachedRow]:
    """Every scored response that a run has kept, block by block in the order of steps, then of processes."""
    folder = LocalFolder(run_dir / SAMPLES)
    records = Ledger(folder).committed()
    for path in sorted(records):
        shard = read_shard(folder, records[path])
        for place in range(len(shard)):
            yield shard.row(place)
