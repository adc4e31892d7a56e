"""JSON to and from an OpenAI-compatible endpoint: requests in its dialect, and answers as results with token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from dpkd.teacher_cache.engines.engine import (
    EndpointApi,
    EngineOptions,
    EngineResult,
    FinishReason,
    GenerateRequest,
    Sampling,
)
from dpkd.teacher_cache.engines.openai.tokens import REPLACEMENT, TokenTable
from dpkd.teacher_cache.engines.top_k import build_result

_LOWEST_LOGPROB = -9999.0  # JSON has no -inf: vLLM sends this instead
_MASS_TOLERANCE = 1e-3  # of a sum of probabilities whose logs an endpoint may round


class UnusableAnswerError(Exception):
    """An answer that cannot become a row; the text says why, in one line."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What an endpoint accepts and returns, as `probe` measured it.

    Args:
        api: which of its paths is asked.
        prompt: how prompts are sent: as token ids, as text, or as messages that it puts into its own template.
        extended: whether it accepts vLLM's fields.
        token_ids: whether it writes tokens as ids, which also shows the log-prob of the EOS.
        limit_field: its name for the longest answer.
        top_k: entries that it returns per position; 0: none.
        model: the model's name in its answers; None: they name none.
        prompt_tokens: whether it counts the prompt's tokens as the tokenizer and its template do.
    """

    api: EndpointApi
    prompt: Literal["ids", "text", "messages"]
    extended: bool
    token_ids: bool
    limit_field: str
    top_k: int
    model: str | None
    prompt_tokens: Literal["as the tokenizer", "others", "unknown"]

    def facts(self) -> dict[str, Any]:
        """What of it is part of a cache's identity."""
        own = asdict(self)
        return {key: own[key] for key in ("api", "prompt", "token_ids", "top_k", "prompt_tokens")} | {
            "model": self.model or "unknown",
            "template": "of the endpoint, unknown" if self.api == "chat" else "of this cache",
            "end": "known" if self.token_ids else "unknown" if self.top_k else "none",
        }

    @property
    def path(self) -> str:
        """What follows the base URL."""
        return "/chat/completions" if self.api == "chat" else "/completions"

    def body(self, model: str, request: GenerateRequest, sampling: Sampling, top_k: int) -> dict[str, Any]:
        """A request to answer the prompt, with the `top_k` most likely tokens of each position."""
        body: dict[str, Any] = {"model": model, "temperature": sampling.temperature, "top_p": sampling.top_p}
        body[self.limit_field] = sampling.max_new_tokens
        if sampling.temperature > 0:
            body["seed"] = request.seed
        if self.prompt == "messages":
            body["messages"] = list(request.messages or ())
        else:
            body["prompt"] = request.text if self.prompt == "text" else [int(token) for token in request.prompt_ids]
        if top_k:
            body |= {"logprobs": True, "top_logprobs": top_k} if self.api == "chat" else {"logprobs": top_k}
        if self.extended:
            # neutral values: vLLM takes absent ones from the model's generation config
            body |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_tokens_as_token_ids": bool(top_k)}
            if sampling.stop_token_ids:
                body["stop_token_ids"] = list(sampling.stop_token_ids)
        return body


class WrittenToken(NamedTuple):
    """A token as the endpoint writes it: its text, its bytes if they are sent, and its log-prob (nats)."""

    text: str
    data: Sequence[int] | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was sent. `tokens` are the response's, `tops` the most likely ones at each; None without."""

    api: EndpointApi
    text: str
    finish_reason: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    tokens: list[WrittenToken] | None
    tops: list[list[WrittenToken]]

    @classmethod
    def of(cls, body: Any) -> Answer:
        """Read the JSON of an answer; raises ValueError, KeyError, TypeError or IndexError for another form."""
        choice = body["choices"][0]
        usage = body.get("usage") or {}
        chat = "message" in choice
        text = choice["message"].get("content") if chat else choice["text"]
        if not isinstance(text or "", str):
            raise TypeError("the answer is not text")
        tokens, tops = _logprobs_of(choice.get("logprobs"))
        reason, model = choice.get("finish_reason"), body.get("model")
        return cls(
            "chat" if chat else "completions",
            text or "",
            reason if isinstance(reason, str) else None,
            model if isinstance(model, str) and model else None,
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
            tokens,
            tops,
        )


