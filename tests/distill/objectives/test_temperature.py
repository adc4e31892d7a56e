"""A temperature for distillation: exact where every token is kept, and what it means where the cache keeps some.

The tempered mass of a tail depends on its single tokens. The cache has their sum alone, so the tail is not tempered.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.distill.losses.cached_distributions import Tail, align
from dpkd.distill.losses.divergence import forward_kl
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.store.reader import TeacherCache

VOCAB = 9


def logits(seed: int) -> Tensor:
    return 1.5 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aligned(teacher: Tensor, student: Tensor, kept: int, temperature: float, tail: Tail = "bucket") -> list[Tensor]:
    log_p = teacher.log_softmax(1)
    values, ids = log_p.topk(kept)
    log_tail = torch.log1p(-values.exp().sum(1)) if kept < VOCAB else torch.tensor([-math.inf])
    entries = (ids, values, torch.tensor([kept]), log_tail)
    return list(align(student, *entries, tail, vocab_size=VOCAB, temperature=temperature))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def softmax(values: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(values / temperature)
    return powers / powers.sum()


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_with_every_token_kept_it_is_that_of_the_full_logits(temperature: float, tail: Tail) -> None:
    teacher, student = logits(1), logits(2)
    expected = kl(*(softmax(side[0].numpy(), temperature) for side in (teacher, student)))
    found = float(forward_kl(*aligned(teacher, student, VOCAB, temperature, tail)))
    assert math.isclose(found, expected, rel_tol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(2, VOCAB - 1), st.sampled_from([0.5, 2.0, 5.0]))
def test_with_some_kept_it_tempers_them_and_leaves_the_tail(seed: int, kept: int, temperature: float) -> None:
    """By the chain rule: the KL of the two masses at temperature 1, plus that of the tempered entries in their mass."""
    teacher, student = logits(seed), logits(seed + 1)
    p, q = (softmax(side[0].numpy(), 1) for side in (teacher, student))
    order = np.argsort(-p)
    top, rest = order[:kept], order[kept:]
    among = [softmax(side[0].numpy()[top], temperature) for side in (teacher, student)]
    masses = [np.array([side[top].sum(), side[rest].sum()]) for side in (p, q)]
    expected = kl(*masses) + masses[0][0] * kl(*among)
    found = float(forward_kl(*aligned(teacher, student, kept, temperature)))
    assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(2, VOCAB - 1), st.sampled_from([0.5, 1.5, 2.0, 5.0]))
def test_what_truncation_loses_is_bounded_as_documented(seed: int, kept: int, temperature: float) -> None:
    """Bounds of docs/objectives.md: of the tail's tempered mass, and of the full divergence by that of the entries."""
    teacher, student = logits(seed), logits(seed + 1)
    log_p = teacher.log_softmax(1)[0].numpy()
    order = np.argsort(-log_p)
    top, rest = order[:kept], order[kept:]
    power, n = 1 / temperature, len(rest)
    mass, least = np.exp(log_p[rest]).sum(), np.exp(log_p[top[-1]])
    sharpest, flattest = mass * least ** (power - 1), n * (mass / n) ** power
    tail = np.exp(power * log_p[rest]).sum()
    assert min(sharpest, flattest) - 1e-12 <= tail <= max(sharpest, flattest) + 1e-12
    share = tail / (tail + np.exp(power * log_p[top]).sum())
    full = kl(*(softmax(side[0].numpy(), temperature) for side in (teacher, student)))
    of_entries = float(forward_kl(*aligned(teacher, student, kept, temperature, "renormalise")))
    assert (1 - share) * of_entries <= full + 1e-9


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_teacher_stays_the_only_minimum(temperature: float) -> None:
    teacher, student = logits(3), logits(4).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        forward_kl(*aligned(teacher, student, 4, temperature)).sum().backward()
        optimizer.step()
    at_one = float(forward_kl(*aligned(teacher, student.detach(), 4, 1.0)))
    assert at_one < 1e-3


def test_gradients_are_exact_and_positions_without_entries_give_none() -> None:
    teacher, student = logits(5), logits(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: forward_kl(*aligned(teacher, x, 4, 3.0)), (student,))
    nothing = (torch.full((1, 3), -1), torch.full((1, 3), -math.inf), torch.tensor([0]), torch.tensor([0.0]))
    value = forward_kl(*align(student, *nothing, "bucket", vocab_size=VOCAB, temperature=3.0))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert float(value.detach()) == 0
    assert bool((gradient == 0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "jsd", "tail": "uniform"}, "the tail's single tokens are unknown"),
        ({"objective": "dpkd"}, "--kd-temperature needs a divergence"),
        ({"objective": "distillm2", "round": "r0"}, "--kd-temperature needs a divergence"),
    ],
)  # fmt: skip
def test_where_it_would_do_something_else_it_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig.parse({"cache": "c", "student": "s", "out": "o", "kd_temperature": 2.0} | options, where="a test")


def test_a_run_at_a_temperature_has_the_loss_of_full_logits(
    toy_cache: Path, toy_teacher: Path, toy_student: Path, tmp_path: Path
) -> None:
    """The first step over all teacher rows, by the chain rule over the 16 kept tokens and the tail, in float64."""
    options = {"student": str(toy_student), "device": "cpu", "tracker": "none", "steps": 1, "validation_examples": 0}
    train(
        TrainConfig(
            cache=str(toy_cache), out=tmp_path, objective="forward-kl", kd_temperature=3.0, responses="teacher",
            batch_size=20, **options,
        )
    )  # fmt: skip
    models = [AutoModelForCausalLM.from_pretrained(path).double() for path in (toy_teacher, toy_student)]
    cache, values = TeacherCache.open(toy_cache), []
    for record in cache.shards("teacher"):
        shard = cache.read(record)
        for row in (shard.row(index) for index in range(len(shard))):
            ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))[None]
            with torch.no_grad():
                sides = [model(ids).logits[0, len(row.prompt_ids) - 1 : -1].numpy() for model in models]
            for teacher_V, student_V in zip(*sides, strict=True):
                top = np.argsort(-teacher_V)[:16]
                masses = [softmax(side, 1)[top].sum() for side in (teacher_V, student_V)]
                of_masses = kl(*(np.array([mass, 1 - mass]) for mass in masses))
                values.append(of_masses + masses[0] * kl(*(softmax(side[top], 3) for side in (teacher_V, student_V))))
    loss = json.loads((tmp_path / "metrics.jsonl").read_text())["loss"]
    assert loss == pytest.approx(np.mean(values), rel=0.01)
