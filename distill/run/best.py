"""The best student so far by a validation metric, when to stop for want of a better one, and norms that stand out."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.distill.rows.row import RowSource

BEST_DIR = "best"

#: the smaller the better; of the other metrics the larger
_SMALLER = ("loss", "kld")

_SPIKE_FACTOR = 10.0
_SPIKE_WINDOW, _SPIKE_LEAST = 100, 20  # steps


@dataclass(frozen=True)
class HeldOutPrompt:
    """A validation example: its prompt's ids, and the texts that an answer is held against."""

    prompt_ids: list[int]
    references: list[str]


#: Rouge-L (0 to 100) of the student in a Hugging Face directory, on held-out prompts; text in, a score out.
EvaluateFn = Callable[[Path, Sequence[HeldOutPrompt]], float]


@dataclass
class Best:
    """The best value of `metric` so far, the step after which it was measured, and the validations since."""

    metric: str
    value: float | None = None
    step: int = 0
    num_since: int = 0

    def note(self, line: dict[str, Any]) -> bool:
        """Take note of a validation; True when it is better than all before it. A value that is equal is not.

        Raises `UserError` when the validation does not have the metric.
        """
        value = line.get(self.metric)
        if value is None:
            have = sorted(name for name, found in line.items() if found is not None and name != "step")
            raise UserError(
                "the validation does not give the best_metric",
                found=f"best_metric {self.metric}",
                expected=f"one of {', '.join(have)}",
                advice="Choose another best_metric, or leave it out",
            )
        better = self.value is None or (value < self.value if self.metric in _SMALLER else value > self.value)
        if better:
            self.value, self.step, self.num_since = float(value), int(line["step"]), 0
        else:
            self.num_since += 1
        return better

    def is_over(self, patience: int | None) -> bool:
        """Whether `patience` validations have gone by without a better one."""
        return patience is not None and self.num_since >= patience


def held_out_prompts(rows: RowSource, tokenizer: ModelSource) -> list[HeldOutPrompt]:
    """Each held-out example once, with its reference responses; with the teacher's where it has no reference."""
    prompts: dict[str, list[int]] = {}
    texts: dict[str, dict[str, list[str]]] = {}
    for group, size in enumerate(rows.group_sizes):
        for index in range(size):
            row = rows.row(group, index).chosen
            prompts[row.example_id] = [int(token) for token in row.prompt_ids]
            by_origin = texts.setdefault(row.example_id, {})
            by_origin.setdefault(row.origin, []).append(tokenizer.decode([int(token) for token in row.response_ids]))
    return [
        HeldOutPrompt(
            prompts[name], by_origin.get("reference") or [text for found in by_origin.values() for text in found]
        )
        for name, by_origin in texts.items()
    ]


class NormSpikes:
    """Finds gradient norms of more than ten times the median of the last hundred."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_SPIKE_WINDOW)

    def note(self, norm: float | None) -> str | None:
        """Take note of a step's norm (before clipping); words on it where it stands out."""
        if norm is None:
            return None
        text = None
        if len(self._norms) >= _SPIKE_LEAST:
            median = statistics.median(self._norms)
            if norm > _SPIKE_FACTOR * median:
                text = f"gradient norm {norm:.3g}, {norm / median:.0f} times the median of {len(self._norms)} steps"
        self._norms.append(norm)
        return text