def num_entries(answer: Answer) -> int:
    """The largest K that came back. Completions have one more entry where the own token is not in the K."""
    assert answer.tokens is not None
    counts = [len(row) for row in answer.tops]
    if answer.api == "chat" or not counts:
        return max(counts, default=0)
    lowest = [min(row, key=lambda token: token.logprob).text if row else "" for row in answer.tops]
    certain = [
        count for count, text, own in zip(counts, lowest, answer.tokens, strict=False) if text != own.text or count == 1
    ]
    return max(certain, default=max(counts) - 1)


def _logprobs_of(logprobs: Any) -> tuple[list[WrittenToken] | None, list[list[WrittenToken]]]:
    """The form of chat (`content`), which llama.cpp has for completions too, or of completions (`tokens`)."""
    if logprobs and logprobs.get("content") is not None:
        rows = logprobs["content"]
        tops = [[_written(top) for top in row.get("top_logprobs") or []] for row in rows]
        return [_written(row) for row in rows], tops
    if not logprobs or logprobs.get("tokens") is None:
        return None, []
    pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    tokens = [WrittenToken(str(text), None, float(logprob)) for text, logprob in pairs]
    rows = logprobs.get("top_logprobs") or []
    return tokens, [[WrittenToken(str(text), None, float(value)) for text, value in row.items()] for row in rows]


