"""What draws the student's responses while it trains.

A draw is a pure function of weights, prompt and seed: every row has random numbers of its own, so that neither its
neighbours in a batch nor the trainer's generator matter, and the trainer's is not touched.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dpkd.core.errors import UserError, first_line
from dpkd.teacher_cache.engines.decoding import decode, left_padded
from dpkd.teacher_cache.engines.engine import FinishReason, GenerateRequest, Sampling, is_out_of_memory
from dpkd.teacher_cache.engines.open import resolve_engine

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource
    from dpkd.distill.options.train import TrainConfig

#: sequences that are drawn together
DRAW_BATCH = 32


class DrawCancelledError(Exception):
    """The draw was given up because the run ends."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A response of the student: ids with their EOS. `index` is that of its request."""

    index: int
    response_ids: np.ndarray
    finish_reason: FinishReason


class Sampler(Protocol):
    """Draws with the weights that it was given last."""

    def refresh(self, model: nn.Module) -> None:
        """Take over the weights of `model` as they are now; no draw may be under way."""
        ...

    def draw(self, requests: Sequence[GenerateRequest], cancelled: threading.Event) -> Iterator[Drawn]:
        """A response to each request, in any order, batch by batch.

        Raises `DrawCancelledError` soon after `cancelled` is set.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def sampling_of(config: TrainConfig, stop_token_ids: Sequence[int], max_new_tokens: int) -> Sampling:
    """How `config` has responses drawn."""
    return Sampling(config.sample_temperature, config.sample_top_p, max_new_tokens, tuple(stop_token_ids))


class TransformersSampler:
    """Draws with the trained model itself, or (with `copies`) with a copy of it that `refresh` brings up to date.

    Args:
        num_tokens: ids from here on pad the vocabulary and are never drawn.
        autocast: the number type of the forward pass, as in training; None leaves it to the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        *,
        num_tokens: int,
        device: torch.device,
        copies: bool,
        autocast: torch.dtype | None = None,
        batch_size: int = DRAW_BATCH,
    ) -> None:
        self._model: Any = copy.deepcopy(model).eval() if copies else model
        self._copies = copies
        self._sampling, self._num_tokens, self._device = sampling, num_tokens, device
        self._autocast, self._batch_size = autocast, batch_size

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """See `Sampler.refresh`."""
        if not self._copies:
            return
        held = self._model.state_dict()
        for name, value in model.state_dict().items():
            held[name].copy_(value)

    def draw(self, requests: Sequence[GenerateRequest], cancelled: threading.Event) -> Iterator[Drawn]:
        """See `Sampler.draw`."""
        # prompts of like length together: less padding
        ordered = sorted(requests, key=lambda request: len(request.prompt_ids))
        for start in range(0, len(ordered), self._batch_size):
            yield from self._draw_batch(ordered[start : start + self._batch_size], cancelled)

    def _draw_batch(self, batch: Sequence[GenerateRequest], cancelled: threading.Event) -> list[Drawn]:
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), self._in_autocast():
                return self._decode(batch, cancelled)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"drawing the student's responses ran out of memory: {first_line(error)}",
                found=f"{len(batch)} responses of up to {self._sampling.max_new_tokens} tokens",
                advice="Lower sample_max_new_tokens, or the memory that training takes (--batch-size)",
            ) from error
        finally:
            self._model.train(was_training)

    def _in_autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._autocast)

    def _decode(self, batch: Sequence[GenerateRequest], cancelled: threading.Event) -> list[Drawn]:
        def forward(inputs: dict[str, Any]) -> tuple[Tensor, Any]:
            if cancelled.is_set():
                raise DrawCancelledError
            output = self._model(**inputs, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1, : self._num_tokens], output.past_key_values

        prompts = left_padded([request.prompt_ids for request in batch], self._model, self._device)
        responses = decode(forward, prompts, [request.seed for request in batch], self._sampling)
        return [
            Drawn(request.index, np.array(ids, np.int32), reason)
            for request, (ids, reason) in zip(batch, responses, strict=True)
        ]

    def close(self) -> None:
        """See `Sampler.close`."""
        self._model = None


def open_sampler(
    config: TrainConfig,
    student: ModelSource,
    model: nn.Module,
    device: torch.device,
    sampling: Sampling,
    max_length: int,
) -> Sampler:
    """The sampler of `config`, with the weights of `model`. `max_length`: longest prompt and response, in tokens."""
    if config.sampler == "vllm":
        resolve_engine("vllm")
        from dpkd.distill.live.vllm_sampler import VllmSampler, check_vllm_sampler

        check_vllm_sampler(config)
        return VllmSampler(student, sampling, max_length=max_length, dtype=config.dtype)
    return TransformersSampler(
        model,
        sampling,
        num_tokens=len(student.tokenizer),
        device=device,
        copies=config.staleness > 0,
        autocast=torch.bfloat16 if config.dtype == "bfloat16" else None,
    )
