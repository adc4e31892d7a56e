"""A teacher for live samples that runs in this process, by transformers, instead of behind a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from dpkd.core.models import ModelSource, locate_model
from dpkd.teacher_cache.engines.engine import EngineOptions, EngineResult, FailedRequest, ScoreRequest
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.store.reader import TeacherCache


class LocalTeacher:
    """The engine of transformers in place of the servers: same requests, same results."""

    directory: Path

    def __init__(
        self, cache: TeacherCache, urls: Sequence[str], student: ModelSource, max_length: int, *others: object
    ) -> None:
        teacher = locate_model(str(self.directory), "teacher")
        options = EngineOptions(max_length=max_length, top_k=cache.top_k, dtype="float32", device="cpu")
        self._stack = ExitStack()
        self._engine = self._stack.enter_context(open_engine("transformers", teacher, options))

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        return self._engine.score(requests)

    def close(self) -> None:
        self._stack.close()
