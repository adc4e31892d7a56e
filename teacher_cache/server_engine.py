"""The engine `server`: vLLM's OpenAI-compatible HTTP servers, ids in and ids out (checked against vLLM 0.32)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from dpkd.teacher_cache.distributions import from_top_k
from dpkd.teacher_cache.engine import (
    EngineOptions,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.server_client import (
    PATIENCE_S,
    REQUEST_TIMEOUT_S,
    NoAnswerError,
    RequestRefusedError,
    Server,
    ServerPool,
    base_urls,
)

if TYPE_CHECKING:
    from dpkd.teacher_cache.models import ModelSource

_Request = TypeVar("_Request", GenerateRequest, ScoreRequest)

#: Mean difference of log-probs (nats) above which two servers, or two ways of asking one, are held to disagree.
AGREEMENT_NATS = 0.05

_LOWEST_LOGPROB = -9999.0  # JSON has no -inf: vLLM sends this instead
_PROBE_TEXT = "The 3 quick foxes' price:\n\t$4.50 (déjà vu, мир, 你好)!  print(x)"
_PROBE_LENGTH, _PROBE_NEW = 12, 8
_MALFORMED = (ValueError, KeyError, TypeError, IndexError)


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
            _Checks(model, options).run,
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
            return _generation_body(_to_ints(request.prompt_ids), request.seed, sampling, self._options.top_k)

        def to_result(request: GenerateRequest, content: bytes) -> EngineResult:
            choice = _first_choice(content)
            if choice["prompt_token_ids"] != _to_ints(request.prompt_ids):
                raise ValueError("it is about other prompt ids than those sent")
            reason, ids = choice["finish_reason"], choice["token_ids"]
            ended = reason == "stop" and ids and ids[-1] in sampling.stop_token_ids
            if not ended and (reason != "length" or len(ids) != sampling.max_new_tokens):
                raise ValueError(f"it ends after {len(ids)} tokens with {reason!r}")
            return self._result(request.index, np.array(ids, np.int32), reason, _Table.of_generation(choice))

        return self._run(requests, to_body, to_result)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        """See `Engine.score`."""

        def to_body(request: ScoreRequest) -> dict[str, Any]:
            return _scoring_body(_to_ints(request.prompt_ids) + _to_ints(request.response_ids), self._options.top_k)

        def to_result(request: ScoreRequest, content: bytes) -> EngineResult:
            ids = _to_ints(request.response_ids)
            table = _Table.of_scoring(_first_choice(content), len(request.prompt_ids), ids)
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

    def _result(self, index: int, response_ids: np.ndarray, finish_reason: Any, table: _Table) -> EngineResult:
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


@dataclass(frozen=True, slots=True)
class _Table:
    """What JSON says of T positions: each token's own log-prob, and `counts_T` entries each, concatenated.

    A position has K entries, or K + 1 where its own token is outside the top K; the own token comes first.
    """

    own_T: np.ndarray
    counts_T: np.ndarray
    ids_E: np.ndarray
    logprobs_E: np.ndarray

    @classmethod
    def of_generation(cls, choice: dict[str, Any]) -> _Table:
        rows = choice["logprobs"]["top_logprobs"]
        return cls._of(
            choice["logprobs"]["token_logprobs"],
            rows,
            [token.removeprefix("token_id:") for token in chain.from_iterable(rows)],
            list(chain.from_iterable(row.values() for row in rows)),
        )

    @classmethod
    def of_scoring(cls, choice: dict[str, Any], first_position: int, ids: list[int]) -> _Table:
        """Entries of `prompt_logprobs` from `first_position` on, where `ids` stand."""
        rows = choice["prompt_logprobs"][first_position:]
        return cls._of(
            [row[str(token)]["logprob"] for row, token in zip(rows, ids, strict=True)],
            rows,
            list(chain.from_iterable(rows)),
            [entry["logprob"] for row in rows for entry in row.values()],
        )

    @classmethod
    def _of(cls, own: list[float], rows: list[dict[str, Any]], ids: list[str], logprobs: list[float]) -> _Table:
        return cls(
            own_T=_to_logprobs(own),
            counts_T=np.array([len(row) for row in rows], np.int64),
            ids_E=np.array([int(token) for token in ids], np.int64),
            logprobs_E=_to_logprobs(logprobs),
        )

    def ranked(self, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `top_k` likeliest ids of each position in rank order, [T, K], and their log-probs."""
        if len(self.counts_T) and self.counts_T.min() < top_k:
            raise ValueError(f"a position has {self.counts_T.min()} entries, {top_k} were asked for")
        held_TW = np.arange(top_k + 1) < self.counts_T[:, None]
        ids_TW = np.zeros(held_TW.shape, np.int64)
        logprobs_TW = np.full(held_TW.shape, -np.inf, np.float32)
        ids_TW[held_TW], logprobs_TW[held_TW] = self.ids_E, self.logprobs_E
        order_TK = np.argsort(-logprobs_TW, axis=1, kind="stable")[:, :top_k]
        return np.take_along_axis(ids_TW, order_TK, axis=1), np.take_along_axis(logprobs_TW, order_TK, axis=1)


