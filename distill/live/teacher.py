"""The teacher of a live run: vLLM servers that score token ids, held against the cache before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.teacher_cache.engines.engine import EngineOptions, EngineResult, FailedRequest, ScoreRequest, results_only
from dpkd.teacher_cache.engines.server.engine import ServerEngine
from dpkd.teacher_cache.engines.server.pool import PATIENCE_S
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.schema import CachedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: what is scored to know the teacher: the shortest responses, at least so many and with so many tokens together
_CHECK_ROWS, _CHECK_TOKENS = 4, 64
_LOWEST_NATS = -100.0  # stands for -inf, so that differences are finite


@dataclass(frozen=True)
class ServedTeacher(ModelSource):
    """The cache's teacher without its files: what the cache knows of it, and the student's tokenizer, equal to its own.

    `width` is that of its logits.
    """

    width: int = 0
    student: ModelSource | None = None

    @classmethod
    def of(cls, cache: TeacherCache, student: ModelSource) -> ServedTeacher:
        """The teacher of `cache`; the student's tokenizer must have been found equal (`check_tokenizer`)."""
        name = str(cache.identities["teacher"]["name"])
        return cls(name, Path(name), None, cache.vocab_size, student)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.width

    @property
    def max_positions(self) -> int | None:
        """Not known: the server says how long its sequences may be."""
        return None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's, which is the teacher's."""
        assert self.student is not None
        return self.student.tokenizer


class _Servers(ServerEngine):
    """The engine, which can also say whom it asks."""

    def describe(self) -> str:
        """Address and model of every server that answers."""
        return ", ".join(f"{server.url} with {server.model_id}" for server in self._pool.servers if server.up)


class TeacherService:
    """Scores responses with the teacher of `cache`, with the entries of its distribution that the cache keeps.

    Args:
        student: the model whose tokenizer is the teacher's.
        max_length: longest sequence, prompt and response, in tokens.
        tolerance: largest mean difference to the cache's log-probs, in nats a token.
        patience_s: how long to wait while no server answers, in seconds.
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
        self._cache = cache
        rows = _rows_to_check(cache)
        longest = max((len(row.prompt_ids) + len(row.response_ids) for row in rows), default=0)
        options = EngineOptions(
            max_length=max(max_length, longest),
            top_k=cache.top_k,
            dtype=cache.identities["teacher"]["dtype"],
            top_mass=cache.identities["logprobs"].get("top_mass"),
            server_urls=tuple(urls),
        )
        self._engine = _Servers(ServedTeacher.of(cache, student), options, patience_s=patience_s)
        try:
            self._check_identity(rows, tolerance)
        except BaseException:
            self._engine.close()
            raise

    def _check_identity(self, rows: Sequence[CachedRow], tolerance: float) -> None:
        requests = [
            ScoreRequest(place, row.prompt_ids.tolist(), row.response_ids.tolist()) for place, row in enumerate(rows)
        ]
        scored = {result.index: result.logprobs_T for result in results_only(self._engine.score(requests))}
        apart_T = np.concatenate(
            [
                np.abs(np.maximum(scored[place], _LOWEST_NATS) - np.maximum(row.response_logprobs, _LOWEST_NATS))
                for place, row in enumerate(rows)
            ]
        )
        mean = float(apart_T.mean())
        if not mean <= tolerance:
            raise UserError(
                f"the server does not hold the cache's teacher, {self._cache.identities['teacher']['name']}",
                found=f"a mean difference of {mean:.3f} nats to {len(apart_T)} cached log-probs",
                expected=f"at most {tolerance:g} (teacher_tolerance)",
                where=f"{self._engine.describe()}; cache {self._cache.folder}",
                advice=f"Start it with `dpkd serve-teacher --cache {self._cache.folder}`",
            )

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        """See `Engine.score`; a response that the teacher holds impossible is a failed request.

        Raises `UserError` when no server answers for long.
        """
        for answer in self._engine.score(requests):
            if isinstance(answer, EngineResult) and not np.isfinite(answer.logprobs_T).all():
                yield FailedRequest(answer.index, "the teacher's log-probabilities are not finite numbers")
            else:
                yield answer

    def close(self) -> None:
        """Leave the servers, which run on; what is in flight is given up."""
        self._engine.close()

    def __enter__(self) -> TeacherService:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _rows_to_check(cache: TeacherCache) -> list[CachedRow]:
    """The shortest rows of the first shard, the teacher's own where there are some: every row has its log-probs."""
    origins = cache.origins
    shard = cache.read(cache.shards("teacher" if "teacher" in origins else origins[0])[0])
    rows = sorted((shard.row(place) for place in range(len(shard))), key=lambda row: len(row.response_ids))
    chosen: list[CachedRow] = []
    for row in rows:
        if len(chosen) >= _CHECK_ROWS and sum(len(held.response_ids) for held in chosen) >= _CHECK_TOKENS:
            break
        chosen.append(row)
    return chosen
