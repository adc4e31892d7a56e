"""JSON to and from vLLM's completion endpoint (checked against vLLM 0.32)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from dpkd.teacher_cache.engines.engine import Sampling
from dpkd.teacher_cache.engines.server.http import NoAnswerError
from dpkd.teacher_cache.engines.top_k import LOWEST_SENT_LOGPROB

#: exceptions that a malformed answer raises
MALFORMED = (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError)


def generation_body(ids: list[int], seed: int, sampling: Sampling, top_k: int) -> dict[str, Any]:
    """A request to continue the prompt `ids` and return the `top_k` most likely tokens of each new position."""
    return {
        "prompt": ids,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed if sampling.temperature > 0 else None,
        # otherwise the server adds the stop ids of its generation config
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,
        "logprobs": top_k,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        # neutral values: the server takes absent ones from the model's generation config
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def scoring_body(ids: list[int], top_k: int) -> dict[str, Any]:
    """A request for the log-probs of `ids` and the `top_k` most likely tokens of each position."""
    return {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}  # vLLM refuses 0 tokens


def to_ints(ids: Sequence[int]) -> list[int]:
    """Ids as Python integers: JSON cannot encode those of numpy."""
    return [int(token) for token in ids]


def first_choice(content: bytes) -> dict[str, Any]:
    """The answer in a response's body; raises `NoAnswerError` if the server aborted the request."""
    choice = json.loads(content)["choices"][0]
    if choice["finish_reason"] == "abort":
        raise NoAnswerError("broken", "the server aborted the request")  # it is stopping
    return choice


@dataclass(frozen=True, slots=True)
class LogprobTable:
    """The log-probs of T positions as a server sends them.

    `own_T` is the log-prob of each position's own token. `counts_T` is the number of entries at each position; their
    ids and log-probs are concatenated. A position has K entries, or K + 1 if its own token, which comes first, is not
    one of the top K.
    """

    own_T: np.ndarray
    counts_T: np.ndarray
    ids_E: np.ndarray
    logprobs_E: np.ndarray

    @classmethod
    def of_generation(cls, choice: dict[str, Any]) -> LogprobTable:
        """Log-probs of the new positions in an answer to `generation_body`."""
        rows = choice["logprobs"]["top_logprobs"]
        return cls._of(
            choice["logprobs"]["token_logprobs"],
            rows,
            [token.removeprefix("token_id:") for token in chain.from_iterable(rows)],
            list(chain.from_iterable(row.values() for row in rows)),
        )

    @classmethod
    def of_scoring(cls, choice: dict[str, Any], first_position: int, ids: list[int]) -> LogprobTable:
        """Log-probs of `ids`, which start at `first_position`, in an answer to `scoring_body`."""
        rows = choice["prompt_logprobs"][first_position:]
        return cls._of(
            [row[str(token)]["logprob"] for row, token in zip(rows, ids, strict=True)],
            rows,
            list(chain.from_iterable(rows)),
            [entry["logprob"] for row in rows for entry in row.values()],
        )

    @classmethod
    def _of(cls, own: list[float], rows: list[dict[str, Any]], ids: list[str], logprobs: list[float]) -> LogprobTable:
        return cls(
            own_T=_to_logprobs(own),
            counts_T=np.array([len(row) for row in rows], np.int64),
            ids_E=np.array([int(token) for token in ids], np.int64),
            logprobs_E=_to_logprobs(logprobs),
        )

    def ranked(self, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `top_k` most likely ids of each position in rank order, [T, K], and their log-probs."""
        if len(self.counts_T) and self.counts_T.min() < top_k:
            raise ValueError(f"a position has {self.counts_T.min()} entries, expected {top_k}")
        filled_TW = np.arange(top_k + 1) < self.counts_T[:, None]
        ids_TW = np.zeros(filled_TW.shape, np.int64)
        logprobs_TW = np.full(filled_TW.shape, -np.inf, np.float32)
        ids_TW[filled_TW], logprobs_TW[filled_TW] = self.ids_E, self.logprobs_E
        order_TK = np.argsort(-logprobs_TW, axis=1, kind="stable")[:, :top_k]
        return np.take_along_axis(ids_TW, order_TK, axis=1), np.take_along_axis(logprobs_TW, order_TK, axis=1)


def _to_logprobs(values: list[float]) -> np.ndarray:
    logprobs = np.array(values, np.float32)
    logprobs[logprobs <= LOWEST_SENT_LOGPROB] = -np.inf
    return logprobs
