"""Checks that a server has the teacher and returns the log-probs that a cache needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from dpkd.core.errors import UserError
from dpkd.teacher_cache.engines.engine import EngineOptions, Sampling
from dpkd.teacher_cache.engines.http import RequestRefusedError
from dpkd.teacher_cache.engines.server.http import Server
from dpkd.teacher_cache.engines.server.messages import MALFORMED, LogprobTable, generation_body, scoring_body
from dpkd.teacher_cache.engines.vllm.environment import sequence_limit

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

#: Mean difference of log-probs (nats) above which two servers, or two requests to one server, disagree.
AGREEMENT_NATS = 0.05

_PROBE_TEXT = "The 3 quick foxes' price:\n\t$4.50 (déjà vu, мир, 你好)!  print(x)"
_PROBE_LENGTH, _PROBE_NEW = 12, 8


class ServerChecks:
    """Checks each server when it joins and when it comes back; raises `UserError` if it cannot be used."""

    def __init__(self, model: ModelSource, options: EngineOptions) -> None:
        self._model, self._options = model, options
        num_new = max(1, min(_PROBE_NEW, options.max_length // 2))
        num_ids = max(2, min(_PROBE_LENGTH, options.max_length - num_new))
        # with the last id, which a server with a smaller vocabulary refuses
        self._ids = np.linspace(0, model.vocab_size - 1, num_ids).astype(int).tolist()
        self._sampling = Sampling(temperature=0.5, top_p=1.0, max_new_tokens=num_new, stop_token_ids=())
        self._first: tuple[str, np.ndarray] | None = None

    async def run(self, server: Server) -> None:
        """Check one server and set its `model_id`."""
        try:
            self._check_model(server, json.loads(await server.ask("GET", "/v1/models"))["data"])
            self._check_agreement(server.url, await self._probe(server))
            await self._check_tokenizer(server)
            await self._check_raw(server)
        except RequestRefusedError as refusal:
            raise UserError("the server refuses a request of the check", found=refusal, where=server.url) from None
        except MALFORMED as error:
            raise UserError("the server does not answer like vLLM", found=repr(error), where=server.url) from error

    def _check_model(self, server: Server, cards: list[dict[str, Any]]) -> None:
        names = {self._model.name, str(self._model.path), str(self._model.path.resolve())}
        if len(cards) != 1:
            ids = ", ".join(card["id"] for card in cards)
            cards = [card for card in cards if {card["id"], card.get("root")} & names]
            if not cards:
                raise UserError(
                    "the server has several models and none has the teacher's name",
                    found=ids,
                    expected=self._model.name,
                    where=server.url,
                )
        server.model_id = cards[0]["id"]
        limit = cards[0].get("max_model_len")
        needed = sequence_limit(self._model, self._options.max_length)
        if limit is not None and limit < needed:
            raise UserError(
                "the server's longest sequence is too short for prompt, response and one more token",
                found=f"{limit} tokens",
                expected=f"at least {needed}",
                where=server.url,
                advice=f"Start it with --max-model-len {needed}, or lower --max-prompt-tokens or --max-new-tokens",
            )

    async def _probe(self, server: Server) -> np.ndarray:
        """Log-prob (nats) of each check id except the first."""
        top_k = self._options.top_k
        try:
            choice = await _completion(server, scoring_body(self._ids, top_k))
        except RequestRefusedError as refusal:
            if top_k == 0:
                raise
            await _completion(server, scoring_body(self._ids, 0))  # raises if K is not the reason
            raise UserError(
                "the server returns fewer log-probs per position than top-k",
                found=refusal,
                expected=top_k,
                where=server.url,
                advice=f"Start it with --max-logprobs {top_k}, or lower --top-k",
            ) from None
        table = LogprobTable.of_scoring(choice, 1, self._ids[1:])
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
            "the server came back with another model" if same else "the servers have different models",
            found=f"log-probs {apart} nats of the same token",
            where=url if same else f"{first_url} and {url}",
            advice="Start every server with the teacher",
        )

    async def _check_tokenizer(self, server: Server) -> None:
        body = {"prompt": _PROBE_TEXT, "add_special_tokens": False}
        found = json.loads(await server.ask("POST", "/tokenize", body))["tokens"]
        expected = self._model.tokenizer.encode(_PROBE_TEXT, add_special_tokens=False)
        if found != expected:
            raise UserError(
                "the server's tokenizer is not the teacher's",
                found=f"ids {found[:8]}...",
                expected=f"{expected[:8]}...",
                where=server.url,
                advice="Start it with the teacher given to this command",
            )

    async def _check_raw(self, server: Server) -> None:
        drawn = await _completion(server, generation_body(self._ids, 0, self._sampling, 0))
        new_ids = drawn["token_ids"]
        choice = await _completion(server, scoring_body(self._ids + new_ids, 0))
        scored = LogprobTable.of_scoring(choice, len(self._ids), new_ids)
        if apart := _disagreement(LogprobTable.of_generation(drawn).own_T, scored.own_T):
            raise UserError(
                "the server returns log-probs after temperature",
                found=f"{apart} nats for a token when generated and when scored",
                where=server.url,
                advice="Start it with --logprobs-mode raw_logprobs",
            )


async def _completion(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The one choice in the answer to `body`."""
    choice: dict[str, Any] = json.loads(await server.ask("POST", "/v1/completions", body))["choices"][0]
    return choice


def _disagreement(one_T: np.ndarray, two_T: np.ndarray) -> str | None:
    """The two log-probs that differ most, if the mean difference is above `AGREEMENT_NATS`; else None."""
    difference_T = np.abs(np.maximum(one_T, -100.0) - np.maximum(two_T, -100.0))  # finite, so that -inf equals -inf
    worst = int(difference_T.argmax())
    return None if difference_T.mean() <= AGREEMENT_NATS else f"{one_T[worst]:.3f} and {two_T[worst]:.3f}"
