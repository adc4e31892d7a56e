"""DistiLLM-2: its value on full logits in float64, its skew and schedule by hand, and where it ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import Batch
from dpkd.distill.batches.collate import collate
from dpkd.distill.losses.divergence import forward_kl, skew_by_gap
from dpkd.distill.objectives.objective import chosen_reward, response_metrics
from dpkd.distill.objectives.sample_terms import Contrast
from dpkd.distill.objectives.statistics import Outcomes
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import TrainingRow
from dpkd.teacher_cache.engines.engine import Distributions
from dpkd.teacher_cache.store.rows import CachedRow

VOCAB = 7


def logits(seed: int, positions: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(positions, VOCAB)) * 1.5


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def row(tokens: list[int], teacher_logits: np.ndarray) -> CachedRow:
    """A response with the teacher's whole distribution at each position."""
    log_p = log_softmax(teacher_logits)
    order = np.argsort(-log_p, axis=1)
    top = Distributions(
        np.full(len(tokens), VOCAB, np.int32),
        order.reshape(-1).astype(np.int32),
        np.take_along_axis(log_p, order, axis=1).reshape(-1).astype(np.float32),
        np.full(len(tokens), -np.inf, np.float32),
    )
    scores = log_p[np.arange(len(tokens)), tokens].astype(np.float32)
    return CachedRow("r", 0, "teacher", "stop", np.array([1]), np.array(tokens), scores, top)


def world() -> tuple[Batch, np.ndarray, np.ndarray]:
    """Two pairs of responses: the batch, and the logits of teacher and student at all of its positions."""
    responses = [[2, 3, 0], [4, 0], [5, 5, 1, 0], [6, 0]]  # two of the teacher, two of the student
    lengths = [len(response) for response in responses]
    teacher, student = logits(1, sum(lengths)), logits(2, sum(lengths))
    bounds = np.cumsum([0, *lengths])
    rows = [row(ids, teacher[bounds[i] : bounds[i + 1]]) for i, ids in enumerate(responses)]
    pairs = [TrainingRow(rows[0], rows[2]), TrainingRow(rows[1], rows[3])]
    return collate(pairs, with_distributions=True, of_rejected=True), teacher, student


def loss(batch: Batch, teacher: Tensor, student: Tensor, **options: Any) -> Tensor:
    settings = {"alpha": 0.1, "anchors": (None, None), "schedule": False} | options
    term = Contrast(outcomes=Outcomes("bucket", VOCAB), **settings)
    log_q_TN = student.log_softmax(1)
    values = {"log_p": teacher.log_softmax(1), "log_q": log_q_TN}
    values["target"] = log_q_TN.gather(1, batch.target_T[:, None])[:, 0]
    found = term(values, batch)
    assert found is not None
    return found.loss


