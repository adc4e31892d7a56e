"""Draws by a vLLM engine in the training process, whose weights are replaced before each block (checked against 0.32).

The engine draws from torch's global generator even where every request has a seed. That is the trainer's, so draws and
training may not run at one time (staleness 0), and the generator is put back after each draw.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from dpkd.core.errors import UserError
from dpkd.distill.live.sampler import DrawCancelledError, Drawn
from dpkd.teacher_cache.engines.engine import (
    EngineOptions,
    GenerateRequest,
    Sampling,
    results_only,
)
from dpkd.teacher_cache.engines.vllm.engine import VllmEngine

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource
    from dpkd.distill.options.train import TrainConfig

#: share of a GPU's memory that the engine takes; training needs the rest
_GPU_SHARE = "0.3"


def check_vllm_sampler(config: TrainConfig) -> None:
    """Raise `UserError` for a run that a vLLM engine in the training process cannot draw for."""
    reason = None
    if config.staleness != 0:
        reason = "draws from the trainer's own random numbers, so training must wait for it"
    elif config.lora_rank is not None:
        reason = "takes whole weights, and --lora-rank trains adapters beside them"
    elif torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        reason = "needs the process group for itself, so it goes with one process"
    if reason is not None:
        advice = "Give --set staleness=0, or choose" if config.staleness != 0 else "Choose"
        raise UserError(f"--sampler vllm {reason}", advice=f"{advice} --sampler transformers")


class VllmSampler:
    """See `Sampler`. The engine starts from the files of `student`; `refresh` gives it the trained weights.

    Args:
        max_length: longest prompt and response, in tokens.
        dtype: number type of the engine's weights.
    """

    def __init__(self, student: ModelSource, sampling: Sampling, *, max_length: int, dtype: str) -> None:
        # in this process, where weights are handed over without a copy on disk
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        num_tokens = len(student.tokenizer)
        memory = {"gpu_memory_utilization": _GPU_SHARE} if torch.cuda.is_available() else {}
        options = EngineOptions(max_length=max_length, top_k=0, dtype=dtype, engine_args=memory)
        with torch.random.fork_rng():
            self.engine = _StudentEngine(student, options, num_tokens if num_tokens < student.vocab_size else None)
        self._sampling = sampling

    def refresh(self, model: nn.Module) -> None:
        """See `Sampler.refresh`."""
        with torch.no_grad():
            self.engine.load_weights({name: value.detach() for name, value in model.state_dict().items()})

    def draw(self, requests: Sequence[GenerateRequest], cancelled: threading.Event) -> Iterator[Drawn]:
        """See `Sampler.draw`; all of them are drawn before the first one is given."""
        drawn = []
        with torch.random.fork_rng():
            for result in results_only(self.engine.generate(requests, self._sampling)):
                if cancelled.is_set():
                    raise DrawCancelledError
                drawn.append(Drawn(result.index, result.response_ids, result.finish_reason))
        yield from drawn

    def close(self) -> None:
        """See `Sampler.close`."""
        self.engine.close()


class _StudentEngine(VllmEngine):
    """The engine with weights that can be replaced, drawing ids below `num_tokens` alone (None: all are tokens)."""

    def __init__(self, model: ModelSource, options: EngineOptions, num_tokens: int | None) -> None:
        super().__init__(model, options)
        self.allowed_token_ids = None if num_tokens is None else list(range(num_tokens))

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace the weights by those of a Hugging Face state dict."""
        # not `model.load_weights`: on a CPU vLLM has packed the matrices, which only a reload undoes
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
