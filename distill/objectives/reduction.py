"""Sums of a step or of a validation as means over all of its forward passes and ranks."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from dpkd.distill.objectives.objective import METRICS, StepSums


def whole(accelerator: Accelerator, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums by key over this rank's forward passes and over all ranks."""
    summed = {key: sum(part[key] for part in parts) for key in parts[0]}
    if accelerator.num_processes == 1:
        return summed
    values = torch.tensor(list(summed.values()), dtype=torch.float64, device=accelerator.device)
    reduced = accelerator.reduce(values, reduction="sum").tolist()
    return dict(zip(summed, reduced, strict=True))


def means(
    accelerator: Accelerator, sums: list[StepSums], counts: dict[str, int], weights: dict[str, float]
) -> dict[str, float | None]:
    """Every term (`loss_NAME`), their weighted sum `loss`, and every metric; None for what is not defined.

    `counts` are the whole step's, over all ranks.
    """
    totals = {f"loss_{name}": sum(float(part.terms[name].detach()) for part in sums) for name in sums[0].terms}
    totals |= {name: sum(float(part.metrics[name][0]) for part in sums) for name in sums[0].metrics}
    summed = whole(accelerator, [totals])
    metric_counts = whole(accelerator, [{name: count for name, (_, count) in part.metrics.items()} for part in sums])
    divided = {name: value / _count(name, counts, metric_counts) for name, value in summed.items()}
    complete = all(f"loss_{name}" in divided for name in weights)
    loss = sum(weight * divided[f"loss_{name}"] for name, weight in weights.items()) if complete else None
    return {"loss": loss, **dict.fromkeys(METRICS), **divided}


def _count(name: str, counts: dict[str, int], metric_counts: dict[str, int]) -> int:
    return metric_counts[name] if name in metric_counts else counts[name.removeprefix("loss_")]
