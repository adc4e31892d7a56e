"""Rows with several spans: the positions that they train on, and that no objective sees any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.conversations import conversations, make_models, write

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.batches.collate import collate
from dpkd.distill.objectives.objective import Objective
from dpkd.distill.objectives.student_forward import StudentScorer
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.columns import read_lengths
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.rows.sources import open_cache_rows
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.engines.engine import Distributions
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

LENGTHS = {"max_prompt_tokens": 400, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("spans")
    teacher, student = make_models(directory)
    data = write(directory / "data.jsonl", conversations()[:3])
    options: dict[str, Any] = {
        "engine": "transformers", "device": "cpu", "template": "chat", "top_k": 16, "rows_per_shard": 2, **LENGTHS,
    }  # fmt: skip
    out = directory / "cache"
    build_cache(
        CacheConfig(teacher=str(teacher), data=str(data), out=str(out), responses="reference", turns="all", **options)
    )
    return {"teacher": teacher, "student": student, "data": data, "cache": out}


def rows_of(location: Path) -> list[CachedRow]:
    cache = TeacherCache.open(location)
    return [cache.read(record).row(index) for record in cache.shards() for index in range(record.rows)]


def test_each_position_is_one_before_its_target_in_its_span() -> None:
    top = Distributions(
        np.array([1, 2, 1], np.int32),
        np.array([7, 8, 9, 6], np.int32),
        np.array([-0.1, -0.2, -3, -0.4], np.float32),
        np.full(3, -2, np.float32),
    )
    row = CachedRow(
        "a",
        0,
        "reference",
        "stop",
        prompt_ids=np.array([1, 2]),
        response_ids=np.array([10, 11, 20]),
        response_logprobs=np.array([-1, -2, -3], np.float32),
        distributions=top,
        spans=np.array([[2, 2], [6, 1]]),
        between_ids=np.array([5, 6]),
    )
    batch = collate([TrainingRow(row)], with_distributions=True)
    assert batch.input_ids_BS.tolist() == [[1, 2, 10, 11, 5, 6, 20]]
    assert batch.predict_T.tolist() == [1, 2, 5]
    assert batch.target_T.tolist() == [10, 11, 20]
    assert batch.entry_ids_TK is not None
    assert batch.entry_ids_TK.tolist() == [[7, -1], [8, 9], [6, -1]]
    first, last = row.by_span()
    assert (first.prompt_ids.tolist(), last.prompt_ids.tolist()) == ([1, 2], [1, 2, 10, 11, 5, 6])
    assert (first.response_ids.tolist(), last.response_ids.tolist()) == ([10, 11], [20])
    assert last.distributions is not None
    assert last.distributions.ids_E.tolist() == [6]
    assert last.response_logprobs.tolist() == [-3]


@pytest.mark.parametrize(
    "options",
    [
        *({"objective": name} for name in ("dpkd", "forward-kl", "reverse-kl", "jsd", "akl", "kd", "sft", "tvd")),
        {"preset": "released-code", "lm_weight": 0.0},
        {"objective": "ipo", "token_pairs": "argmax"},
        {"objective": "forward-kl", "tail": "uniform"},
    ],
    ids=str,
)
def test_objectives_see_only_the_tokens_of_spans(world: dict[str, Path], options: dict[str, Any]) -> None:
    """A conversation as one row has the losses of its turns as rows of their own, which have one span each."""
    config = TrainConfig(cache=str(world["cache"]), student=str(world["student"]), out=Path("unused"), **options)
    objective = Objective(config, vocab_size=600)
    model = locate_model(str(world["student"]), "student").load("float32").eval()
    scorer = StudentScorer(model, num_tokens=600, logits_chunk=1024)
    rows = rows_of(world["cache"])
    assert sorted(len(row.by_span()) for row in rows) == [1, 2, 3]
    values = []
    for part in (rows, [single for row in rows for single in row.by_span()]):
        batch = MicroBatch(collate([TrainingRow(row) for row in part], with_distributions=True))
        torch.manual_seed(0)
        with torch.no_grad():
            sums = objective(scorer, batch)
        values.append((float(objective.total(sums, objective.counts(batch))), batch.rows.num_positions))
    (whole, positions), (apart, same) = values
    assert positions == same == sum(len(row.response_ids) for row in rows)
    assert whole == pytest.approx(apart, abs=1e-5)


def test_a_change_of_what_others_say_changes_no_target(world: dict[str, Path]) -> None:
    """The gradient of the loss reaches the user's turns as context alone: their tokens are never predicted."""
    [row] = [row for row in rows_of(world["cache"]) if row.example_id == "two"]
    batch = collate([TrainingRow(row)], with_distributions=True)
    predicted = set(zip(batch.row_T.tolist(), (batch.predict_T + 1).tolist(), strict=True))
    tokenizer = locate_model(str(world["teacher"]), "teacher").tokenizer
    others = [place for place in range(row.num_tokens) if (0, place) not in predicted]
    text = tokenizer.decode(row.sequence_ids()[others])
    assert "And its river?" in text
    assert "Rome." not in text
    assert "The Tiber." not in text