class _Checks:
    """Does a server hold this teacher and say what the cache needs? Raises `UserError` when it does not."""

    def __init__(self, model: ModelSource, options: EngineOptions) -> None:
        self._model, self._options = model, options
        num_new = max(1, min(_PROBE_NEW, options.max_length // 2))
        num_ids = max(2, min(_PROBE_LENGTH, options.max_length - num_new))
        # the last id is among them: a server with a smaller vocabulary refuses it
        self._ids = np.linspace(0, model.vocab_size - 1, num_ids).astype(int).tolist()
        self._sampling = Sampling(temperature=0.5, top_p=1.0, max_new_tokens=num_new, stop_token_ids=())
        self._first: tuple[str, np.ndarray] | None = None

    async def run(self, server: Server, pool: ServerPool) -> None:
        """All checks of one server; sets its `model_id`."""

        async def ask(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
            named = None if body is None else {"model": server.model_id, **body}
            return json.loads(await pool.ask(server, method, path, named))

        try:
            self._check_model(server, (await ask("GET", "/v1/models"))["data"])
            self._check_agreement(server.url, await self._probe(server, ask))
            await self._check_tokenizer(server, ask)
            await self._check_raw(server, ask)
        except RequestRefusedError as refusal:
            raise UserError("the server refuses a check", found=refusal, where=server.url) from None
        except _MALFORMED as error:
            raise UserError("the server does not answer like vLLM", found=repr(error), where=server.url) from error

    def _check_model(self, server: Server, cards: list[dict[str, Any]]) -> None:
        names = {self._model.name, str(self._model.path), str(self._model.path.resolve())}
        if len(cards) != 1:
            ids = ", ".join(card["id"] for card in cards)
            cards = [card for card in cards if {card["id"], card.get("root")} & names]
            if not cards:
                raise UserError(
                    "the server holds several models and none has the teacher's name",
                    found=ids,
                    expected=self._model.name,
                    where=server.url,
                )
        server.model_id = cards[0]["id"]
        limit = cards[0].get("max_model_len")
        # scoring asks for one more token than it wants, where the positions allow it
        needed = min(self._options.max_length + 1, self._model.max_positions or self._options.max_length + 1)
        if limit is not None and limit < needed:
            raise UserError(
                "the server's sequences are too short for prompt, response and one token more",
                found=f"{limit} tokens",
                expected=f"at least {needed}",
                where=server.url,
                advice=f"Start it with --max-model-len {needed}, or lower --max-prompt-tokens or --max-new-tokens",
            )

    async def _probe(self, server: Server, ask: Callable[..., Any]) -> np.ndarray:
        """Log-prob (nats) of each check id but the first."""
        top_k = self._options.top_k
        try:
            answer = await ask("POST", "/v1/completions", _scoring_body(self._ids, top_k))
        except RequestRefusedError as refusal:
            if top_k == 0:
                raise
            await ask("POST", "/v1/completions", _scoring_body(self._ids, 0))  # raises when K is not the reason
            raise UserError(
                "the server gives fewer log-probs a position than top-k",
                found=refusal,
                expected=top_k,
                where=server.url,
                advice=f"Start it with --max-logprobs {top_k}, or lower --top-k",
            ) from None
        table = _Table.of_scoring(answer["choices"][0], 1, self._ids[1:])
        table.ranked(top_k)
        if (highest := int(table.ids_E.max())) >= self._model.vocab_size:
            raise UserError(
                "the server's vocabulary is not the teacher's",
                found=f"token id {highest}",
                expected=f"below {self._model.vocab_size}",
                where=server.url,
            )
        return table.own_T

    def _check_agreement(self, url: str, logprobs_T: np.ndarray) -> None:
        if self._first is None:
            self._first = url, logprobs_T
        first_url, first_T = self._first
        apart = _disagreement(first_T, logprobs_T)
        if apart is None:
            return
        same = first_url == url
        raise UserError(
            "the server came back with another model" if same else "the servers hold different models",
            found=f"log-probs {apart} nat of the same token",
            where=url if same else f"{first_url} and {url}",
            advice="Every server must hold the teacher",
        )

    async def _check_tokenizer(self, server: Server, ask: Callable[..., Any]) -> None:
        body = {"prompt": _PROBE_TEXT, "add_special_tokens": False}
        found = (await ask("POST", "/tokenize", body))["tokens"]
        expected = self._model.tokenizer.encode(_PROBE_TEXT, add_special_tokens=False)
        if found != expected:
            raise UserError(
                "the server's tokenizer is not the teacher's",
                found=f"ids {found[:8]}...",
                expected=f"{expected[:8]}...",
                where=server.url,
                advice="Start it with the teacher that is named here",
            )

    async def _check_raw(self, server: Server, ask: Callable[..., Any]) -> None:
        body = _generation_body(self._ids, 0, self._sampling, 0)
        drawn = (await ask("POST", "/v1/completions", body))["choices"][0]
        new_ids = drawn["token_ids"]
        answer = await ask("POST", "/v1/completions", _scoring_body(self._ids + new_ids, 0))
        scored = _Table.of_scoring(answer["choices"][0], len(self._ids), new_ids)
        if apart := _disagreement(_Table.of_generation(drawn).own_T, scored.own_T):
            raise UserError(
                "the server gives log-probs after temperature",
                found=f"{apart} nat for a token as it was drawn and as it is scored",
                where=server.url,
                advice="Start it with --logprobs-mode raw_logprobs",
            )


def _disagreement(one_T: np.ndarray, two_T: np.ndarray) -> str | None:
    """The two values where they are furthest apart, when they differ by more than `AGREEMENT_NATS` on average."""
    difference_T = np.abs(np.maximum(one_T, -100.0) - np.maximum(two_T, -100.0))  # finite, so that -inf equals -inf
    worst = int(difference_T.argmax())
    return None if difference_T.mean() <= AGREEMENT_NATS else f"{one_T[worst]:.3f} and {two_T[worst]:.3f}"


def _parsed(to_result: Callable[[_Request, bytes], EngineResult], request: _Request, content: bytes) -> EngineResult:
    try:
        return to_result(request, content)
    except _MALFORMED as error:
        raise UserError(
            f"the answer to request {request.index} is not what was asked for: {error!r}",
            advice="Check the versions and options of the servers",
        ) from error


def _first_choice(content: bytes) -> dict[str, Any]:
    choice = json.loads(content)["choices"][0]
    if choice["finish_reason"] == "abort":
        raise NoAnswerError("broken", "the server aborted the request")  # it is being stopped
    return choice


def _generation_body(ids: list[int], seed: int, sampling: Sampling, top_k: int) -> dict[str, Any]:
    return {
        "prompt": ids,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed if sampling.temperature > 0 else None,
        # the stop ids say it all; a server adds those of its generation config otherwise
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,
        "logprobs": top_k,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        # neutral: a server takes what is not named from the model's generation config
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def _scoring_body(ids: list[int], top_k: int) -> dict[str, Any]:
    return {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}  # vLLM refuses 0 tokens


def _to_ints(ids: Sequence[int]) -> list[int]:
    return [int(token) for token in ids]  # JSON takes no numpy integers


def _to_logprobs(values: list[float]) -> np.ndarray:
    logprobs = np.array(values, np.float32)
    logprobs[logprobs <= _LOWEST_LOGPROB] = -np.inf
    return logprobs
