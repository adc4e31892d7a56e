"""The teacher of a live run: vLLM servers that score token ids, compared with the cache before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.teacher_cache.engines.engine import EngineOptions, ScoreRequest, results_only
from dpkd.teacher_cache.engines.server.engine import ServerEngine
from dpkd.teacher_cache.engines.server.pool import PATIENCE_S
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

#: the comparison takes the shortest responses: at least so many, with at least so many tokens in total
_CHECK_ROWS, _CHECK_TOKENS = 4, 64
_LOWEST_NATS = -100.0  # in place of -inf, so that differences are finite


@dataclass(frozen=True)
class ServedTeacher(ModelSource):
    """The cache's teacher without its files: what the cache knows of it, with the student's equal tokenizer.

    `width` is the width of its logits.
    """

    width: int = 0
    student: ModelSource | None = None

    @property
    def vocab_size(self) -> int:
        return self.width

    @property
    def max_positions(self) -> int | None:
        """Unknown: the servers report how long a sequence may be."""
        return None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, which equals the teacher's."""
        assert self.student is not None
        return self.student.tokenizer


class TeacherServers(ServerEngine):
    """Servers that run the teacher of `cache`; scores have as many entries of its distribution as the cache keeps.

    Args:
        student: the model whose tokenizer equals the teacher's (`TeacherCache.check_tokenizer`).
        max_length: longest sequence, prompt and response, in tokens.
        tolerance: largest mean difference from the cache's log-probs, in nats a token.
        patience_s: how long to wait while no server answers, in seconds.

    Raises `UserError` when the servers run another model, or when none answers for `patience_s`.
    """

    def __init__(
        self,
        cache: TeacherCache,
        urls: Sequence[str],
        student: ModelSource,
        max_length: int,
        tolerance: float,
        patience_s: float = PATIENCE_S,
    ) -> None:
        rows = _rows_to_check(cache)
        identity = cache.identities["teacher"]
        longest = max((len(row.asked_ids) + len(row.response_ids) for row in rows), default=0)
        options = EngineOptions(
            max_length=max(max_length, longest),
            top_k=cache.top_k,
            dtype=identity["dtype"],
            top_mass=cache.identities["logprobs"].get("top_mass"),
            server_urls=tuple(urls),
        )
        teacher = ServedTeacher(identity["name"], Path(identity["name"]), None, cache.vocab_size, student)
        super().__init__(teacher, options, patience_s=patience_s)
        try:
            self._check_identity(cache, rows, tolerance)
        except BaseException:
            self.close()
            raise

    def _check_identity(self, cache: TeacherCache, rows: Sequence[CachedRow], tolerance: float) -> None:
        requests = [
            ScoreRequest(index, row.asked_ids.tolist(), row.response_ids.tolist()) for index, row in enumerate(rows)
        ]
        difference_T = np.concatenate(
            [
                np.maximum(result.logprobs_T, _LOWEST_NATS)
                - np.maximum(rows[result.index].response_logprobs, _LOWEST_NATS)
                for result in results_only(self.score(requests))
            ]
        )
        mean = float(np.abs(difference_T).mean())
        if not mean <= tolerance:
            servers = ", ".join(f"{server.url} with {server.model_id}" for server in self._pool.servers if server.up)
            raise UserError(
                f"the server does not run the cache's teacher, {cache.identities['teacher']['name']}",
                found=f"a mean difference of {mean:.3f} nats from {len(difference_T)} cached log-probs",
                expected=f"at most {tolerance:g} (teacher_tolerance)",
                where=f"{servers}; cache {cache.folder}",
                advice=f"Start it with `dpkd serve-teacher --cache {cache.folder}`",
            )


def _rows_to_check(cache: TeacherCache) -> list[CachedRow]:
    """The shortest rows of the first shard that has some; of the teacher's own responses, if the cache has some."""
    origins = cache.origins
    records = cache.shards("teacher" if "teacher" in origins else origins[0])
    shard = cache.read(next(record for record in records if record.rows))
    rows = sorted((shard.row(index) for index in range(len(shard))), key=lambda row: len(row.response_ids))
    num_tokens = itertools.accumulate(len(row.response_ids) for row in rows)
    enough = next((count for count, total in enumerate(num_tokens, start=1) if total >= _CHECK_TOKENS), len(rows))
    return rows[: max(enough, _CHECK_ROWS)]