def run(world: dict[str, Path], out: Path, **options: Any) -> list[dict[str, Any]]:
    given = {"student": str(world["student"]), "out": out, "batch_size": 1, "steps": 3, "device": "cpu", **options}
    if "data" not in given:
        given |= {"cache": str(world["cache"])}
    train(TrainConfig(**given))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_runs_on_spans(world: dict[str, Path], tmp_path: Path) -> None:
    num_tokens = sum(len(row.response_ids) for row in rows_of(world["cache"]))
    lines = run(world, tmp_path / "plain", validation_examples=0)
    assert sum(line["tokens"] for line in lines) == num_tokens  # an epoch
    budget = run(world, tmp_path / "budget", batch_tokens=500, validation_examples=0, steps=2)
    assert all(np.isfinite(line["loss"]) for line in budget)
    followed = run(world, tmp_path / "followed", follow=True)
    assert sum(line["tokens"] for line in followed) == num_tokens
    sft = run(
        world, tmp_path / "sft", data=str(world["data"]), objective="sft", template="chat", turns="all", **LENGTHS
    )
    assert sum(line["tokens"] for line in sft) == num_tokens
    held = run(world, tmp_path / "held", validation_examples=1, steps=1)
    assert held


def test_lengths_count_what_is_between_spans(world: dict[str, Path]) -> None:
    cache = TeacherCache.open(world["cache"])
    lengths = [length for record in cache.shards() for length in read_lengths(cache.folder, record).tolist()]
    assert lengths == [row.num_tokens for row in rows_of(world["cache"])]
    assert max(lengths) == cache.manifest.longest


def test_what_needs_one_span_says_so(world: dict[str, Path], tmp_path: Path) -> None:
    live = {"student_samples": "live", "teacher_url": "http://127.0.0.1:9", "objective": "forward-kl"}
    with pytest.raises(UserError, match="live samples answer each row's prompt once, and rows of this cache have sev"):
        run(world, tmp_path / "live", **live)
    assert not (tmp_path / "live").exists()


def test_turns_of_a_conversation_are_held_out_together(world: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "engine": "transformers", "device": "cpu", "template": "chat", "top_k": 8, "turns": "all",
        "max_prompt_tokens": 400, "max_new_tokens": 4,
    }  # fmt: skip
    build_cache(
        CacheConfig(teacher=str(world["teacher"]), data=str(world["data"]), out=str(tmp_path / "cache"), **options)
    )
    cache = TeacherCache.open(tmp_path / "cache")
    config = TrainConfig(
        cache=str(tmp_path / "cache"), student=str(world["student"]), out=tmp_path, validation_examples=1
    )
    split = open_cache_rows(cache, None, config)
    assert (split.held_out, split.examples) == (1, 3)
    assert split.validation is not None
    names = [
        {
            rows.row(group, index).chosen.example_id
            for group, size in enumerate(rows.group_sizes)
            for index in range(size)
        }
        for rows in (split.training, split.validation)
    ]
    trained, held = ({name.partition("/")[0] for name in part} for part in names)
    assert len(held) == 1
    assert not trained & held
    assert sum(map(len, names)) == 6
