"""Runs that learn from the teacher's responses and from the student's own (`--mix`)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.batches.collate import collate
from dpkd.distill.batches.order import student_rows
from dpkd.distill.losses.preference import all_pairs_preference_loss
from dpkd.distill.objectives.objective import Objective
from dpkd.distill.objectives.student_forward import StudentScorer
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.sources import open_cache_rows
from dpkd.distill.rows.views import MixedRows
from dpkd.distill.run.setup import open_run
from dpkd.distill.training import train
from dpkd.teacher_cache.store.reader import TeacherCache

POLICY = {"mix": 0.5, "round": "r0", "student_samples": "cached", "objective": "minillm"}
JSD = {"objective": "jsd", "round": "r0", "mix": 0.5}


def config(out: Path, cache: Path, student: Path, **options: Any) -> TrainConfig:
    defaults = {"steps": 4, "batch_size": 6, "learning_rate": 1e-3, "device": "cpu"}
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(defaults | options))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(("_s", "_bytes"))} for line in lines]


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 2**31), st.integers(0, 10_000))
def test_every_stretch_of_a_step_has_its_share(num_rows: int, share: float, seed: int, step: int) -> None:
    chosen = student_rows(num_rows, share, seed, step)
    assert chosen == student_rows(num_rows, share, seed, step)
    for start in range(num_rows):
        for stop in range(start + 1, num_rows + 1):
            assert abs(sum(chosen[start:stop]) - share * (stop - start)) < 1 + 1e-9


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_every_position_of_a_step_has_its_share_over_many_steps(num_rows: int, share: float) -> None:
    steps = 4000
    counts = torch.tensor([student_rows(num_rows, share, 7, step) for step in range(steps)]).float()
    # four standard errors of a draw with this probability
    error = 4 * math.sqrt(share * (1 - share) / steps)
    assert float((counts.mean(0) - share).abs().max()) < error
    assert not torch.equal(counts, torch.tensor([student_rows(num_rows, share, 8, step) for step in range(steps)]))


def test_the_rows_of_a_step_depend_on_neither_accumulation_nor_ranks(toy_cache: Path, toy_student: Path) -> None:
    """Also with batches by tokens, each prompt is read once an epoch, as the teacher's response or the student's."""
    runs = {
        size: open_run(config(Path("out"), toy_cache, toy_student, batch_size=size, **JSD), num_processes=12 // size)
        for size in (2, 3, 12)
    }
    for step in range(8):
        flat = {size: [row for part in run.order.micro_batches_of(step) for row in part] for size, run in runs.items()}
        assert flat[2] == flat[3] == flat[12]
    run = open_run(config(Path("out"), toy_cache, toy_student, steps=None, epochs=1, batch_tokens=900, **JSD))
    assert isinstance(run.rows, MixedRows)
    indices = [row for step in range(run.steps) for part in run.order.micro_batches_of(step) for row in part]
    prompts = [(group % len(run.rows.group_sizes), index) for group, index in indices]
    assert len(set(prompts)) == sum(run.rows.group_sizes)
    assert 0.3 < sum(run.rows.is_students(row) for row in indices) / len(indices) < 0.7


def test_a_row_is_the_teacher_s_or_the_student_s_response_to_the_same_prompt(
    toy_cache: Path, toy_student: Path
) -> None:
    cache = TeacherCache.open(toy_cache)
    options = config(Path("out"), toy_cache, toy_student, validation_examples=4, **JSD)
    split = open_cache_rows(cache, cache.round("r0"), options)
    rows, validation = MixedRows(split.training), split.validation
    for group, size in enumerate(rows.group_sizes):
        for index in range(size):
            teachers, students = rows.row(group, index).chosen, rows.row(*rows.students((group, index))).chosen
            assert (teachers.origin, students.origin) == ("teacher", "student")
            assert teachers.example_id == students.example_id
            assert teachers.prompt_ids.tolist() == students.prompt_ids.tolist()
            assert students.distributions is not None
    assert validation is not None
    assert {validation.row(0, index).chosen.origin for index in range(validation.group_sizes[0])} == {"teacher"}


@pytest.mark.parametrize("options", [{"objective": "jsd"}, {}, {"token_pairs": "argmax"}], ids=str)
def test_the_loss_is_that_of_both_sources_weighed_by_their_positions(
    tmp_path: Path, toy_cache: Path, toy_student: Path, options: dict[str, Any]
) -> None:
    """The first step's loss, from the sums over the teacher's rows and over the student's."""
    mixed = config(tmp_path / "run", toy_cache, toy_student, round="r0", mix=0.4, **options)
    run = open_run(mixed)
    assert isinstance(run.rows, MixedRows)
    (indices,) = run.order.micro_batches_of(0)
    model = AutoModelForCausalLM.from_pretrained(toy_student).eval()
    scorer = StudentScorer(model, num_tokens=len(run.student.tokenizer), logits_chunk=1024)
    objective = Objective(mixed, run.vocab_size, run.student.vocab_size)
    total, positions = 0.0, 0
    for students in (False, True):
        rows = [run.rows.row(*index) for index in indices if run.rows.is_students(index) is students]
        batch = MicroBatch(collate(rows, with_distributions=True))
        with torch.no_grad():
            total += float(objective(scorer, batch).terms["kd" if "objective" in options else "dpkd"])
        positions += batch.num_positions
    line = metrics(train(mixed))[0]
    assert math.isclose(line["loss"], total / positions, rel_tol=1e-5)
    assert line["tokens"] == positions


