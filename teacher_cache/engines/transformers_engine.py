"""The transformers engine: the reference for vLLM's numbers, and the engine of machines without vLLM."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dpkd.core.devices import choose_device, is_out_of_memory
from dpkd.core.errors import UserError, first_line
from dpkd.teacher_cache.engines.decoding import decode, left_padded
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineOptions,
    EngineResult,
    FailedRequest,
    FinishReason,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.engines.top_k import build_result

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

# most requests at once on a CPU, where larger batches take longer per token; a GPU takes max_num_seqs, and a quarter of
# it for scoring
_GENERATE_BATCH = 16
_SCORE_BATCH = 4
#: scoring builds full logits over the responses [B, T, V]: at most so many values, 4 GB in float32, unless of one row
_MOST_LOGITS = 2**30


class BatchSizes(NamedTuple):
    """Requests in a batch that is decoded, and in one that is scored."""

    generated: int
    scored: int


def batch_sizes(device: torch.device, most: int) -> BatchSizes:
    """The batches of this engine on `device`, where `most` requests may run at the same time."""
    if device.type == "cpu":
        return BatchSizes(min(_GENERATE_BATCH, most), min(_SCORE_BATCH, most))
    return BatchSizes(most, max(most // 4, 1))


class TransformersEngine(Engine):
    """A causal language model run by transformers. A response depends on its request and seed alone."""

    name = "transformers"

    def __init__(self, model: ModelSource, options: EngineOptions) -> None:
        self._device = choose_device(options.device)
        self._model: Any = model.load(options.dtype).eval()
        self._model.to(self._device)
        self._options = options
        self._batch = batch_sizes(self._device, options.max_num_seqs)
        self.vocab_size = model.vocab_size

    def generate(
        self, requests: Iterable[GenerateRequest], sampling: Sampling
    ) -> Iterator[EngineResult | FailedRequest]:
        for batch in _batched(requests, self._batch.generated):
            yield from self._answered(batch, lambda part: self._generate_batch(part, sampling))

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        for batch in batches_to_score(requests, self._batch.scored, _MOST_LOGITS // self.vocab_size):
            yield from self._answered(batch, self._score_batch)

    def _answered(
        self, batch: list[Any], answer: Callable[[list[Any]], list[EngineResult]]
    ) -> Iterator[EngineResult | FailedRequest]:
        """The results of a batch. If it fails, its requests run one by one to find the one that fails."""
        results: Iterable[EngineResult | FailedRequest]
        try:
            with torch.inference_mode():
                results = answer(batch)
        except (RuntimeError, IndexError, ValueError) as error:
            if is_out_of_memory(error):
                raise UserError(
                    f"the engine ran out of memory: {first_line(error)}",
                    advice="Choose --engine vllm, or lower --max-num-seqs or --max-new-tokens; shards are kept",
                ) from error
            if len(batch) == 1:
                results = [FailedRequest(batch[0].index, f"the model fails on it: {first_line(error)}")]
            else:
                results = itertools.chain.from_iterable(self._answered([request], answer) for request in batch)
        yield from results

    def _generate_batch(self, batch: list[GenerateRequest], sampling: Sampling) -> list[EngineResult]:
        tables: list[list[Any]] = [[] for _ in batch]

        def keep(logprobs_BV: torch.Tensor, token_B: torch.Tensor, rows: list[int]) -> None:
            table_B = _Table.take(logprobs_BV, token_B, self._options.top_k)
            for row, *position in zip(rows, *table_B, strict=True):
                tables[row].append(position)

        responses = decode(
            self._next_logprobs,
            left_padded([list(request.prompt_ids) for request in batch], self._model, self._device),
            [request.seed for request in batch],
            sampling,
            keep,
        )
        return [
            self._result(
                request.index,
                np.array(drawn.ids, np.int32),
                drawn.finish_reason,
                _Table(*map(np.stack, zip(*positions[: len(drawn.ids)], strict=True))),
            )
            for request, positions, drawn in zip(batch, tables, responses, strict=True)
        ]

    def _next_logprobs(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Log-probs of the next token [B, V] from a model's inputs, and its key-value cache."""
        output = self._model(**inputs, use_cache=True, logits_to_keep=1)
        return torch.log_softmax(output.logits[:, -1].float(), dim=-1), output.past_key_values

    def _score_batch(self, batch: list[ScoreRequest]) -> list[EngineResult]:
        responses = [np.asarray(request.response_ids, np.int32) for request in batch]
        sequences = [[*map(int, request.prompt_ids), *ids] for request, ids in zip(batch, responses, strict=True)]
        longest = max(map(len, responses))
        # left padding aligns the ends, so the logits of the last `longest + 1` columns predict every response
        logits_BTV = self._model(
            **left_padded(sequences, self._model, self._device), use_cache=False, logits_to_keep=longest + 1
        ).logits[:, :-1]
        results = []
        for row, (request, ids) in enumerate(zip(batch, responses, strict=True)):
            logprobs_TV = torch.log_softmax(logits_BTV[row, longest - len(ids) :].float(), dim=-1)
            ids_T = torch.from_numpy(ids.astype(np.int64)).to(self._device)
            results.append(
                self._result(request.index, ids, "stop", _Table.take(logprobs_TV, ids_T, self._options.top_k))
            )
        return results

    def _result(self, index: int, ids_T: np.ndarray, reason: FinishReason, table: _Table) -> EngineResult:
        return build_result(index, ids_T, reason, *table, self.vocab_size, self._options)

    def close(self) -> None:
        """Drop the model."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class _Table(NamedTuple):
    """Of T positions: the log-prob of the chosen token, and the top K in rank order, on the CPU."""

    logprobs_T: np.ndarray
    ids_TK: np.ndarray
    logprobs_TK: np.ndarray

    @classmethod
    def take(cls, logprobs_TV: torch.Tensor, ids_T: torch.Tensor, top_k: int) -> _Table:
        chosen_T = logprobs_TV.gather(1, ids_T[:, None])[:, 0]
        top = torch.topk(logprobs_TV, top_k, dim=1)
        return cls(chosen_T.cpu().numpy(), top.indices.cpu().numpy(), top.values.cpu().numpy())


def batches_to_score(requests: Iterable[ScoreRequest], rows: int, positions: int) -> Iterator[list[ScoreRequest]]:
    """`requests` in batches of at most `rows`, and of `positions` when the responses are padded to the longest one.

    A response that is longer than that is a batch of its own.
    """
    batch: list[ScoreRequest] = []
    longest = 0
    for request in requests:
        longest = max(longest, len(request.response_ids) + 1)
        if batch and (len(batch) == rows or (len(batch) + 1) * longest > positions):
            yield batch
            batch, longest = [], len(request.response_ids) + 1
        batch.append(request)
    if batch:
        yield batch


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(items)
    while batch := list(itertools.islice(source, size)):
        yield batch
