"""The engine `openai`: a teacher behind any OpenAI-compatible endpoint that answers with texts and log-probs."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

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
from dpkd.teacher_cache.engines.http import LoopThread, RequestRefusedError
from dpkd.teacher_cache.engines.openai.client import Endpoint, EndpointClient, read_key
from dpkd.teacher_cache.engines.openai.messages import Answer, Dialect
from dpkd.teacher_cache.engines.openai.options import EndpointOptions
from dpkd.teacher_cache.engines.openai.probe import Probe, same_endpoint
from dpkd.teacher_cache.engines.openai.reading import AnswerReader, UnusableAnswerError
from dpkd.teacher_cache.engines.openai.tokens import TokenTable

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

KEY_VARIABLE = "DPKD_TEACHER_API_KEY"

_RETRY_DELAY_S = 1.0
#: answers that may be unusable at the beginning of a job: after so many, no other will be usable
_MOST_UNUSABLE = 8
_KEPT = "The answers so far are kept"


class AnswerStore(Protocol):
    """Where answers, which cost money, stay until their rows are committed: a folder of the cache."""

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises `FileNotFoundError` if it does not exist."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, if it exists."""
        ...


class OpenAIEngine(Engine):
    """Asks an endpoint for responses; it cannot score given ones, because no common request does.

    It is measured when it opens (`dialect`). A job that stops for any reason pays for no answer twice.

    Args:
        endpoint: where to ask, and what may be spent on it.
        sampling: how responses will be drawn.
        at_least: whether an endpoint that returns fewer than `options.top_k` entries is refused.
        known: what an earlier run of the job measured of the endpoint. None: this is the first.
        answers: where answers stay until their rows are committed.
        tools: whether some rows have tools, so that a chat must read them.
    """

    name = "openai"

    def __init__(
        self,
        model: ModelSource,
        options: EngineOptions,
        endpoint: EndpointOptions,
        sampling: Sampling,
        *,
        at_least: bool,
        known: Mapping[str, Any] | None,
        answers: AnswerStore,
        tools: bool = False,
    ) -> None:
        self.vocab_size = model.vocab_size
        self._tokenizer, self._endpoint, self._kept_answers = model.tokenizer, endpoint, answers
        self._table = TokenTable(model.tokenizer) if options.top_k else None
        self._spent = 0.0
        self._url = str(endpoint.teacher_url)
        self._client = EndpointClient(
            Endpoint(
                name="endpoint",
                url=self._url,
                key=read_key(endpoint.api_key_env, KEY_VARIABLE, self._url, "--teacher-url"),
                key_variable=endpoint.api_key_env or KEY_VARIABLE,
                timeout_s=endpoint.timeout_s,
                tries=endpoint.tries,
                retry_delay_s=_RETRY_DELAY_S,
                kept=_KEPT,
                missing="Give --teacher-url with the path before /completions (often /v1) and a --teacher-model it has",
            )
        )
        self._loop = LoopThread("endpoint")
        try:
            probe = Probe(self._client, endpoint, model, partial(self._pay, 0))
            measured = probe.run(sampling, options.top_k, at_least=at_least, tools=tools)
            self.dialect: Dialect = self._loop.start(measured).result()
            if known is not None:
                same_endpoint(known, self.dialect.facts(), self._url)
            if self._table is not None and not (self.dialect.token_ids or self._table.is_exact):
                raise UserError(
                    "the endpoint writes tokens as texts, and several tokens of the tokenizer have the same text",
                    found="texts",
                    expected="token ids, or a byte-level tokenizer",
                    where=self._url,
                    advice="Give --top-k 0 to cache texts alone, or an endpoint that returns token ids, such as vLLM",
                )
        except BaseException:
            self.close()
            raise
        self._options = replace(options, top_k=self.dialect.top_k)

    def generate(
        self, requests: Iterable[GenerateRequest], sampling: Sampling
    ) -> Iterator[EngineResult | FailedRequest]:
        reader = AnswerReader(
            tokenizer=self._tokenizer,
            vocab_size=self.vocab_size,
            options=self._options,
            sampling=sampling,
            table=self._table,
            shows_ends=self.dialect.token_ids,
        )
        self._unusable, self._used = 0, False
        #: name of the kept answer to each request: by its content, for indices are not unique over the parts of a job
        self._files: dict[int, str] = {}
        self._asked: dict[int, list[int]] = {}
        for index, answer in self._answers(iter(requests), sampling):
            try:
                if isinstance(answer, RequestRefusedError):
                    raise UnusableAnswerError(str(answer))
                self._check_prompt(answer, self._asked.pop(index))
                result = reader.result(index, answer)
            except UnusableAnswerError as error:
                yield self._failed(index, str(error))
            else:
                self._used = True
                yield result

    def _check_prompt(self, answer: Answer, prompt_ids: list[int]) -> None:
        """Raise `UnusableAnswerError` if the teacher has read another prompt than the tokenizer's template makes."""
        if self.dialect.prompt_tokens != "as the tokenizer":
            return  # it was printed, and is in the identity
        if answer.prompt_tokens not in (None, len(prompt_ids)):
            raise UnusableAnswerError(
                f"the endpoint reads the prompt as {answer.prompt_tokens} tokens, the tokenizer's template makes "
                f"{len(prompt_ids)}"
            )
        if answer.prompt_ids not in (None, prompt_ids):
            raise UnusableAnswerError("the endpoint reads the prompt as other tokens than the tokenizer's template")

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
        pending: dict[Future[Any], tuple[GenerateRequest, float]] = {}  # with what each may cost
        waiting = next(source, None)
        try:
            while pending or waiting is not None:
                while waiting is not None and len(pending) < self._options.max_num_seqs:
                    self._asked[waiting.index] = list(map(int, waiting.prompt_ids))
                    body = self.dialect.body(str(self._endpoint.teacher_model), waiting, sampling, self._options.top_k)
                    self._files[waiting.index] = f"{fingerprint(body)[:32]}.json.gz"
                    if (kept := self._kept(waiting.index)) is not None:
                        yield waiting.index, kept
                    else:
                        most = self._cost(len(waiting.prompt_ids), sampling.max_new_tokens)
                        if not self._affords(most + sum(reserved for _, reserved in pending.values())):
                            if not pending:
                                raise self._budget_spent(most)
                            break
                        pending[self._loop.start(self._client.post(self.dialect.path, body, _checked))] = waiting, most
                    waiting = next(source, None)
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    request, _ = pending.pop(future)
                    yield request.index, self._settled(future, request)
        finally:
            # answers that have arrived are kept, whatever ends the job
            for future, (request, _) in pending.items():
                if future.done() and future.exception() is None:
                    with contextlib.suppress(UserError):  # what ends the job is raised already
                        self._settled(future, request)
                future.cancel()

    def _settled(self, future: Future[Any], request: GenerateRequest) -> Answer | RequestRefusedError:
        try:
            body, answer = future.result()
        except RequestRefusedError as refusal:
            return refusal
        self._pay(len(request.prompt_ids), answer)
        self._check_model(answer)
        packed = gzip.compress(json.dumps(body).encode(), 1, mtime=0)
        self._kept_answers.write(self._files[request.index], packed)
        return answer

    def _kept(self, index: int) -> Answer | None:
        try:
            return Answer.of(json.loads(gzip.decompress(self._kept_answers.read(self._files[index]))))
        except FileNotFoundError:
            return None

    def _cost(self, prompt_tokens: int, answered_tokens: int) -> float:
        """Cost of a request, in the currency of the prices."""
        prices = self._endpoint.price_in or 0.0, self._endpoint.price_out or 0.0
        return (prompt_tokens * prices[0] + answered_tokens * prices[1]) / 1e6

    def _affords(self, cost: float) -> bool:
        """Whether requests that cost `cost` in all may still be answered."""
        return self._endpoint.max_cost is None or self._spent + cost <= self._endpoint.max_cost

    def _pay(self, prompt_tokens: int, answer: Answer) -> None:
        """Count what `answer` cost, by the endpoint's own counts or by the tokenizer's where it sends none."""
        read = prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens
        written = answer.completion_tokens
        if written is None:
            written = len(self._tokenizer.encode(answer.text, add_special_tokens=False)) + 1
        self._spent += self._cost(read, written)

    def _check_model(self, answer: Answer) -> None:
        if answer.model != self.dialect.model:
            raise UserError(
                "the endpoint answers with another model than before",
                found=answer.model or "no name",
                expected=self.dialect.model or "no name",
                where=self._url,
                advice=f"{_KEPT}: run the same command again when the model is back, or choose another --out",
            )

    def _failed(self, index: int, reason: str) -> FailedRequest:
        self._unusable += 1
        if not self._used and self._unusable >= _MOST_UNUSABLE:
            raise UserError(
                f"the first {_MOST_UNUSABLE} answers of the endpoint cannot be used",
                found=reason,
                where=self._url,
                advice="Check --teacher, --teacher-model and --teacher-api; --top-k 0 caches texts alone",
            )
        return FailedRequest(index, reason)

    def _budget_spent(self, most: float) -> StoppedError:
        return StoppedError(
            "the budget does not cover another answer",
            found=f"{self._spent:.4f} spent, the next may cost {most:.4f}",
            expected=f"--max-cost {self._endpoint.max_cost:g}",
            where=self._url,
            advice=f"{_KEPT}: run the same command again to resume; it may spend --max-cost again",
        )

    def forget(self, indices: Iterable[int]) -> None:
        for index in indices:
            if index in self._files:  # a row may have failed before it was asked
                self._kept_answers.delete(self._files[index])

    def close(self) -> None:
        """End the requests in flight and the thread."""
        if self._loop.close(self._client.http) and self._spent:
            say(f"the endpoint's answers cost {self._spent:.4f}")


def _checked(body: Any) -> tuple[Any, Answer]:
    return body, Answer.of(body)
