"""How much of the gradient each term of an objective makes, measured where the student's hidden states enter the head.

There the gradients of all terms meet, and reaching it takes a backward pass of the head alone: no parameter's gradient
is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.objectives.objective import Objective
from dpkd.distill.objectives.student_forward import StudentScorer


def gradient_norms(objective: Objective, scorer: StudentScorer, micro_batch: MicroBatch) -> dict[str, float]:
    """Norm of the gradient of each weighted term, on one micro-batch.

    Each term is divided by its count in the micro-batch; one that has nothing to compare is left out.
    """
    inputs: list[Tensor] = []
    head = scorer.model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            sums = objective(scorer, micro_batch)
    finally:
        hook.remove()
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
