"""From an answer to a result: ids by a round trip through bytes, log-probs that fit, entries in rank order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dpkd.teacher_cache.engines.engine import EngineOptions, EngineResult, FinishReason, Sampling
from dpkd.teacher_cache.engines.openai.messages import CALLS_TAKEN_OUT, Answer, WrittenToken
from dpkd.teacher_cache.engines.openai.tokens import REPLACEMENT, TokenTable
from dpkd.teacher_cache.engines.top_k import LOWEST_SENT_LOGPROB, build_result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: how endpoints say that an answer ended, and that it was cut
_ENDS: dict[str, FinishReason] = {
    "stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop", "length": "length", "max_tokens": "length",
}  # fmt: skip
_MASS_TOLERANCE = 1e-3  # of a sum of probabilities whose logs an endpoint may round


class UnusableAnswerError(Exception):
    """An answer that cannot become a row; the text says why, in one line."""


def end_of(answer: Answer) -> FinishReason | None:
    """How the answer ended; None for an end of another kind."""
    return _ENDS.get(answer.finish_reason or "")


@dataclass(frozen=True)
class AnswerReader:
    """From an answer to a result.

    Args:
        tokenizer: of the teacher; its EOS is added where the endpoint leaves it out.
        table: the tokenizer's tokens; None in a cache of texts.
        shows_ends: whether answers must end with the token that stopped them.
        limits_are_known: whether the longest answer is `sampling`'s and each position has K entries.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    options: EngineOptions
    sampling: Sampling
    table: TokenTable | None
    shows_ends: bool = False
    limits_are_known: bool = True

    @cached_property
    def _eos_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def result(self, index: int, answer: Answer) -> EngineResult:
        """The result of request `index`; raises `UnusableAnswerError`."""
        if answer.finish_reason == CALLS_TAKEN_OUT:
            raise UnusableAnswerError("the endpoint took a tool call out of the answer, so its text is unknown")
        if (reason := end_of(answer)) is None:
            raise UnusableAnswerError(f"the endpoint ended the answer with {answer.finish_reason!r}")
        return self._text_only(index, answer, reason) if self.table is None else self._scored(index, answer, reason)

    def _text_only(self, index: int, answer: Answer, reason: FinishReason) -> EngineResult:
        ids = self.tokenizer.encode(answer.text, add_special_tokens=False)
        if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) != answer.text:
            raise UnusableAnswerError("the tokenizer does not give the answer's text back")
        ids += [self._eos_token_id] if reason == "stop" else []
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
        rows = [self._entries(position, ids[position], row, answer) for position, row in enumerate(answer.tops)]
        if reason == "stop" and (not ids or ids[-1] not in self.sampling.stop_token_ids):
            # the endpoint does not say how likely the end was: no entries, and all the mass in the tail
            ids, logprobs, rows = [*ids, self._eos_token_id], [*logprobs, 0.0], [*rows, []]
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
            raise UnusableAnswerError(answer.problem or "the answer has no log-probs")
        found = [(token, self.table.find(token.text, token.data)) for token in answer.tokens]
        if found and self._is_hidden_end(found[-1][0], answer):
            found[-1] = found[-1][0], self._eos_token_id
        for token, token_id in found:
            if token_id is None:
                raise UnusableAnswerError(f"{token.text!r} is not one token of the tokenizer")
        ids = [int(token_id) for _, token_id in found if token_id is not None]
        # some endpoints show special tokens inside of an answer; none shows its end
        inner = ids[:-1] if ids and ids[-1] in self.sampling.stop_token_ids else ids
        texts = self.table.text(ids), self.table.text(inner, with_special=True)
        if not any(_same(text, written, answer) for text in texts for written in (answer.text, " " + answer.text)):
            raise UnusableAnswerError("the tokens do not give the answer's text back")
        if answer.completion_tokens is not None and answer.completion_tokens - len(ids) not in (0, 1):
            raise UnusableAnswerError(f"log-probs of {len(ids)} tokens, and the answer has {answer.completion_tokens}")
        if len(answer.tops) != len(ids):
            raise UnusableAnswerError(f"the most likely tokens of {len(answer.tops)} of {len(ids)} positions")
        return ids

    def _check_end(self, ids: list[int], answer: Answer, reason: FinishReason) -> None:
        stops, limit = self.sampling.stop_token_ids, self.sampling.max_new_tokens
        if any(token in stops for token in ids[:-1]):
            raise UnusableAnswerError("the answer continues after its end token")
        ended = bool(ids) and ids[-1] in stops
        if reason == "length" and (ended or (self.limits_are_known and len(ids) != limit)):
            raise UnusableAnswerError(f"the answer was cut after {len(ids)} tokens, not {limit}")
        if reason == "stop" and not ended and self.shows_ends:
            raise UnusableAnswerError("the answer stops without an EOS of the tokenizer")
        if self.limits_are_known and len(ids) + (reason == "stop" and not ended) > limit:
            raise UnusableAnswerError(f"the answer has more than {limit} tokens")

    def _is_hidden_end(self, token: WrittenToken, answer: Answer) -> bool:
        """Whether `token`, which is the last of an answer, is the EOS: some endpoints write it as an empty text."""
        return not token.text and not token.data and end_of(answer) == "stop"

    def _entries(self, position: int, own: int, row: list[WrittenToken], answer: Answer) -> list[tuple[int, float]]:
        """Ids and log-probs in rank order, up to the first token that cannot be identified.

        An own token that comes last is left out where it may not be among the most likely ones: completions add it to
        them, and vLLM's chat puts it in place of the last.
        """
        assert self.table is not None
        if self.options.top_k == 0:
            return []
        # several tokens that are no UTF-8 may have become one
        unclear = not self.limits_are_known or any(REPLACEMENT in token.text for token in row)
        if len(row) < self.options.top_k and not unclear:
            raise UnusableAnswerError(f"position {position} has {len(row)} log-probs, not {self.options.top_k}")
        if any(np.isnan(token.logprob) or token.logprob > _MASS_TOLERANCE for token in row):
            raise UnusableAnswerError(f"a log-prob at position {position} is not a number <= 0")
        if (mass := float(np.exp([token.logprob for token in row]).sum())) > 1 + _MASS_TOLERANCE:
            raise UnusableAnswerError(f"the probabilities at position {position} sum to {mass:.4f}")
        ranked = sorted(
            (token for token in row if token.logprob > LOWEST_SENT_LOGPROB), key=lambda token: -token.logprob
        )
        entries: list[tuple[int, float]] = []
        for token in ranked:
            token_id = self.table.find(token.text, token.data)
            if position == len(answer.tops) - 1 and own == self._eos_token_id and self._is_hidden_end(token, answer):
                token_id = own
            if token_id is None:
                break
            entries.append((token_id, min(token.logprob, 0.0)))
        may_be_extra = len(row) > self.options.top_k or answer.api == "chat"
        if may_be_extra and len(entries) > 1 and len(entries) == len(row) and entries[-1][0] == own:
            entries.pop()
        if not entries:
            raise UnusableAnswerError(f"the most likely token at position {position} is not one token of the tokenizer")
        if len({token for token, _ in entries}) < len(entries):
            raise UnusableAnswerError(f"a token is twice among the most likely ones at position {position}")
        return entries


def _same(text: str, written: str, answer: Answer) -> bool:
    if end_of(answer) == "length":  # perhaps in the middle of a character
        return text.rstrip(REPLACEMENT) == written.rstrip(REPLACEMENT)
    return text == written
