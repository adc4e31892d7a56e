"""Validation without being asked: what is held out, how often it is measured, and which student a run ends with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.reference import entries_of, forward_kl, full_logprobs, read_rows
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.held_out import choose_examples
from dpkd.distill.run.plan import validation_interval
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache


def config(out: Path, cache: Path, student: Path, **options: object) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 5, "learning_rate": 1e-3, "device": "cpu"}
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(defaults | options))


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize(
    ("examples", "held_out"),
    [(3, 0), (15, 0), (16, 4), (20, 5), (63, 15), (64, 16), (800, 16), (1600, 32), (3200, 64), (10**6, 64)],
)
def test_two_per_cent_are_held_out_but_a_quarter_of_a_small_cache_at_most(examples: int, held_out: int) -> None:
    options = TrainConfig(cache="c", student="s", out=Path("o"))
    assert options.num_held_out(examples) == held_out
    assert TrainConfig(cache="c", student="s", out=Path("o"), validation_examples=7).num_held_out(examples) == 7


@given(st.integers(1, 100_000), st.integers(4, 64), st.sampled_from([1, 4, 8, 64, 512]))
def test_validations_take_a_twentieth_of_the_time(steps: int, num_rows: int, rows_per_step: int) -> None:
    """A validation is counted as the forward pass of its rows: a third of a step over as many rows."""
    every = validation_interval(steps, num_rows, rows_per_step)
    validations = 1 + math.ceil(steps / every)
    assert 2 <= validations <= 21
    assert validations == 2 or validations * num_rows / 3 <= 0.05 * steps * rows_per_step


def test_a_run_without_options_is_validated_and_ends_with_the_best_student(
    tmp_path: Path, toy_cache: Path, toy_student: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rate that first helps and then drives the student away: the student of the best step is the result.

    Its KL on the held-out rows is computed again from full logits, row by row.
    """
    options = config(
        tmp_path / "run", toy_cache, toy_student, steps=40, learning_rate=0.02, warmup_ratio=0.0, validate_every=4
    )
    run = train(options)
    said = capfd.readouterr().err
    assert (
        "5 of 20 examples are held out and measured every 4 steps; the result is the student with the best kld" in said
    )
    start, *others = lines(run, "validation")
    best = min(others, key=lambda line: line["kld"])
    assert start["step"] == 0
    assert 0 < best["step"] < 40  # otherwise this test shows nothing
    assert json.loads((run / "dpkd.json").read_text())["steps"] == best["step"]
    assert json.loads((run / "run.json").read_text())["student_step"] == best["step"]
    agreement = f"{start['top1_agreement']:.0%} -> {best['top1_agreement']:.0%}"
    expected = f"KL to the teacher {start['kld']:.2f} -> {best['kld']:.2f}, top-1 agreement {agreement}, best at step "
    assert f"{expected}{best['step']}\n" in said

    cache = TeacherCache.open(toy_cache)
    rows = [row for row, _ in read_rows(cache, None)]
    held_out = choose_examples((row.example_id for row in rows), 5, seed=0)
    model = AutoModelForCausalLM.from_pretrained(run).double().eval()
    values = []
    for row in rows:
        if row.example_id in held_out:
            for log_q_V, (entries, tail) in zip(full_logprobs(model, row), entries_of(row), strict=True):
                values.append(float(forward_kl({**entries, -1: tail}, log_q_V.detach())))
    assert math.isclose(sum(values) / len(values), best["kld"], rel_tol=1e-3)

    last = train(options.model_copy(update={"out": tmp_path / "last", "best_metric": "last"}))
    said = capfd.readouterr().err
    assert f"last step 40\nthe best KL was {best['kld']:.2f} at step {best['step']}: --best-metric kld keeps" in said
    ours, theirs = (load_file(path / "model.safetensors") for path in (run, last))
    assert any((ours[name] != theirs[name]).any() for name in theirs)


