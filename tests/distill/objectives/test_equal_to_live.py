"""A loss from the cache equals the loss with the teacher in memory: both levels, against plain transformers.

The live side takes one row at a time, without padding, from the full logits of both models. The cached side takes the
product's rows and collation and never sees the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpkd.distill.batches.batch import Batch
from dpkd.distill.batches.collate import collate
from dpkd.distill.losses.cached_distributions import cached_logprobs
from dpkd.distill.losses.preference import (
    PreferenceOptions,
    sequence_preference_loss,
    sum_by_row,
    token_preference_loss,
)
from dpkd.distill.rows.row import TrainingRow
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

ROUNDING = 1e-5  # float32, of sums in another order


@pytest.fixture(scope="module")
def teacher(toy_teacher: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(toy_teacher, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def student(toy_student: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(toy_student, dtype=torch.float32).eval()


def rows_of(cache: TeacherCache, round_name: str | None = None) -> Iterator[TrainingRow]:
    """Every row, with its neighbour in the round."""
    held = None if round_name is None else cache.round(round_name)
    for record in cache.shards():
        shard = cache.read(record)
        beside = None if held is None else cache.read_round(held, record)
        for place in range(len(shard)):
            yield TrainingRow(shard.row(place), None if beside is None else beside.row(place))


def live_logprobs(model: Any, row: CachedRow) -> Tensor:
    """Full log-probs [T, V] at the response positions of one row."""
    prompt, response = row.prompt_ids.tolist(), row.response_ids.tolist()
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)


def batch_logprobs(model: Any, batch: Batch) -> Tensor:
    """The same at the positions of a padded batch."""
    logits = model(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS).logits
    return torch.log_softmax(logits[batch.row_T, batch.predict_T].float(), dim=-1)


def at(table_TV: Tensor, token_T: Tensor) -> Tensor:
    return table_TV.gather(1, token_T[:, None])[:, 0]


@pytest.fixture(scope="module")
def wide_cache(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_data: Path) -> Path:
    """Ten rows with the whole vocabulary kept: no student's token is outside."""
    out = tmp_path_factory.mktemp("caches") / "wide"
    options = {"template": "chat", "max_new_tokens": 12, "top_k": 600, "limit": 10, "engine": "transformers"}
    build_cache(CacheConfig.model_validate(options | {"teacher": str(toy_teacher), "data": str(toy_data), "out": out}))
    return out


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("width", ["top 16", "whole vocabulary"])
def test_the_token_loss_is_the_live_teachers_up_to_the_grid(
    width: str, beta: float, toy_cache: Path, wide_cache: Path, teacher: Any, student: Any
) -> None:
    cache = TeacherCache.open(toy_cache if width == "top 16" else wide_cache)
    rows = list(rows_of(cache))
    p_TV = torch.cat([live_logprobs(teacher, row.chosen) for row in rows])
    q_TV = torch.cat([live_logprobs(student, row.chosen) for row in rows])
    y_t, y_s = p_TV.argmax(dim=1), q_TV.argmax(dim=1)
    live_T = token_preference_loss(
        "dpkd", at(q_TV, y_t), at(q_TV, y_s), at(p_TV, y_t), at(p_TV, y_s), options=PreferenceOptions(beta=beta)
    )

    batch = collate(rows, with_distributions=True)
    assert batch.entry_ids_TK is not None
    assert batch.entry_logprobs_TK is not None
    assert batch.entry_counts_T is not None
    assert batch.log_tail_T is not None
    ours_TV = batch_logprobs(student, batch)
    chosen_T, own_T = batch.entry_ids_TK[:, 0], ours_TV.argmax(dim=1)
    assert torch.equal(chosen_T, y_t)
    assert torch.equal(own_T, y_s)
    teacher_own_T, miss_T = cached_logprobs(
        own_T,
        batch.entry_ids_TK,
        batch.entry_logprobs_TK,
        batch.entry_counts_T,
        batch.log_tail_T,
        cache.vocab_size,
    )
    cached_T = token_preference_loss(
        "dpkd",
        at(ours_TV, chosen_T),
        at(ours_TV, own_T),
        batch.entry_logprobs_TK[:, 0],
        teacher_own_T,
        options=PreferenceOptions(beta=beta),
    )
    hit_T = ~miss_T
    assert hit_T.all() if width == "whole vocabulary" else 10 < int(hit_T.sum()) < len(hit_T)
    # -log sigma has slope 1 at most, and two log-probs of the teacher are each off by half a step of the grid
    gap_T = (cached_T - live_T).abs()[hit_T]
    assert float(gap_T.max()) <= beta * 2 * MAX_ERROR_NATS + ROUNDING
    assert float(gap_T.max()) > ROUNDING  # the grid is at work: equality would mean that the live side read the cache


@torch.no_grad()
@pytest.mark.parametrize("length_normalize", [True, False])
def test_the_sequence_loss_is_the_live_teachers(
    length_normalize: bool, toy_cache: Path, teacher: Any, student: Any
) -> None:
    rows = list(rows_of(TeacherCache.open(toy_cache), "r0"))
    chosen, rejected = [row.chosen for row in rows], [row.rejected for row in rows if row.rejected is not None]
    assert len(chosen) == len(rejected) == 40

    def live_sums(model: Any, responses: list[CachedRow]) -> Tensor:
        return torch.stack(
            [at(live_logprobs(model, row), torch.tensor(row.response_ids).long()).sum() for row in responses]
        )

    def lengths(responses: list[CachedRow]) -> Tensor:
        return torch.tensor([len(row.response_ids) for row in responses])

    live_B = sequence_preference_loss(
        "dpkd",
        live_sums(student, chosen),
        live_sums(student, rejected),
        live_sums(teacher, chosen),
        live_sums(teacher, rejected),
        lengths(chosen),
        lengths(rejected),
        options=PreferenceOptions(beta=1.0, length_normalize=length_normalize),
    )

    batch = collate(rows, with_distributions=False)
    assert batch.teacher_logprob_T is not None
    pairs = len(rows)
    student_B = sum_by_row(at(batch_logprobs(student, batch), batch.target_T), batch.row_T, batch.num_rows)
    teacher_B = sum_by_row(batch.teacher_logprob_T, batch.row_T, batch.num_rows)
    cached_B = sequence_preference_loss(
        "dpkd",
        student_B[:pairs],
        student_B[pairs:],
        teacher_B[:pairs],
        teacher_B[pairs:],
        batch.num_tokens_B[:pairs],
        batch.num_tokens_B[pairs:],
        options=PreferenceOptions(beta=1.0, length_normalize=length_normalize),
    )
    assert float((cached_B - live_B).abs().max()) < 1e-4
    assert float(live_B.std()) > 0.01  # pairs differ, so that agreement says something
