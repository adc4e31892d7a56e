"""How much of the gradient each term of an objective makes, measured where the student's hidden states enter the head.

There the gradients of all terms meet, and reaching it takes a backward pass of the head alone: the layers keep nothing
for it, and no parameter's gradient is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.objectives.objective import Objective
from dpkd.distill.objectives.statistics import Statistic
from dpkd.distill.objectives.student_forward import StudentScorer, hidden_at


def gradient_norms(objective: Objective, scorer: StudentScorer, micro_batch: MicroBatch) -> dict[str, float]:
    """Norm of the gradient of each weighted term, on one micro-batch.

    Each term is divided by its count in the micro-batch; one that has nothing to compare is left out.
    """
    inputs: list[Tensor] = []

    def score(*, fields: dict[str, Tensor], statistics: Sequence[Statistic], **sequences: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            hidden_TD = hidden_at(scorer.model, **sequences).float()
        inputs.append(hidden_TD.requires_grad_())
        return scorer.evaluate(hidden_TD, fields, statistics)

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        sums = objective(score, micro_batch)
    counts = objective.counts(micro_batch)
    norms = {}
    for name, total in sums.terms.items():
        loss = objective.weights[name] * total / counts[name]
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        norms[name] = float(sum(part.pow(2).sum() for part in gradients if part is not None)) ** 0.5
    return norms


def preference_share(norms: dict[str, float]) -> float | None:
    """The share of the preference in the sum of the norms; None without a preference, or with nothing else."""
    if "dpkd" not in norms or len(norms) == 1 or not (total := sum(norms.values())):
        return None
    return norms["dpkd"] / total
