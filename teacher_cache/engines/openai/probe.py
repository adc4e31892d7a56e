"""What an endpoint accepts and returns, measured with a few short requests before the job."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.teacher_cache.engines.engine import GenerateRequest, Sampling
from dpkd.teacher_cache.engines.http import RequestRefusedError
from dpkd.teacher_cache.engines.openai.client import EndpointClient
from dpkd.teacher_cache.engines.openai.messages import Answer, Dialect, num_entries
from dpkd.teacher_cache.engines.openai.options import EndpointOptions
from dpkd.teacher_cache.engines.server.checks import AGREEMENT_NATS

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

_QUESTIONS = ("Write one sentence about the sea.", "Count from one to ten.", "Name three colours.")
_NUM_TOKENS = 8
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class Probe:
    """Measures one endpoint. `on_answer` sees every answer, for it costs money too."""

    def __init__(
        self, client: EndpointClient, endpoint: EndpointOptions, model: ModelSource, on_answer: Callable[[Answer], None]
    ) -> None:
        self._client, self._model, self._on_answer = client, model, on_answer
        self._url, self._api, self._asked = endpoint.teacher_url, endpoint.teacher_api, str(endpoint.teacher_model)
        self._requests = [self._request(index, question) for index, question in enumerate(_QUESTIONS)]

    async def run(self, sampling: Sampling, top_k: int, *, at_least: bool, tools: bool = False) -> Dialect:
        """The endpoint's dialect, with at most `top_k` entries per position.

        Raises `UserError` if it cannot be used, returns fewer than `top_k` (`at_least`), or none where some are asked
        for, returns log-probs after the temperature or top-p of `sampling`, or reads no tools where rows have some.
        """
        dialect, answer = await self._accepted()
        self._check_model(answer.model)
        dialect = replace(dialect, model=answer.model, prompt_tokens=self._prompt_tokens(dialect, answer))
        if tools and self._api == "chat":
            dialect = await self._with_tools(dialect, answer.prompt_tokens)
        if top_k == 0:
            return dialect
        dialect = await self._with_entries(dialect, top_k)
        if dialect.top_k == 0:
            raise UserError(
                "the endpoint returns no log-probs",
                found=f"none of model {self._asked}",
                expected=f"the {top_k} most likely tokens of each position, or fewer",
                where=self._url,
                advice="Give --top-k 0 to cache its texts for `dpkd train --objective seqkd`, or another endpoint",
            )
        if at_least and dialect.top_k < top_k:
            raise UserError(
                "the endpoint returns fewer log-probs per position than --top-k",
                found=dialect.top_k,
                expected=top_k,
                where=self._url,
                advice=f"Give --top-k {dialect.top_k}, or leave it out to take what the endpoint returns",
            )
        if (sampling.temperature, sampling.top_p) != (1, 1):
            await self._check_raw(dialect, sampling)
        return dialect

    def _request(self, index: int, question: str, tools: Sequence[Mapping[str, Any]] = ()) -> GenerateRequest:
        tokenizer = self._model.tokenizer
        if self._api == "chat":
            turns = [{"role": "user", "content": question}]
            given: Any = {"tools": list(tools)} if tools else {}
            text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **given))
            ids = tokenizer.encode(text, add_special_tokens=False)
            return GenerateRequest(index, ids, index, text, turns, tools)
        return GenerateRequest(index, tokenizer.encode(question), index, question)

    def _sampling(self, temperature: float = 1.0, top_p: float = 1.0, num: int = _NUM_TOKENS) -> Sampling:
        return Sampling(temperature, top_p, num, ())

    async def _ask(self, dialect: Dialect, request: GenerateRequest, sampling: Sampling, top_k: int) -> Answer:
        body = dialect.body(self._asked, request, sampling, top_k)
        answer = await self._client.post(dialect.path, body, Answer.of)
        self._on_answer(answer)
        return answer

    async def _accepted(self) -> tuple[Dialect, Answer]:
        """The first of the possible dialects that the endpoint accepts, and its answer without log-probs."""
        api = self._api
        prompts: tuple[Literal["ids", "text", "messages"], ...] = ("messages",) if api == "chat" else ("ids", "text")
        refusal: RequestRefusedError | None = None
        fields = ("max_tokens", "max_completion_tokens") if api == "chat" else ("max_tokens",)
        for prompt, extended, field in itertools.product(prompts, (True, False), fields):
            dialect = Dialect(api, prompt, extended, False, field, 0, None, "unknown")
            try:
                answer = await self._ask(dialect, self._requests[0], self._sampling(), 0)
            except RequestRefusedError as error:
                refusal = error
                continue
            counted = answer.prompt_tokens in (None, len(self._requests[0].prompt_ids))
            if prompt == "ids" and not counted:
                continue  # it reads the list of ids as something else
            return dialect, answer
        raise UserError(
            "the endpoint refuses every form of a request",
            found=refusal or "prompts of ids are counted wrongly and texts refused",
            where=self._url,
            advice="Check --teacher-model and --teacher-api",
        )

    def _check_model(self, served: str | None) -> None:
        asked = self._asked
        if served is not None and served != asked and not served.startswith(f"{asked}-"):
            raise UserError(
                "the endpoint answers with another model",
                found=served,
                expected=f"{asked}, or {asked}- with a version",
                where=self._url,
                advice="Give --teacher-model the endpoint's name of the model that you want to learn from",
            )

    def _prompt_tokens(self, dialect: Dialect, answer: Answer) -> Literal["as the tokenizer", "others", "unknown"]:
        expected = len(self._requests[0].prompt_ids)
        if answer.prompt_tokens is None:
            return "unknown"
        if answer.prompt_tokens == expected:
            return "as the tokenizer"
        if dialect.api == "completions":
            raise UserError(
                "the endpoint reads prompts as other tokens than the tokenizer",
                found=f"{answer.prompt_tokens} tokens",
                expected=f"{expected} for {_QUESTIONS[0]!r}",
                where=self._url,
                advice="Give --teacher the tokenizer of the endpoint's model",
            )
        say(
            f"the endpoint's chat template makes {answer.prompt_tokens} tokens of a question, the tokenizer's "
            f"{expected}: the teacher sees other prompts than the student will"
        )
        return "others"

    async def _with_tools(self, dialect: Dialect, without: int | None) -> Dialect:
        """The dialect with its way to answer under tools, which must make a prompt longer than `without` tokens."""
        request = self._request(0, _QUESTIONS[0], [_TOOL])
        expected = len(request.prompt_ids)
        problem: object = None
        # vLLM leaves calls in the text if it is told to take none; other endpoints then leave the tools out
        ways: tuple[Literal["calls in the text", "calls taken out"], ...] = ("calls in the text", "calls taken out")
        for way in ways if dialect.extended else ways[1:]:
            try:
                answer = await self._ask(replace(dialect, tools=way), request, self._sampling(), 0)
            except RequestRefusedError as refusal:
                problem = refusal
                continue
            counted = answer.prompt_tokens
            if counted is not None and without is not None and counted <= without:
                problem = f"{counted} prompt tokens with a tool"
                continue
            if counted not in (None, expected) and dialect.prompt_tokens == "as the tokenizer":
                say(
                    f"the endpoint's chat template makes {counted} tokens of a question with a tool, the tokenizer's "
                    f"{expected}: the teacher sees other prompts than the student will"
                )
                dialect = replace(dialect, prompt_tokens="others")
            return replace(dialect, tools=way)
        raise UserError(
            "rows of the data have tools, and the endpoint does not read them",
            found=problem,
            expected=None if without is None else f"more than the {without} without",
            where=self._url,
            advice="Give --teacher-api completions, which sends prompts with their tools, or leave these rows out",
        )

    async def _with_entries(self, dialect: Dialect, top_k: int) -> Dialect:
        """The dialect with the largest K up to `top_k` that the endpoint accepts and returns."""
        accepted, refused = 0, top_k + 1
        asked = top_k
        while accepted < refused - 1:
            try:
                dialect = await self._returned(dialect, asked)
                accepted = asked
            except RequestRefusedError:
                refused = asked
            asked = (accepted + refused) // 2
        return dialect

    async def _returned(self, dialect: Dialect, top_k: int) -> Dialect:
        """The dialect with the entries that come back if `top_k` are asked for."""
        for request in self._requests:
            answer = await self._ask(dialect, request, self._sampling(), top_k)
            if answer.tokens is None:
                return dialect
            if answer.tokens:
                entries = num_entries(answer)
                written = all(token.text.startswith("token_id:") for token in answer.tokens)
                return replace(dialect, top_k=min(entries, top_k), token_ids=written)
        return dialect

    async def _check_raw(self, dialect: Dialect, sampling: Sampling) -> None:
        """Raise `UserError` unless the log-probs of a first token are those at temperature 1 and top-p 1."""
        for request in self._requests:
            rows = []
            for temperature, top_p in ((1.0, 1.0), (sampling.temperature, sampling.top_p)):
                answer = await self._ask(dialect, request, self._sampling(temperature, top_p, 1), dialect.top_k)
                rows.append({token.text: token.logprob for token in (answer.tops or [[]])[0]})
            common = sorted(rows[0].keys() & rows[1].keys(), key=lambda text: -rows[0][text])
            plain, drawn = (np.maximum([row[text] for text in common], -100.0) for row in rows)
            if common and float(np.abs(plain - drawn).mean()) <= AGREEMENT_NATS:
                return
            if common:
                break  # an answer without a token says nothing: another question may give one
        raise UserError(
            "the endpoint returns log-probs after temperature and top-p",
            found=f"{drawn[0]:.3f} nats of {common[0]!r}" if common else "other tokens than at temperature 1",
            expected=f"{plain[0]:.3f} as at temperature 1" if common else None,
            where=self._url,
            advice="Leave --temperature and --top-p at 1",
        )


def same_endpoint(known: Any, actual: dict[str, Any], url: str) -> None:
    """Raise `UserError` if the endpoint is not as an earlier run of the job measured it."""
    changed = [key for key in sorted(actual) if known.get(key) != actual[key]]
    if changed:
        raise UserError(
            "the endpoint has changed since the job began",
            found=", ".join(f"{key} {actual[key]}" for key in changed),
            expected=", ".join(f"{key} {known.get(key)}" for key in changed),
            where=url,
            advice="Choose another --out, or bring the endpoint back as it was",
        )