def test_held_out_examples_are_in_no_step(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    """An epoch over the rest has the tokens of the rest."""
    run = train(config(tmp_path / "run", toy_cache, toy_student, steps=None, epochs=1, batch_size=1))
    rows = [row for row, _ in read_rows(TeacherCache.open(toy_cache), None)]
    held_out = choose_examples((row.example_id for row in rows), 5, seed=0)
    expected = sum(len(row.response_ids) for row in rows if row.example_id not in held_out)
    assert sum(line["tokens"] for line in lines(run, "metrics")) == expected


def test_sft_keeps_the_student_with_the_best_loss(
    tmp_path: Path, toy_cache: Path, toy_student: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(config(tmp_path / "run", toy_cache, toy_student, objective="sft"))
    said = capfd.readouterr().err
    best = min(lines(run, "validation")[1:], key=lambda line: line["loss"])
    assert "the result is the student with the best loss" in said
    assert f"best loss at step {best['step']}" in said


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_student: Path, toy_data: Path) -> Path:
    """Six examples without distributions, and a round that has them."""
    out = tmp_path_factory.mktemp("caches") / "small"
    options: dict[str, Any] = {"teacher": str(toy_teacher), "out": out, "engine": "transformers", "device": "cpu"}
    build_cache(CacheConfig(data=str(toy_data), limit=6, top_k=0, template="chat", max_new_tokens=4, **options))
    build_cache(CacheConfig(student=str(toy_student), round="r0", top_k=8, max_new_tokens=4, **options))
    return out


def test_a_run_that_cannot_be_validated_says_so(
    tmp_path: Path, small: Path, toy_student: Path, toy_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = {"steps": 1, "batch_size": 2}
    train(config(tmp_path / "few", small, toy_student, objective="sft", **common))
    assert "no validation: the cache has only 6 examples; the result is the last student" in capfd.readouterr().err
    train(config(tmp_path / "asked", small, toy_student, objective="sft", validation_examples=2, **common))
    assert len(lines(tmp_path / "asked", "validation")) == 2
    with pytest.raises(UserError, match="--patience needs validation, and no example is held out: found the cache has"):
        train(config(tmp_path / "patience", small, toy_student, objective="sft", patience=2, **common))
    assert not (tmp_path / "patience").exists()
    with pytest.raises(UserError, match=r"--patience needs a metric.* Give --best-metric loss"):
        train(
            config(
                tmp_path / "seqkd", small, toy_student, objective="seqkd", patience=2, validation_examples=2, **common
            )
        )
    data: dict[str, Any] = {"student": str(toy_student), "data": str(toy_data), "objective": "sft", "template": "chat"}
    train(TrainConfig(out=tmp_path / "data", device="cpu", **data, **common))
    assert "no validation: --data has no teacher; the result is the last student" in capfd.readouterr().err


def test_a_round_of_a_cache_without_distributions_says_why_it_is_not_validated(
    tmp_path: Path, small: Path, toy_student: Path, toy_teacher: Path, toy_data: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "cache"
    options: dict[str, Any] = {"teacher": str(toy_teacher), "out": out, "engine": "transformers", "device": "cpu"}
    build_cache(CacheConfig(data=str(toy_data), top_k=0, template="chat", max_new_tokens=4, **options))
    build_cache(CacheConfig(student=str(toy_student), round="r0", top_k=8, max_new_tokens=4, **options))
    train(config(tmp_path / "run", out, toy_student, objective="forward-kl", round="r0", steps=1))
    assert "no validation: validation measures the teacher's responses, and the cache has no " in capfd.readouterr().err
    with pytest.raises(UserError, match="the cache has no distributions of them"):
        train(config(tmp_path / "asked", out, toy_student, objective="forward-kl", round="r0", validation_examples=2))
    train(config(tmp_path / "sft", out, toy_student, objective="seqkd", steps=1))
    assert "the result is the last student (--validation-examples 0 trains on all)" in capfd.readouterr().err


def test_the_last_student_is_the_result_where_the_best_is_lost(
    tmp_path: Path, toy_cache: Path, toy_student: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = config(tmp_path / "run", toy_cache, toy_student, save_every=2, validate_every=2, steps=4)
    run = train(options)
    (run / "run.json").unlink()
    kept = run / "checkpoint-2" / "trainer_state.json"
    assert json.loads(kept.read_text())["state"]["best"]["step"] == 2
    bad = options.model_copy(update={"out": run})
    train(bad)  # it takes steps 3 and 4 again, finds that step 4 is better and keeps it
    assert "the last student is the result" not in capfd.readouterr().err
    from dpkd.distill.run.best import take_best

    assert take_best(tmp_path / "nothing", tmp_path / "target", 2) is None
    assert "the best student is that of step 2, but " in capfd.readouterr().err
    assert take_best(run, tmp_path / "target", 4) == 4
    assert (tmp_path / "target" / "model.safetensors").is_file()
