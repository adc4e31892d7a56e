"""Two models that draw each token together: MiniLLM's teacher-mixed sampling (arXiv 2306.08543, section 2.2)."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch

from dpkd.teacher_cache.engines.engine import EngineOptions
from dpkd.teacher_cache.engines.transformers_engine import TransformersEngine

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource


class _Caches(tuple[Any, ...]):
    """The key-value caches of several models that read the same rows."""

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        """Keep these rows, as transformers' own caches do."""
        for cache in self:
            cache.batch_select_indices(rows)


class MixedEngine(TransformersEngine):
    """Draws each token from share * teacher + (1 - share) * student, both given the same prefix. Both are in memory.

    The log-probs of its results are those of this mixture. `score` is that of the student alone.
    """

    def __init__(self, student: ModelSource, teacher: ModelSource, options: EngineOptions, share: float) -> None:
        super().__init__(student, options)
        self._teacher: Any = teacher.load(options.dtype).eval()
        self._teacher.to(self._device)
        self._log_shares = math.log(share), math.log1p(-share)
        # logits of one tokenizer may be padded to different widths
        self.vocab_size = min(student.vocab_size, teacher.vocab_size)

    def _next_logprobs(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        logprobs, pasts = [], []
        models = (self._teacher, self._model)
        for model, log_share, past in zip(
            models, self._log_shares, inputs.get("past_key_values", (None, None)), strict=True
        ):
            own = {key: value for key, value in inputs.items() if key != "past_key_values"} | {"past_key_values": past}
            if "position_ids" not in inspect.signature(model.forward).parameters:
                own.pop("position_ids", None)
            elif "position_ids" not in own:
                positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
                own["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
            output = model(**own, use_cache=True, logits_to_keep=1)
            logits_BV = output.logits[:, -1, : self.vocab_size].float()
            logprobs.append(torch.log_softmax(logits_BV, dim=-1) + log_share)
            pasts.append(output.past_key_values)
        return torch.logaddexp(*logprobs), _Caches(pasts)

    def close(self) -> None:
        del self._teacher
        super().close()
