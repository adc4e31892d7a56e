"""The engine `server`: vLLM's OpenAI-compatible HTTP servers, token ids in and out (checked against vLLM 0.32)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpkd.core.errors import UserError
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineOptions,
    EngineResult,
    FailedRequest,
    FinishReason,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.engines.http import RequestRefusedError
from dpkd.teacher_cache.engines.server.checks import ServerChecks
from dpkd.teacher_cache.engines.server.http import REQUEST_TIMEOUT_S, base_urls
from dpkd.teacher_cache.engines.server.messages import (
    MALFORMED,
    LogprobTable,
    first_choice,
    generation_body,
    scoring_body,
    to_ints,
)
from dpkd.teacher_cache.engines.server.pool import PATIENCE_S, ServerPool
from dpkd.teacher_cache.engines.top_k import build_result

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource


@dataclass(frozen=True)
class _Prepared:
    """A request as JSON, and the function from the body of the answer to the result."""

    index: int
    body: dict[str, Any]
    to_result: Callable[[bytes], EngineResult]

    def parse(self, content: bytes) -> EngineResult:
        try:
            return self.to_result(content)
        except MALFORMED as error:
            raise UserError(
                f"a server's answer to request {self.index} is malformed: {error!r}",
                advice="Check the version and the options of the servers",
            ) from error


class ServerEngine(Engine):
    """Running vLLM servers with the same teacher. Each is checked when it joins and when it comes back.

    Args:
        patience_s: how long to wait while no server answers, in seconds.
        timeout_s: longest wait for one answer, in seconds.
    """

    name = "server"

    def __init__(
        self,
        model: ModelSource,
        options: EngineOptions,
        *,
        patience_s: float = PATIENCE_S,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        if not options.server_urls:
            raise UserError(
                "the engine server needs the address of a server",
                advice="Give --server-url http://HOST:PORT, once or several times",
            )
        self.vocab_size = model.vocab_size
        self._options = options
        self._pool = ServerPool(
            base_urls(options.server_urls),
            options.max_num_seqs,
            ServerChecks(model, options).run,
            patience_s=patience_s,
            timeout_s=timeout_s,
        )
        try:
            self._pool.open()
        except BaseException:
            self._pool.close()
            raise

    def generate(
        self, requests: Iterable[GenerateRequest], sampling: Sampling
    ) -> Iterator[EngineResult | FailedRequest]:
        def prepare(request: GenerateRequest) -> _Prepared:
            prompt_ids = to_ints(request.prompt_ids)

            def to_result(content: bytes) -> EngineResult:
                choice = first_choice(content)
                if choice["prompt_token_ids"] != prompt_ids:
                    raise ValueError("it has other prompt ids than the request")
                reason, ids = choice["finish_reason"], choice["token_ids"]
                stopped = reason == "stop" and ids and ids[-1] in sampling.stop_token_ids
                if not stopped and (reason != "length" or len(ids) != sampling.max_new_tokens):
                    raise ValueError(f"it ends after {len(ids)} tokens with {reason!r}")
                return self._result(request.index, ids, reason, LogprobTable.of_generation(choice))

            body = generation_body(prompt_ids, request.seed, sampling, self._options.top_k)
            return _Prepared(request.index, body, to_result)

        return self._run(map(prepare, requests))

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        def prepare(request: ScoreRequest) -> _Prepared:
            prompt_ids, ids = to_ints(request.prompt_ids), to_ints(request.response_ids)

            def to_result(content: bytes) -> EngineResult:
                table = LogprobTable.of_scoring(first_choice(content), len(prompt_ids), ids)
                return self._result(request.index, ids, "stop", table)

            return _Prepared(request.index, scoring_body(prompt_ids + ids, self._options.top_k), to_result)

        return self._run(map(prepare, requests))

    def _run(self, source: Iterator[_Prepared]) -> Iterator[EngineResult | FailedRequest]:
        """Keep the servers full, reading from `source` only as they have capacity."""
        pending: dict[Future[EngineResult], int] = {}

        def fill() -> None:
            while len(pending) < self._pool.capacity and (request := next(source, None)) is not None:
                pending[self._pool.submit(request.body, request.parse)] = request.index

        try:
            fill()
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                future = next(iter(done))
                index = pending.pop(future)
                fill()  # before the caller works on the result
                try:
                    yield future.result()
                except RequestRefusedError as refusal:
                    yield FailedRequest(index, str(refusal))
        finally:
            for future in pending:
                future.cancel()  # closes the connection, and the server drops the request

    def _result(self, index: int, ids: list[int], reason: FinishReason, table: LogprobTable) -> EngineResult:
        ids_T, top_k = np.array(ids, np.int32), table.ranked(self._options.top_k)
        return build_result(index, ids_T, reason, table.own_T, *top_k, self.vocab_size, self._options)

    def close(self) -> None:
        """Disconnect; the servers keep running."""
        self._pool.close()
