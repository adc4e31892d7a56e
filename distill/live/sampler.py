"""The seam to whatever draws the student's responses while it trains."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.distill.live.store import Drawn
from dpkd.distill.live.transformers_sampler import TransformersSampler
from dpkd.distill.options.train import TrainConfig
from dpkd.teacher_cache.engines.engine import GenerateRequest, Sampling


class Sampler(Protocol):
    """Draws with the weights of its last `refresh`. A draw is a pure function of weights, prompt and seed.

    A draw depends neither on the other rows of its batch nor on the trainer's random numbers, and does not change them.
    """

    def refresh(self, model: nn.Module) -> None:
        """Take the present weights of `model`; must not be called during a draw."""
        ...

    def draw(self, requests: Sequence[GenerateRequest], cancelled: threading.Event) -> Iterator[Drawn]:
        """A response to each request, in any order. Raises `KeyboardInterrupt` soon after `cancelled` is set."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


def open_sampler(
    config: TrainConfig,
    student: ModelSource,
    model: nn.Module,
    device: torch.device,
    max_new_tokens: int,
    max_length: int,
) -> Sampler:
    """The sampler of `config` with the weights of `model`. `max_length` is the longest prompt and response, in tokens.

    Raises `UserError` when vLLM is not installed, or cannot draw for this run.
    """
    stop = tuple(student.stop_token_ids())
    sampling = Sampling(config.sample_temperature, config.sample_top_p, max_new_tokens, stop)
    if config.sampler == "vllm":
        from dpkd.teacher_cache.engines.open import resolve_engine

        resolve_engine("vllm")
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError(
                "--sampler vllm needs the process group for itself, so it works with one process only",
                advice="Choose --sampler transformers",
            )
        from dpkd.distill.live.vllm_sampler import VllmSampler

        return VllmSampler(student, sampling, max_length=max_length, dtype=config.dtype)
    return TransformersSampler(
        model,
        sampling,
        num_tokens=len(student.tokenizer),
        device=device,
        copies=config.staleness > 0,
        autocast=torch.bfloat16 if config.dtype == "bfloat16" else None,
    )
