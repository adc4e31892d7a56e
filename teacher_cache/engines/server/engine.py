"""The engine `server`: vLLM's OpenAI-compatible HTTP servers, ids in and ids out (checked against vLLM 0.32)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from dpkd.core.errors import UserError
from dpkd.teacher_cache.engines.engine import (
    EngineOptions,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.engines.server.checks import ServerChecks
from dpkd.teacher_cache.engines.server.http import REQUEST_TIMEOUT_S, RequestRefusedError, base_urls
from dpkd.teacher_cache.engines.server.messages import (
    MALFORMED,
    LogprobTable,
    first_choice,
    generation_body,
    scoring_body,
    to_ints,
)
from dpkd.teacher_cache.engines.server.pool import PATIENCE_S, ServerPool
from dpkd.teacher_cache.engines.top_k import from_top_k

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

_Request = TypeVar("_Request", GenerateRequest, ScoreRequest)


class ServerEngine:
    """Running vLLM servers that hold the same teacher. Each is checked when it joins, and when it comes back.

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
                "the engine server has no server", advice="Give --server-url http://HOST:PORT, one or several"
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
        """See `Engine.generate`."""

        def to_body(request: GenerateRequest) -> dict[str, Any]:
            return generation_body(to_ints(request.prompt_ids), request.seed, sampling, self._options.top_k)

        def to_result(request: GenerateRequest, content: bytes) -> EngineResult:
            choice = first_choice(content)
            if choice["prompt_token_ids"] != to_ints(request.prompt_ids):
                raise ValueError("it is about other prompt ids than those sent")
            reason, ids = choice["finish_reason"], choice["token_ids"]
            ended = reason == "stop" and ids and ids[-1] in sampling.stop_token_ids
            if not ended and (reason != "length" or len(ids) != sampling.max_new_tokens):
                raise ValueError(f"it ends after {len(ids)} tokens with {reason!r}")
            return self._result(request.index, np.array(ids, np.int32), reason, LogprobTable.of_generation(choice))

        return self._run(requests, to_body, to_result)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        """See `Engine.score`."""

        def to_body(request: ScoreRequest) -> dict[str, Any]:
            return scoring_body(to_ints(request.prompt_ids) + to_ints(request.response_ids), self._options.top_k)

        def to_result(request: ScoreRequest, content: bytes) -> EngineResult:
            ids = to_ints(request.response_ids)
            table = LogprobTable.of_scoring(first_choice(content), len(request.prompt_ids), ids)
            return self._result(request.index, np.array(ids, np.int32), "stop", table)

        return self._run(requests, to_body, to_result)

    def _run(
        self,
        requests: Iterable[_Request],
        to_body: Callable[[_Request], dict[str, Any]],
        to_result: Callable[[_Request, bytes], EngineResult],
    ) -> Iterator[EngineResult | FailedRequest]:
        """Keep the servers full while pulling from `requests` no faster than places fall free."""
        source = iter(requests)
        pending: dict[Future[EngineResult], _Request] = {}

        def fill() -> None:
            while len(pending) < self._pool.places and (request := next(source, None)) is not None:
                pending[self._pool.submit(to_body(request), partial(_parsed, to_result, request))] = request

        try:
            fill()
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                future = next(iter(done))
                request = pending.pop(future)
                fill()  # the free place is taken before the result is worked on
                try:
                    yield future.result()
                except RequestRefusedError as refusal:
                    yield FailedRequest(request.index, str(refusal))
        finally:
            for future in pending:
                future.cancel()  # closes the connection, upon which the server drops the work

    def _result(self, index: int, response_ids: np.ndarray, finish_reason: Any, table: LogprobTable) -> EngineResult:
        distributions = None
        if self._options.top_k:
            ids_TK, logprobs_TK = table.ranked(self._options.top_k)
            distributions = from_top_k(
                ids_TK, logprobs_TK, response_ids, table.own_T, self.vocab_size, self._options.top_mass
            )
        return EngineResult(index, response_ids, finish_reason, table.own_T, distributions)

    def close(self) -> None:
        """Leave the servers, which run on."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _parsed(to_result: Callable[[_Request, bytes], EngineResult], request: _Request, content: bytes) -> EngineResult:
    try:
        return to_result(request, content)
    except MALFORMED as error:
        raise UserError(
            f"the answer to request {request.index} is not what was asked for: {error!r}",
            advice="Check the versions and options of the servers",
        ) from error
