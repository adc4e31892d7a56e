"""Draws by a vLLM engine in the training process, whose weights are replaced before each block (tested with 0.32).

The engine uses torch's global generator even where every request has a seed. The trainer uses it too, so draws and
training cannot run at the same time (staleness 0), and the generator's state is restored after each draw.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dpkd.core.models import ModelSource
from dpkd.distill.live.store import Drawn
from dpkd.teacher_cache.engines.engine import EngineOptions, GenerateRequest, Sampling, results_only
from dpkd.teacher_cache.engines.vllm.engine import VllmEngine

#: share of a GPU's memory that the engine takes; training needs the rest
_GPU_SHARE = "0.3"


class VllmSampler(VllmEngine):
    """A `Sampler`. The engine loads the files of `student`; `refresh` gives it the trained weights.

    Args:
        max_length: longest prompt and response, in tokens.
        dtype: of the engine's weights.
    """

    def __init__(self, student: ModelSource, sampling: Sampling, *, max_length: int, dtype: str) -> None:
        # in this process, where weights can be replaced without a copy on disk
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        num_tokens = len(student.tokenizer)
        memory = {"gpu_memory_utilization": _GPU_SHARE} if torch.cuda.is_available() else {}
        with torch.random.fork_rng():
            super().__init__(student, EngineOptions(max_length=max_length, top_k=0, dtype=dtype, engine_args=memory))
        self._sampling = sampling
        # higher ids are padding of the vocabulary
        self.allowed_token_ids = list(range(num_tokens)) if num_tokens < student.vocab_size else None

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        weights = {name: value.detach() for name, value in model.state_dict().items()}
        # not `model.load_weights`: on a CPU, vLLM has packed the matrices, and only a reload packs the new ones
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})

    def draw(self, requests: Sequence[GenerateRequest], cancelled: threading.Event) -> Iterator[Drawn]:
        """All responses are drawn before the first one is yielded."""
        drawn = []
        with torch.random.fork_rng():
            for result in results_only(self.generate(requests, self._sampling)):
                if cancelled.is_set():
                    raise KeyboardInterrupt
                logprobs = result.logprobs_T.tolist()
                drawn.append(Drawn(result.index, result.response_ids, result.finish_reason, logprobs))
        yield from drawn
