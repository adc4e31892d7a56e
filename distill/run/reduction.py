"""Sums over micro-batches and ranks, and the means of a step or of a validation."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from dpkd.distill.objectives.objective import METRICS, StepSums


def all_reduce_sums(accelerator: Accelerator, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums by key over this rank's micro-batches and over all ranks."""
    summed = {key: sum(part[key] for part in parts) for key in parts[0]}
    if accelerator.num_processes == 1:
        return summed
    values = torch.tensor(list(summed.values()), dtype=torch.float64, device=accelerator.device)
    reduced = accelerator.reduce(values, reduction="sum").tolist()
    return dict(zip(summed, reduced, strict=True))


def step_means(
    accelerator: Accelerator, sums: list[StepSums], counts: dict[str, int], weights: dict[str, float]
) -> dict[str, float | None]:
    """Every term (`loss_NAME`), their weighted sum `loss`, and every metric; None for what is not defined.

    `counts` are those of the terms over all micro-batches and ranks.
    """
    totals = {f"loss_{name}": sum(float(part.terms[name].detach()) for part in sums) for name in sums[0].terms}
    totals |= {name: sum(float(part.metrics[name][0]) for part in sums) for name in sums[0].metrics}
    summed = all_reduce_sums(accelerator, [totals])
    metric_counts = all_reduce_sums(
        accelerator, [{name: count for name, (_, count) in part.metrics.items()} for part in sums]
    )
    divisors = {f"loss_{name}": count for name, count in counts.items()} | metric_counts
    means = {name: value / divisors[name] for name, value in summed.items()}
    complete = all(f"loss_{name}" in means for name in weights)
    loss = sum(weight * means[f"loss_{name}"] for name, weight in weights.items()) if complete else None
    return {"loss": loss, **dict.fromkeys(METRICS), **means}
