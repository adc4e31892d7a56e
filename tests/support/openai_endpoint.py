"""An OpenAI-compatible endpoint on loopback that answers from a real toy model, so that its values can be checked.

It speaks completions and chat, writes tokens as texts (in completions) and bytes (in chat) as OpenAI does, and can
misbehave as real ones do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support.judge_endpoints import Answer, Endpoint, failure, serving

from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

#: fields of OpenAI's own protocol; a strict endpoint refuses others
_OWN_FIELDS = {
    "model", "prompt", "messages", "temperature", "top_p", "max_tokens", "seed", "logprobs", "top_logprobs", "tools",
    "tool_choice",
}  # fmt: skip


@dataclass
class ToyEndpoint:
    """The toy model at `directory` behind the protocol.

    Attributes:
        most: largest K that it accepts; more is refused, or with `clamps` answered with `most`.
        with_ids: whether it takes vLLM's fields and writes tokens as ids.
        shows_end: whether the log-prob of the EOS is returned.
        empty_end: whether the EOS is written as an empty text, and the end of an answer is called `eos`.
        chat_form: whether completions have the log-probs of chat, as llama.cpp's do.
        processed: whether log-probs come after the temperature.
        reads_tools: whether the tools of a chat come into its prompt: always, or unless the choice is `none`.
        change: last change of an answer's JSON before it is sent: how tests make it lie.
    """

    directory: Path
    name: str = "toy"
    most: int = 5
    clamps: bool = False
    with_ids: bool = False
    shows_end: bool = False
    processed: bool = False
    reads_tools: Literal["always", "unless none", "never"] = "always"
    chat_form: bool = False
    empty_end: bool = False
    accepts_ids: bool = True
    change: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    before: Callable[[dict[str, Any]], Answer | None] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(self.directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        special = set(self.tokenizer.all_special_ids)
        self.bytes = [
            text.encode() if token in special else _bytes_of(self.tokenizer, text) for text, token in vocabulary
        ]

    def answer(self, body: dict[str, Any]) -> Answer:
        """The HTTP answer to a request."""
        if self.before is not None and (early := self.before(body)) is not None:
            return early
        if not self.with_ids and (other := body.keys() - _OWN_FIELDS):
            return failure(400, f"Unrecognized request argument supplied: {sorted(other)[0]}")
        chat = "messages" in body
        wanted = (body.get("top_logprobs") if chat else body.get("logprobs")) or 0
        if wanted > self.most and not self.clamps:
            return failure(400, f"logprobs must be at most {self.most}")
        if chat:
            ids = self._chat_ids(body)
        elif isinstance(body["prompt"], list):
            if not self.accepts_ids:
                return failure(400, "prompt must be a string")
            ids = body["prompt"]
        else:
            ids = self.tokenizer.encode(body["prompt"])
        with self.lock:  # torch's generator is one
            made = self._generate(ids, body)
        answer = self._json(ids, made, body, min(wanted, self.most), chat)
        if self.change is not None:
            answer = self.change(answer, body)
        return 200, {"content-type": "application/json"}, json.dumps(answer).encode()

    def _chat_ids(self, body: dict[str, Any]) -> list[int]:
        """The prompt's ids: arguments of calls come as JSON text, and templates write objects."""
        turns = json.loads(json.dumps(body["messages"]))
        for turn in turns:
            for call in turn.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        reads = self.reads_tools == "always" or (self.reads_tools == "unless none" and "tool_choice" not in body)
        tools = body.get("tools") if reads else None
        ids: list[int] = self.tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True)["input_ids"]
        return ids

    def logprobs(self, prompt_ids: list[int], response_ids: list[int]) -> torch.Tensor:
        """The model's log-probs at each response position, [T, V]."""
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
        return torch.log_softmax(logits[len(prompt_ids) - 1 : -1].float(), dim=-1)

    @torch.inference_mode()
    def _generate(self, ids: list[int], body: dict[str, Any]) -> list[tuple[int, torch.Tensor]]:
        """Tokens with the log-probs [V] that they were drawn from, before temperature unless `processed`."""
        generator = torch.Generator().manual_seed(int(body.get("seed") or 0))
        temperature, made = float(body.get("temperature", 1.0)), []
        ids = list(ids)
        for _ in range(body["max_tokens"]):
            scores = self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            drawn = scores / temperature if temperature else scores
            token = (
                int(torch.multinomial(drawn.softmax(0), 1, generator=generator)) if temperature else int(drawn.argmax())
            )
            made.append((token, torch.log_softmax(drawn if self.processed else scores, dim=0)))
            ids.append(token)
            if token == self.tokenizer.eos_token_id:
                break
        return made

    def _json(
        self, ids: list[int], made: list[tuple[int, torch.Tensor]], body: dict[str, Any], top_k: int, chat: bool
    ) -> dict[str, Any]:
        ended = bool(made) and made[-1][0] == self.tokenizer.eos_token_id
        shown = made if self.shows_end or not ended else made[:-1]
        plain = [token for token, _ in made if token not in self.tokenizer.all_special_ids]
        text = b"".join(self.bytes[token] for token in plain).decode("utf-8", "replace")
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
        if ended:
            choice["finish_reason"] = "eos" if self.empty_end else "stop"
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if top_k and (chat or self.chat_form):
            choice["logprobs"] = {
                "content": [
                    self._entry(token, logprobs, as_ids)
                    | {
                        "top_logprobs": [
                            self._entry(top, logprobs, as_ids) for top in logprobs.topk(top_k).indices.tolist()
                        ]
                    }
                    for token, logprobs in shown
                ]
            }
        elif top_k:
            choice["logprobs"] = {
                "tokens": [self._text(token, as_ids) for token, _ in shown],
                "token_logprobs": [float(logprobs[token]) for token, logprobs in shown],
                "top_logprobs": [
                    {
                        self._text(top, as_ids): float(logprobs[top])
                        for top in dict.fromkeys([*logprobs.topk(top_k).indices.tolist(), token])
                    }
                    for token, logprobs in shown
                ],
            }
        return {
            "model": self.name,
            "choices": [choice],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": len(made)},
        }

    def _entry(self, token: int, logprobs: torch.Tensor, as_ids: bool) -> dict[str, Any]:
        raw = b"" if self.empty_end and token == self.tokenizer.eos_token_id else self.bytes[token]
        return {"token": self._text(token, as_ids, chat=True), "logprob": float(logprobs[token]), "bytes": list(raw)}

    def _text(self, token: int, as_ids: bool, *, chat: bool = False) -> str:
        if as_ids:
            return f"token_id:{token}"
        raw = b"" if self.empty_end and token == self.tokenizer.eos_token_id else self.bytes[token]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # a part of a character: as OpenAI writes it in completions, and in chat beside the bytes
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if not chat else raw.decode("utf-8", "replace")


