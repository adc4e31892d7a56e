"""The transformers engine: the reference that vLLM is held to, and the engine of small machines without it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from dpkd.core.devices import choose_device
from dpkd.core.errors import UserError, first_line
from dpkd.teacher_cache.engines.decoding import left_padded, next_inputs
from dpkd.teacher_cache.engines.engine import (
    EngineOptions,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
    is_out_of_memory,
)
from dpkd.teacher_cache.engines.top_k import from_top_k

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

_GENERATE_BATCH = 16
_SCORE_BATCH = 4  # the reference builds full logits over the response: [4, T, V] float32


class TransformersEngine:
    """A causal language model run by transformers; what is drawn for a request depends on its seed alone."""

    name = "transformers"

    def __init__(self, model: ModelSource, options: EngineOptions) -> None:
        self._device = choose_device(options.device)
        self._model: Any = model.load(options.dtype).eval()
        self._model.to(self._device)
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._options = options
        self.vocab_size = model.vocab_size

    def generate(
        self, requests: Iterable[GenerateRequest], sampling: Sampling
    ) -> Iterator[EngineResult | FailedRequest]:
        """See `Engine.generate`."""
        for batch in _batched(requests, _GENERATE_BATCH):
            yield from self._answered(batch, lambda part: self._generate_batch(part, sampling))

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        """See `Engine.score`."""
        for batch in _batched(requests, _SCORE_BATCH):
            yield from self._answered(batch, self._score_batch)

    def _answered(
        self, batch: list[Any], answer: Callable[[list[Any]], list[EngineResult]]
    ) -> Iterator[EngineResult | FailedRequest]:
        """The answers of a batch; where it fails, of its requests one by one, so that the culprit is known."""
        try:
            with torch.inference_mode():
                results = answer(batch)
        except (RuntimeError, IndexError, ValueError) as error:
            if is_out_of_memory(error):
                raise UserError(
                    f"the engine ran out of memory: {first_line(error)}",
                    advice="Choose --engine vllm, or lower --max-new-tokens or --top-k; what is committed is kept",
                ) from error
            failure = error
        else:
            yield from results
            return
        if len(batch) == 1:
            yield FailedRequest(batch[0].index, f"the model fails on it: {first_line(failure)}")
            return
        for request in batch:
            yield from self._answered([request], answer)

    def _generate_batch(self, batch: list[GenerateRequest], sampling: Sampling) -> list[EngineResult]:
        inputs = left_padded(
            [list(request.prompt_ids) for request in batch], self._device, takes_positions=self._takes_positions
        )
        draws = [np.random.Generator(np.random.PCG64(request.seed)) for request in batch]
        steps: list[_Step] = []
        running_B = torch.ones(len(batch), dtype=torch.bool, device=self._device)
        stop_ids = torch.tensor(sampling.stop_token_ids, device=self._device)
        for _ in range(sampling.max_new_tokens):
            output = self._model(**inputs, use_cache=True)
            logprobs_BV = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
            token_B = _draw(logprobs_BV, sampling, draws)
            steps.append(_Step.take(logprobs_BV, token_B, self._options.top_k))
            running_B = running_B & ~torch.isin(token_B, stop_ids)
            if not running_B.any():
                break
            inputs = next_inputs(inputs, token_B, output.past_key_values)
        results = []
        for row, request in enumerate(batch):
            ids = [int(step.token_B[row]) for step in steps]
            stop = next((i + 1 for i, token in enumerate(ids) if token in sampling.stop_token_ids), None)
            table = [step.row(row) for step in steps[: stop or len(steps)]]
            results.append(self._result(request.index, table, "stop" if stop else "length"))
        return results

    def _score_batch(self, batch: list[ScoreRequest]) -> list[EngineResult]:
        responses = [list(map(int, request.response_ids)) for request in batch]
        inputs = left_padded(
            [[*map(int, request.prompt_ids), *ids] for request, ids in zip(batch, responses, strict=True)],
            self._device,
            takes_positions=self._takes_positions,
        )
        longest = max(map(len, responses))
        # left padding lines the ends up: the logits of the last `longest + 1` columns predict every response
        logits_BTV = self._model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
        results = []
        for row, (request, ids) in enumerate(zip(batch, responses, strict=True)):
            logprobs_TV = torch.log_softmax(logits_BTV[row, longest - len(ids) :].float(), dim=-1)
            step = _Step.take(logprobs_TV, torch.tensor(ids, device=self._device), self._options.top_k)
            results.append(self._result(request.index, [step.row(i) for i in range(len(ids))], "stop"))
        return results

    def _result(self, index: int, table: list[tuple[int, float, np.ndarray, np.ndarray]], reason: Any) -> EngineResult:
        ids = np.array([row[0] for row in table], np.int32)
        logprobs = np.array([row[1] for row in table], np.float32)
        distributions = None
        if self._options.top_k and len(table):
            top_ids, top_logprobs = np.stack([row[2] for row in table]), np.stack([row[3] for row in table])
            distributions = from_top_k(top_ids, top_logprobs, ids, logprobs, self.vocab_size, self._options.top_mass)
        return EngineResult(index, ids, reason, logprobs, distributions)

    def close(self) -> None:
        """Drop the model."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Step:
    """What is kept of one [B, V] table of log-probs: the chosen token and the top K of each row, on the CPU."""

    def __init__(self, token_B: np.ndarray, logprob_B: np.ndarray, ids_BK: np.ndarray, logprobs_BK: np.ndarray) -> None:
        self.token_B, self.logprob_B, self.ids_BK, self.logprobs_BK = token_B, logprob_B, ids_BK, logprobs_BK

    @classmethod
    def take(cls, logprobs_BV: torch.Tensor, token_B: torch.Tensor, top_k: int) -> _Step:
        chosen_B = logprobs_BV.gather(1, token_B[:, None])[:, 0]
        top = torch.topk(logprobs_BV, top_k, dim=1)
        return cls(token_B.cpu().numpy(), chosen_B.cpu().numpy(), top.indices.cpu().numpy(), top.values.cpu().numpy())

    def row(self, index: int) -> tuple[int, float, np.ndarray, np.ndarray]:
        return (
            int(self.token_B[index]),
            float(self.logprob_B[index]),
            self.ids_BK[index],
            self.logprobs_BK[index],
        )