def by_hand(
    batch: Batch, teacher: np.ndarray, student: np.ndarray, alpha: float, anchors: tuple[float | None, float | None]
) -> list[float]:
    """The authors' formulas with plain loops over responses, positions and tokens."""
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    means = []
    for index in range(4):
        at = np.flatnonzero(batch.row_T.numpy() == index)
        tokens = batch.target_T.numpy()[at]
        likely_p, likely_q = (
            math.exp(np.mean([logs[t, y] for t, y in zip(at, tokens, strict=True)])) for logs in (log_p, log_q)
        )
        gap = likely_p - likely_q if index < 2 else likely_q - likely_p
        skew = alpha
        anchor = anchors[index // 2]
        if anchor is not None:
            skew = min(max(1 - (1 - alpha) * anchor / (gap + 1e-5), 0.01), alpha)
        total = 0.0
        for t in at:
            for y in range(VOCAB):
                p, q = math.exp(log_p[t, y]), math.exp(log_q[t, y])
                if index < 2:
                    total += p * math.log(p / (skew * p + (1 - skew) * q))
                else:
                    total += q * math.log(q / ((1 - skew) * p + skew * q))
        means.append(total / len(at))
    return means


@pytest.mark.parametrize(
    "anchors", [(None, None), (0.001, 0.001), (0.01, 0.03), (0.1, None), (None, 0.1), (0.9, 0.9)], ids=str
)
def test_the_value_is_that_of_the_formulas(anchors: tuple[float | None, float | None]) -> None:
    batch, teacher, student = world()
    expected = by_hand(batch, teacher, student, 0.1, anchors)
    found = loss(batch, torch.tensor(teacher), torch.tensor(student), anchors=anchors)
    torch.testing.assert_close(
        found, torch.tensor(expected[:2]) + torch.tensor(expected[2:]), rtol=1e-5, atol=1e-6, check_dtype=False
    )


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 1.0), (0.25, 1.25), (0.5, 1.5), (0.9, 1.5)])
def test_the_schedule_moves_weight_to_the_students_responses(progress: float, weight: float) -> None:
    batch, teacher, student = world()
    parts = by_hand(batch, teacher, student, 0.1, (None, None))
    batch = Batch(**(vars(batch) | {"progress": progress}))
    found = loss(batch, torch.tensor(teacher), torch.tensor(student), schedule=True)
    expected = [(2 - weight) * parts[0] + weight * parts[2], (2 - weight) * parts[1] + weight * parts[3]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("length_normalize", [True, False])
def test_the_chosen_reward_is_that_of_the_teachers_responses(length_normalize: bool) -> None:
    """Eq. 29 of the two chosen responses alone, by hand; the students' responses have another sign here."""
    batch, *_ = world()
    assert batch.teacher_logprob_T is not None
    gap_T = torch.where(batch.row_T < 2, -1.0, 3.0)
    found = chosen_reward({"target": batch.teacher_logprob_T + gap_T}, batch, 0.5, length_normalize)
    sums = torch.tensor([-1.5, -1.0])  # 0.5 times 3 and 2 tokens
    torch.testing.assert_close(found["reward_chosen_sum"], sums)
    torch.testing.assert_close(found["reward_chosen"], torch.tensor([-0.5, -0.5]) if length_normalize else sums)


def test_the_gap_at_the_ends_is_that_of_the_chosen_responses_that_ended() -> None:
    batch, *_ = world()
    assert batch.teacher_logprob_T is not None
    gap_T = torch.arange(len(batch.row_T), dtype=torch.float32)  # ends of the chosen ones: positions 2 and 4
    values = {"target": batch.teacher_logprob_T - gap_T}
    torch.testing.assert_close(response_metrics(values, batch)["end_gap"], torch.tensor([-2.0, -4.0]))
    one_is_cut = Batch(**(vars(batch) | {"unfinished_B": torch.tensor([True, False, True, False])}))
    torch.testing.assert_close(response_metrics(values, one_is_cut)["end_gap"], torch.tensor([-4.0]))
    unknown_T = torch.where(gap_T == 4, 0, 6)
    unknown = Batch(**(vars(batch) | {"entry_counts_T": unknown_T}))
    torch.testing.assert_close(response_metrics(values, unknown)["end_gap"], torch.tensor([-2.0]))


def test_the_skew_by_hand() -> None:
    """(1 - skew) gap stays at (1 - alpha) anchor, within the bounds of the authors' code."""
    gap = torch.tensor([0.5, 0.2, 0.192, 0.1, -0.3])
    expected = [0.1, 0.1, 1 - 0.9 * 0.2 / 0.19201, 0.01, 0.1]
    torch.testing.assert_close(skew_by_gap(gap, 0.2, 0.1), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("anchor", [None, 0.05])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_it_ends_at_the_teacher(anchor: float | None, progress: float) -> None:
    batch, teacher, student = world()
    batch = Batch(**(vars(batch) | {"progress": progress}))
    log_p = torch.tensor(teacher).log_softmax(1)
    parameters = torch.tensor(student).requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800, eta_min=1e-4)
    for _ in range(800):
        optimizer.zero_grad()
        loss(batch, torch.tensor(teacher), parameters, anchors=(anchor, anchor), schedule=True).sum().backward()
        optimizer.step()
        schedule.step()
    assert float(forward_kl(log_p, parameters.detach().log_softmax(1)).max()) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--objective distillm2 needs --round NAME"),
        ({"round": "r0", "level": "sequence"}, "--level sequence needs a preference"),
        ({"round": "r0", "tail": "uniform"}, "too large with --tail uniform"),
        ({"round": "r0", "mix": 0.5}, "and --objective distillm2 compares two"),
        ({"round": "r0", "objective": "jsd", "skew_anchor_chosen": 0.1}, "--skew-anchor-.* goes with"),
    ],
)  # fmt: skip
def test_what_it_cannot_learn_from_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig.parse(
            {"cache": "c", "student": "s", "out": "o", "objective": "distillm2"} | options, where="a test"
        )