def _written(entry: dict[str, Any]) -> WrittenToken:
    return WrittenToken(str(entry["token"]), entry.get("bytes"), float(entry["logprob"]))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class AnswerReader:
    """From an answer to a result.

    Args:
        table: the tokenizer's tokens; None in a cache of texts.
        encode: ids of a text, for a cache of texts.
        eos_token_id: the end that is added where the endpoint leaves it out.
        limits_are_known: whether the longest answer is `sampling`'s and each position has K entries.
    """

    dialect: Dialect
    options: EngineOptions
    sampling: Sampling
    table: TokenTable | None
    encode: Any
    decode: Any
    eos_token_id: int
    vocab_size: int
    limits_are_known: bool = True

    def result(self, index: int, answer: Answer) -> EngineResult:
        """The result of request `index`; raises `UnusableAnswerError`."""
        if answer.finish_reason not in ("stop", "length"):
            raise UnusableAnswerError(f"the endpoint ended the answer with {answer.finish_reason!r}")
        reason: FinishReason = "stop" if answer.finish_reason == "stop" else "length"
        return self._text_only(index, answer, reason) if self.table is None else self._scored(index, answer, reason)

    def _text_only(self, index: int, answer: Answer, reason: FinishReason) -> EngineResult:
        ids = list(self.encode(answer.text))
        if self.decode(ids) != answer.text:
            raise UnusableAnswerError("the tokenizer does not give the answer's text back")
        ids += [self.eos_token_id] if reason == "stop" else []
        if not ids:
            raise UnusableAnswerError("the answer is empty")
        if self.limits_are_known and len(ids) > self.sampling.max_new_tokens:
            ids, reason = ids[: self.sampling.max_new_tokens], "length"
        return EngineResult(index, np.array(ids, np.int32), reason, np.zeros(0, np.float32), None)

    def _scored(self, index: int, answer: Answer, reason: FinishReason) -> EngineResult:
        ids = self._ids(answer)
        self._check_end(ids, answer, reason)
        logprobs = [token.logprob for token in answer.tokens or ()]
        if not all(np.isfinite(value) and value <= _MASS_TOLERANCE for value in logprobs):
            raise UnusableAnswerError("a token's log-prob is not a finite number <= 0")
        rows = [self._entries(position, ids[position], row) for position, row in enumerate(answer.tops)]
        if reason == "stop" and (not ids or ids[-1] not in self.sampling.stop_token_ids):
            # the endpoint does not say how likely the end was: no entries, and all the mass in the tail
            ids, logprobs, rows = [*ids, self.eos_token_id], [*logprobs, 0.0], [*rows, []]
        width = max(self.options.top_k, 1)
        ids_TK = np.full((len(ids), width), -1, np.int64)
        logprobs_TK = np.full((len(ids), width), -np.inf, np.float32)
        for position, row in enumerate(rows):
            for rank, (token, logprob) in enumerate(row[:width]):
                ids_TK[position, rank], logprobs_TK[position, rank] = token, logprob
        own_T = np.minimum(np.array(logprobs, np.float32), 0.0)
        response_ids = np.array(ids, np.int32)
        return build_result(index, response_ids, reason, own_T, ids_TK, logprobs_TK, self.vocab_size, self.options)

    def _ids(self, answer: Answer) -> list[int]:
        assert self.table is not None
        if answer.tokens is None:
            raise UnusableAnswerError("the answer has no log-probs")
        found = [(token, self.table.find(token.text, token.data)) for token in answer.tokens]
        for token, token_id in found:
            if token_id is None:
                raise UnusableAnswerError(f"{token.text!r} is not one token of the tokenizer")
        ids = [int(token_id) for _, token_id in found if token_id is not None]
        text = self.table.text(ids)
        if not any(_same(text, written, answer) for written in (answer.text, " " + answer.text)):
            raise UnusableAnswerError("the tokens do not give the answer's text back")
        if answer.completion_tokens is not None and answer.completion_tokens - len(ids) not in (0, 1):
            raise UnusableAnswerError(f"log-probs of {len(ids)} tokens, and the answer has {answer.completion_tokens}")
        if len(answer.tops) != len(ids):
            raise UnusableAnswerError(f"the most likely tokens of {len(answer.tops)} of {len(ids)} positions")
        return ids

    def _check_end(self, ids: list[int], answer: Answer, reason: FinishReason) -> None:
        stops, limit = self.sampling.stop_token_ids, self.sampling.max_new_tokens
        if any(token in stops for token in ids[:-1]):
            raise UnusableAnswerError("the answer goes on after its end")
        ended = bool(ids) and ids[-1] in stops
        if reason == "length" and (ended or (self.limits_are_known and len(ids) != limit)):
            raise UnusableAnswerError(f"the answer was cut after {len(ids)} tokens, not {limit}")
        if reason == "stop" and not ended and self.dialect.token_ids:
            raise UnusableAnswerError("the answer stops without an EOS of the tokenizer")
        if self.limits_are_known and len(ids) + (reason == "stop" and not ended) > limit:
            raise UnusableAnswerError(f"the answer has more than {limit} tokens")

    def _entries(self, position: int, own: int, row: list[WrittenToken]) -> list[tuple[int, float]]:
        """Ids and log-probs in rank order, up to the first token that cannot be identified.

        An own token that comes last is left out where it may not be among the most likely ones: completions add it to
        them, and vLLM's chat puts it in place of the last.
        """
        assert self.table is not None
        if self.options.top_k == 0:
            return []
        unclear = not self.limits_are_known or any(
            REPLACEMENT in token.text for token in row
        )  # several of them may have become one
        if len(row) < self.options.top_k and not unclear:
            raise UnusableAnswerError(f"position {position} has {len(row)} log-probs, not {self.options.top_k}")
        if any(np.isnan(token.logprob) or token.logprob > _MASS_TOLERANCE for token in row):
            raise UnusableAnswerError(f"a log-prob at position {position} is not a number <= 0")
        if (mass := float(np.exp([token.logprob for token in row]).sum())) > 1 + _MASS_TOLERANCE:
            raise UnusableAnswerError(f"the probabilities at position {position} sum to {mass:.4f}")
        ranked = sorted((token for token in row if token.logprob > _LOWEST_LOGPROB), key=lambda token: -token.logprob)
        entries: list[tuple[int, float]] = []
        for token in ranked:
            token_id = self.table.find(token.text, token.data)
            if token_id is None:
                break
            entries.append((token_id, min(token.logprob, 0.0)))
        may_be_extra = len(row) > self.options.top_k or self.dialect.api == "chat"
        if may_be_extra and len(entries) > 1 and len(entries) == len(row) and entries[-1][0] == own:
            entries.pop()
        if not entries:
            raise UnusableAnswerError(f"the most likely token at position {position} is not one token of the tokenizer")
        if len({token for token, _ in entries}) < len(entries):
            raise UnusableAnswerError(f"a token is twice among the most likely ones at position {position}")
        return entries


def _same(text: str, written: str, answer: Answer) -> bool:
    if answer.finish_reason == "length":  # perhaps in the middle of a character
        return text.rstrip(REPLACEMENT) == written.rstrip(REPLACEMENT)
    return text == written