def _draw(logprobs_BV: torch.Tensor, sampling: Sampling, draws: list[np.random.Generator]) -> torch.Tensor:
    """One token a row: the arg-max at temperature 0, else the inverse cumulative distribution at a uniform draw.

    The cumulative sum runs in vocabulary order: rank order would swap near-ties when another batching moves a logit by
    a rounding, and with them the tokens that are drawn.
    """
    if sampling.temperature == 0:
        return logprobs_BV.argmax(dim=1)
    probs_BV = torch.softmax(logprobs_BV.double() / sampling.temperature, dim=1)
    if sampling.top_p < 1:
        ranked_BV, order_BV = probs_BV.sort(dim=1, descending=True)
        # nucleus: a token stays when the mass before it is below top_p; the first one always does
        outside_BV = ranked_BV.cumsum(dim=1) - ranked_BV >= sampling.top_p
        probs_BV = probs_BV.masked_fill(torch.zeros_like(outside_BV).scatter(1, order_BV, outside_BV), 0.0)
    cumulative_BV = probs_BV.cumsum(dim=1)
    uniform_B = torch.tensor([draw.random() for draw in draws], dtype=torch.float64, device=probs_BV.device)
    token_B = torch.searchsorted(cumulative_BV, (uniform_B * cumulative_BV[:, -1])[:, None], right=True)
    return token_B[:, 0].clamp(max=probs_BV.shape[1] - 1)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(items)
    while batch := list(itertools.islice(source, size)):
        yield batch
