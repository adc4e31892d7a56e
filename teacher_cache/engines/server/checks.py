"""Does a server hold this teacher, and does it say what the cache needs? Asked when it joins and when it comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dpkd.core.errors import UserError
from dpkd.teacher_cache.engines.engine import EngineOptions, Sampling
from dpkd.teacher_cache.engines.server.http import RequestRefusedError, Server, ServerHttp
from dpkd.teacher_cache.engines.server.messages import MALFORMED, LogprobTable, generation_body, scoring_body

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

#: Mean difference of log-probs (nats) above which two servers, or two ways of asking one, are held to disagree.
AGREEMENT_NATS = 0.05

_PROBE_TEXT = "The 3 quick foxes' price:\n\t$4.50 (déjà vu, мир, 你好)!  print(x)"
_PROBE_LENGTH, _PROBE_NEW = 12, 8


class ServerChecks:
    """Does a server hold this teacher and say what the cache needs? Raises `UserError` when it does not."""

    def __init__(self, model: ModelSource, options: EngineOptions) -> None:
        self._model, self._options = model, options
        num_new = max(1, min(_PROBE_NEW, options.max_length // 2))
        num_ids = max(2, min(_PROBE_LENGTH, options.max_length - num_new))
        # the last id is among them: a server with a smaller vocabulary refuses it
        self._ids = np.linspace(0, model.vocab_size - 1, num_ids).astype(int).tolist()
        self._sampling = Sampling(temperature=0.5, top_p=1.0, max_new_tokens=num_new, stop_token_ids=())
        self._first: tuple[str, np.ndarray] | None = None

    async def run(self, server: Server, http: ServerHttp) -> None:
        """All checks of one server; sets its `model_id`."""

        async def ask(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
            named = None if body is None else {"model": server.model_id, **body}
            return json.loads(await http.ask(server, method, path, named))

        try:
            self._check_model(server, (await ask("GET", "/v1/models"))["data"])
            self._check_agreement(server.url, await self._probe(server, ask))
            await self._check_tokenizer(server, ask)
            await self._check_raw(server, ask)
        except RequestRefusedError as refusal:
            raise UserError("the server refuses a check", found=refusal, where=server.url) from None
        except MALFORMED as error:
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
            answer = await ask("POST", "/v1/completions", scoring_body(self._ids, top_k))
        except RequestRefusedError as refusal:
            if top_k == 0:
                raise
            await ask("POST", "/v1/completions", scoring_body(self._ids, 0))  # raises when K is not the reason
            raise UserError(
                "the server gives fewer log-probs a position than top-k",
                found=refusal,
                expected=top_k,
                where=server.url,
                advice=f"Start it with --max-logprobs {top_k}, or lower --top-k",
            ) from None
        table = LogprobTable.of_scoring(answer["choices"][0], 1, self._ids[1:])
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
        body = generation_body(self._ids, 0, self._sampling, 0)
        drawn = (await ask("POST", "/v1/completions", body))["choices"][0]
        new_ids = drawn["token_ids"]
        answer = await ask("POST", "/v1/completions", scoring_body(self._ids + new_ids, 0))
        scored = LogprobTable.of_scoring(answer["choices"][0], len(self._ids), new_ids)
        if apart := _disagreement(LogprobTable.of_generation(drawn).own_T, scored.own_T):
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