def _bytes_of(tokenizer: Any, token: str) -> bytes:
    """The bytes of a byte-level token, by transformers' own table of GPT-2."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(back[character] for character in token)


@contextmanager
def serving_toy(directory: Path, **options: Any) -> Iterator[tuple[ToyEndpoint, Endpoint]]:
    """The toy model at an endpoint that is up inside of the block, and what came in."""
    toy = ToyEndpoint(directory, **options)
    with serving(toy.answer) as endpoint:
        yield toy, endpoint


def rows_of(out: Path) -> list[CachedRow]:
    cache = TeacherCache.open(out)
    return [shard.row(index) for _, shard in cache.scan(cache.shards()) for index in range(len(shard))]


def end_is_unknown(row: CachedRow) -> bool:
    assert row.distributions is not None
    return bool(row.distributions.counts_T[-1] == 0)


def check_values(toy: ToyEndpoint, rows: list[CachedRow], top_k: int, *, chat: bool = False) -> None:
    """The log-probs, entries and tail masses of `rows` are those of the model behind the endpoint."""
    for row in rows:
        top = row.distributions
        assert top is not None
        full_TV = toy.logprobs(row.prompt_ids.tolist(), row.response_ids.tolist()).double().numpy()
        known = len(row.response_ids) - end_is_unknown(row)
        own_T = full_TV[np.arange(len(full_TV)), row.response_ids]
        np.testing.assert_allclose(row.response_logprobs[:known], own_T[:known], atol=2e-4)
        ends = np.cumsum([0, *top.counts_T])
        for position in range(known):
            ids = top.ids_E[ends[position] : ends[position + 1]]
            # in chat, an own token that is last may stand for another one, and is left out
            assert len(ids) in ((top_k, top_k - 1) if chat else (top_k,))
            np.testing.assert_array_equal(ids, np.argsort(-full_TV[position], kind="stable")[: len(ids)])
            cached = top.logprobs_E[ends[position] : ends[position + 1]]
            np.testing.assert_allclose(cached, full_TV[position][ids], atol=1 / 256 + 2e-4)
            tail = np.log(max(1 - np.exp(full_TV[position][ids]).sum(), 1e-6))
            assert top.log_tail_T[position] == pytest.approx(tail, abs=2e-3)
        if end_is_unknown(row):
            assert row.response_ids[-1] == 0
            assert (row.response_logprobs[-1], top.log_tail_T[-1]) == (0, 0)
