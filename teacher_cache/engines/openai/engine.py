"""The engine `openai`: a teacher behind any OpenAI-compatible endpoint that answers with texts and log-probs."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from dpkd.core.errors import StoppedError, UserError
from dpkd.core.identity import fingerprint
from dpkd.core.progress import say
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineOptions,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.engines.openai.budget import Budget
from dpkd.teacher_cache.engines.openai.client import Endpoint, EndpointClient, read_key
from dpkd.teacher_cache.engines.openai.messages import Answer, Dialect
from dpkd.teacher_cache.engines.openai.probe import Probe, same_endpoint
from dpkd.teacher_cache.engines.openai.reading import AnswerReader, UnusableAnswerError
from dpkd.teacher_cache.engines.openai.tokens import TokenTable
from dpkd.teacher_cache.engines.server.http import RequestRefusedError

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

KEY_VARIABLE = "DPKD_TEACHER_API_KEY"

_RETRY_DELAY_S = 1.0
#: answers that may be unusable at the beginning of a job: after so many, no other will be usable
_MOST_UNUSABLE = 8
_KEPT = "The answers so far are kept"

_Result = TypeVar("_Result")


class OpenAIEngine(Engine):
    """Asks an endpoint for responses; it cannot score given ones, because no common request does.

    It is measured when it opens (`dialect`). Answers stay in `EndpointOptions.answers` until their rows are committed:
    a job that stops for any reason pays for none of them twice.
    """

    name = "openai"

    def __init__(
        self, model: ModelSource, options: EngineOptions, sampling: Sampling | None = None, *, at_least: bool = True
    ) -> None:
        endpoint = options.endpoint
        assert endpoint is not None  # checked by the config
        self.vocab_size = model.vocab_size
        self._model, self._options, self._endpoint = model, options, endpoint
        self.budget = Budget(endpoint)
        self._table = TokenTable(model.tokenizer) if options.top_k else None
        key = read_key(endpoint.key_variable, KEY_VARIABLE, endpoint.url, "--teacher-url")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        try:
            self._client = self._wait(self._connected(key))
            probe = Probe(self._client, endpoint, model, partial(self._pay, -1, 0))
            plain = sampling or Sampling(1.0, 1.0, 1, ())
            self.dialect: Dialect = self._wait(probe.run(plain, options.top_k, at_least=at_least))
            if endpoint.known is not None:
                same_endpoint(endpoint.known, self.dialect.facts(), endpoint.url)
            if self._table is not None and not (self.dialect.token_ids or self._table.is_exact):
                raise UserError(
                    "the endpoint writes tokens as texts, and several tokens of the tokenizer have the same text",
                    found="texts",
                    expected="token ids, or a byte-level tokenizer",
                    where=endpoint.url,
                    advice="Give --top-k 0 to cache texts alone, or an endpoint that returns token ids, such as vLLM",
                )
        except BaseException:
            self.close()
            raise

    def limit_entries(self, top_k: int) -> None:
        """Ask for `top_k` entries per position from now on: what the endpoint returns."""
        self._options = replace(self._options, top_k=top_k)

    async def _connected(self, key: str) -> EndpointClient:
        endpoint = self._endpoint
        return EndpointClient(
            Endpoint(
                name="endpoint",
                url=endpoint.url,
                key=key,
                key_variable=endpoint.key_variable or KEY_VARIABLE,
                timeout_s=endpoint.timeout_s,
                tries=endpoint.tries,
                retry_delay_s=_RETRY_DELAY_S,
                kept=_KEPT,
                missing="Give --teacher-url with the path before /completions (often /v1) and a --teacher-model it has",
            )
        )

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def generate(
        self, requests: Iterable[GenerateRequest], sampling: Sampling
    ) -> Iterator[EngineResult | FailedRequest]:
        tokenizer = self._model.tokenizer
        reader = AnswerReader(
            dialect=self.dialect,
            options=self._options,
            sampling=sampling,
            table=self._table,
            encode=partial(tokenizer.encode, add_special_tokens=False),
            decode=partial(tokenizer.decode, clean_up_tokenization_spaces=False),
            eos_token_id=int(tokenizer.eos_token_id),
            vocab_size=self.vocab_size,
        )
        self._unusable, self._used = 0, False
        #: name of the kept answer to each request: by its content, for indices are not unique over the parts of a job
        self._files: dict[int, str] = {}
        for index, answer in self._answers(iter(requests), sampling):
            if isinstance(answer, Answer):
                try:
                    result = reader.result(index, answer)
                except UnusableAnswerError as error:
                    yield self._failed(index, str(error))
                else:
                    self._used = True
                    yield result
            else:
                yield self._failed(index, str(answer))

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        raise UserError(
            "an endpoint answers prompts, it does not score given responses",
            found="--engine openai",
            expected="--engine vllm, transformers or server",
            advice="Leave out --responses and --round",
        )

    def _answers(
        self, source: Iterator[GenerateRequest], sampling: Sampling
    ) -> Iterator[tuple[int, Answer | RequestRefusedError]]:
        """Answers as they come, kept ones first; reads from `source` only as the endpoint has capacity."""
        pending: dict[Future[Any], GenerateRequest] = {}
        waiting: GenerateRequest | None = None
        try:
            while True:
                while len(pending) < self._options.max_num_seqs:
                    waiting = waiting or next(source, None)
                    if waiting is None:
                        break
                    body = self.dialect.body(self._endpoint.model, waiting, sampling, self._options.top_k)
                    self._files[waiting.index] = f"{fingerprint(body)[:32]}.json.gz"
                    if (kept := self._kept(waiting.index)) is not None:
                        yield waiting.index, kept
                        waiting = None
                        continue
                    most = self.budget.cost(len(waiting.prompt_ids), sampling.max_new_tokens)
                    if not self.budget.allows(most):
                        break
                    self.budget.reserve(waiting.index, most)
                    future = asyncio.run_coroutine_threadsafe(
                        self._client.post(self.dialect.path, body, _checked), self._loop
                    )
                    pending[future] = waiting
                    waiting = None
                if not pending and waiting is not None:
                    raise self._budget_spent(most)
                if not pending:
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    request = pending.pop(future)
                    yield request.index, self._settled(future, request)
        finally:
            # answers that have arrived are kept, whatever ends the job
            for future, request in pending.items():
                if future.done() and future.exception() is None:
                    with contextlib.suppress(UserError):  # what ends the job is raised already
                        self._settled(future, request)
                future.cancel()

    def _settled(self, future: Future[Any], request: GenerateRequest) -> Answer | RequestRefusedError:
        try:
            body, answer = future.result()
        except RequestRefusedError as refusal:
            self.budget.settle(request.index, 0.0)
            return refusal
        self._pay(request.index, len(request.prompt_ids), answer)
        self._check_model(answer)
        if self._endpoint.answers is not None:
            self._endpoint.answers.write(
                self._files[request.index], gzip.compress(json.dumps(body).encode(), 1, mtime=0)
            )
        return answer

    def _kept(self, index: int) -> Answer | None:
        if self._endpoint.answers is None:
            return None
        try:
            return Answer.of(json.loads(gzip.decompress(self._endpoint.answers.read(self._files[index]))))
        except FileNotFoundError:
            return None

    def _pay(self, index: int, prompt_tokens: int, answer: Answer) -> None:
        """Count what `answer` cost, by the endpoint's own counts or by the tokenizer's where it sends none."""
        read = prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens
        written = answer.completion_tokens
        if written is None:
            written = len(self._model.tokenizer.encode(answer.text, add_special_tokens=False)) + 1
        self.budget.settle(index, self.budget.cost(read, written))

    def _check_model(self, answer: Answer) -> None:
        if answer.model != self.dialect.model:
            raise UserError(
                "the endpoint answers with another model than before",
                found=answer.model or "no name",
                expected=self.dialect.model or "no name",
                where=self._endpoint.url,
                advice=f"{_KEPT}: run the same command again when the model is back, or choose another --out",
            )

    def _failed(self, index: int, reason: str) -> FailedRequest:
        self._unusable += 1
        if not self._used and self._unusable >= _MOST_UNUSABLE:
            raise UserError(
                f"the first {_MOST_UNUSABLE} answers of the endpoint cannot be used",
                found=reason,
                where=self._endpoint.url,
                advice="Check --teacher, --teacher-model and --teacher-api; --top-k 0 caches texts alone",
            )
        return FailedRequest(index, reason)

    def _budget_spent(self, most: float) -> StoppedError:
        return StoppedError(
            "the budget does not cover another answer",
            found=f"{self.budget.spent:.4f} spent, the next may cost {most:.4f}",
            expected=f"--max-cost {self._endpoint.max_cost:g}",
            where=self._endpoint.url,
            advice=f"{_KEPT}: run the same command again to go on, with as much again to spend",
        )

    def forget(self, indices: Iterable[int]) -> None:
        if self._endpoint.answers is not None:
            for index in indices:
                if index in self._files:  # a row may have failed before it was asked
                    self._endpoint.answers.delete(self._files[index])

    def close(self) -> None:
        """End the requests in flight and the thread."""
        if self._loop.is_closed():
            return
        if self.budget.spent:
            say(f"the endpoint's answers cost {self.budget.spent:.4f}")
        self._wait(self._closed())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _closed(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if hasattr(self, "_client"):
            await self._client.__aexit__()


def _checked(body: Any) -> tuple[Any, Answer]:
    return body, Answer.of(body)
