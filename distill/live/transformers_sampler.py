"""Draws by the trained model itself, or by a copy of it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpkd.core.devices import explained_out_of_memory
from dpkd.distill.live.store import Drawn
from dpkd.teacher_cache.engines.decoding import decode, left_padded
from dpkd.teacher_cache.engines.engine import GenerateRequest, Sampling

#: sequences that are drawn together
DRAW_BATCH = 32


class TransformersSampler:
    """A `Sampler`. Draws with `model`, or with `copies`, with a copy that `refresh` updates.

    Args:
        num_tokens: higher ids are padding of the vocabulary and are never drawn.
        autocast: dtype of the forward pass, as in training; None: the dtype of the weights.
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
        if self._copies:
            own = self._model.state_dict()
            for name, value in model.state_dict().items():
                own[name].copy_(value)

    def draw(self, requests: Sequence[GenerateRequest], cancelled: threading.Event) -> Iterator[Drawn]:
        # prompts of similar lengths together: less padding
        ordered = sorted(requests, key=lambda request: len(request.prompt_ids))
        for start in range(0, len(ordered), self._batch_size):
            yield from self._draw_batch(ordered[start : start + self._batch_size], cancelled)

    def _draw_batch(self, batch: Sequence[GenerateRequest], cancelled: threading.Event) -> list[Drawn]:
        def forward(inputs: dict[str, Any]) -> tuple[Tensor, Any]:
            if cancelled.is_set():
                raise KeyboardInterrupt
            output = self._model(**inputs, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1, : self._num_tokens], output.past_key_values

        prompts = left_padded([request.prompt_ids for request in batch], self._model, self._device)
        was_training = self._model.training
        self._model.eval()
        out_of_memory = explained_out_of_memory(
            "drawing the student's responses ran out of memory",
            found=f"{len(batch)} responses of up to {self._sampling.max_new_tokens} tokens",
            advice="Lower sample_max_new_tokens, or the memory that training takes (--batch-size)",
        )
        autocast = torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None)
        try:
            with out_of_memory, torch.no_grad(), autocast:
                responses = decode(forward, prompts, [request.seed for request in batch], self._sampling)
        finally:
            self._model.train(was_training)
        return [
            Drawn(request.index, np.array(drawn.ids, np.int32), drawn.finish_reason, drawn.logprobs)
            for request, drawn in zip(batch, responses, strict=True)
        ]

    def close(self) -> None:
        self._model = None