def test_accumulation_and_resuming_change_nothing(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    options = JSD | {"steps": 7, "save_every": 3, "keep_checkpoints": 5}
    whole = train(config(tmp_path / "whole", toy_cache, toy_student, **options))
    parts = train(
        config(tmp_path / "parts", toy_cache, toy_student, **options | {"batch_size": 2}, gradient_accumulation_steps=3)
    )
    for one, two in zip(metrics(whole), metrics(parts), strict=True):
        assert one["tokens"] == two["tokens"]
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-4)
    again = train(config(tmp_path / "again", toy_cache, toy_student, **options))
    shutil.rmtree(again / "checkpoint-6")
    for name in ("run.json", "model.safetensors"):
        (again / name).unlink()
    train(config(again, toy_cache, toy_student, **options))
    assert metrics(again) == metrics(whole)
    ours, theirs = load_file(again / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_source_that_the_share_nearly_leaves_alone_is_that_source(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    """Almost nothing of the round: the run on the teacher's rows alone."""
    teachers = train(config(tmp_path / "a", toy_cache, toy_student, responses="teacher"))
    mixed = train(config(tmp_path / "b", toy_cache, toy_student, round="r0", mix=1e-9))
    for one, two in zip(metrics(teachers), metrics(mixed), strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": 0.5}, "--mix needs the student's responses"),
        ({"mix": 0.5, "round": "r0", "level": "sequence"}, "--level sequence compares two"),
        (POLICY, "--objective minillm learns from the student's own"),
        ({"mix": 0.5, "round": "r0", "objective": "kd"}, "cross-entropy on them teaches nothing"),
        ({"mix": 1.5, "round": "r0"}, "`mix` must be below 1"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig.parse({"cache": "c", "student": "s", "out": "o"} | options, where="here")


# an enumerable world: two positions, so that the law of the prefix differs between teacher and student


def test_a_mix_of_both_prefixes_ends_at_the_teacher() -> None:
    """All pairs on prefixes of the teacher and of a poor student's round, half each."""
    draw = torch.Generator().manual_seed(0)
    shape = (5, 4)  # the empty prefix and each first token; four tokens
    log_p = (1.5 * torch.randn(shape, generator=draw, dtype=torch.float64)).log_softmax(1)
    first = 2 * torch.randn(shape, generator=draw, dtype=torch.float64)
    law = first.log_softmax(1)
    visits = [torch.cat([torch.ones(1, dtype=torch.float64), source[0].exp()]) for source in (log_p, law)]
    logits = first.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)

    def distance() -> float:
        gap = functional.kl_div(logits.log_softmax(1), log_p, reduction="none", log_target=True).sum(1)
        return float((visits[0] * gap).sum().detach())

    assert distance() > 1
    for _ in range(1500):
        loss: Tensor = all_pairs_preference_loss(log_p, logits.log_softmax(1), beta=1.0)
        optimizer.zero_grad()
        ((0.5 * visits[0] + 0.5 * visits[1]) * loss).sum().backward()
        optimizer.step()
    assert distance() < 1e-3
