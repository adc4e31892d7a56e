"""JSON to and from an OpenAI-compatible endpoint: requests in its dialect, and answers as they were sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from dpkd.teacher_cache.engines.engine import EndpointApi, GenerateRequest, Sampling

#: how an answer ended whose tool calls are not in its text
CALLS_TAKEN_OUT = "tool_calls"


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
        tools: how it answers in a chat with tools: with calls in the text, as the model writes them, or with calls
            taken out of the text. None: no row has tools.
    """

    api: EndpointApi
    prompt: Literal["ids", "text", "messages"]
    extended: bool
    token_ids: bool
    limit_field: str
    top_k: int
    model: str | None
    prompt_tokens: Literal["as the tokenizer", "others", "unknown"]
    tools: Literal["calls in the text", "calls taken out"] | None = None

    def facts(self) -> dict[str, Any]:
        """What of it is part of a cache's identity."""
        own = asdict(self)
        return {key: own[key] for key in ("api", "prompt", "token_ids", "top_k", "prompt_tokens")} | {
            "model": self.model or "unknown",
            "template": "of the endpoint, unknown" if self.api == "chat" else "of this cache",
            "end": "known" if self.token_ids else "unknown" if self.top_k else "none",
            **({"tools": self.tools} if self.tools else {}),
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
            body["messages"] = _as_sent(request.messages or ())
            if request.tools:
                body["tools"] = [
                    tool if "function" in tool else {"type": "function", "function": tool} for tool in request.tools
                ]
                if self.tools == "calls in the text":
                    # vLLM then leaves the answer as it is, and the tools in the prompt, whose ids it returns
                    body |= {"tool_choice": "none", "return_token_ids": True}
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


def _as_sent(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The turns in the protocol's form: arguments of calls as JSON text, and an id for each call and its result."""
    sent: list[Mapping[str, Any]] = []
    open_ids: list[str] = []
    for place, turn in enumerate(turns):
        if turn.get("tool_calls"):
            results = turns[place + 1 : place + 1 + len(turn["tool_calls"])]
            calls = []
            for number, call in enumerate(turn["tool_calls"]):
                of_result = results[number].get("tool_call_id") if number < len(results) else None
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                identity = call.get("id") or of_result or f"call_{place}_{number}"
                calls.append(call | {"id": identity, "function": call["function"] | {"arguments": arguments}})
            open_ids = [call["id"] for call in calls]
            turn = {**turn, "tool_calls": calls}
        elif turn["role"] == "tool":
            first = open_ids.pop(0)
            turn = {"tool_call_id": first, **turn}
        sent.append(turn)
    return sent


class WrittenToken(NamedTuple):
    """A token as the endpoint writes it: its text, its bytes if they are sent, and its log-prob (nats)."""

    text: str
    data: Sequence[int] | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was sent. `tokens` are the response's, `tops` the most likely ones at each; None without.

    `problem` says why the log-probs cannot be read, if so: asking again would cost and give the same.
    """

    api: EndpointApi
    text: str
    finish_reason: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    tokens: list[WrittenToken] | None
    tops: list[list[WrittenToken]]
    problem: str | None = None
    prompt_ids: list[int] | None = None

    @classmethod
    def of(cls, body: Any) -> Answer:
        """Read the JSON of an answer; raises ValueError, KeyError, TypeError or IndexError for another form."""
        choice = body["choices"][0]
        usage = body.get("usage") or {}
        chat = "message" in choice
        text = choice["message"].get("content") if chat else choice["text"]
        if not isinstance(text or "", str):
            raise TypeError("the answer is not text")
        problem = None
        try:
            tokens, tops = _logprobs_of(choice.get("logprobs"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            tokens, tops, problem = None, [], f"the log-probs are malformed: {type(error).__name__}: {error}"
        reason, model = choice.get("finish_reason"), body.get("model")
        if chat and choice["message"].get("tool_calls"):
            reason = CALLS_TAKEN_OUT
        return cls(
            "chat" if chat else "completions",
            text or "",
            reason if isinstance(reason, str) else None,
            model if isinstance(model, str) and model else None,
            to_count(usage.get("prompt_tokens")),
            to_count(usage.get("completion_tokens")),
            tokens,
            tops,
            problem,
            body.get("prompt_token_ids"),
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
    return tokens, [
        [WrittenToken(str(text), None, float(value)) for text, value in (row or {}).items()] for row in rows
    ]


def _written(entry: dict[str, Any]) -> WrittenToken:
    return WrittenToken(str(entry["token"]), entry.get("bytes"), float(entry["logprob"]))


def to_count(value: object) -> int | None:
    """A number of tokens as an endpoint counts them; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
