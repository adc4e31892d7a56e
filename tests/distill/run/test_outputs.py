"""What a run reports: model card, trackers, memory; and its options to save memory or time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run import trackers
from dpkd.distill.training import train
from dpkd.teacher_cache.store.reader import TeacherCache


def config(out: Path, cache: Path, student: Path, **options: object) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 3, "batch_size": 5, "learning_rate": 1e-3, "device": "cpu"}
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(defaults | options))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_model_card_says_what_the_student_is_made_of(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    run = train(
        config(tmp_path / "run", toy_cache, toy_student, validation_examples=3, best_metric="kld", sft_weight=0.5)
    )
    _, front, text = (run / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "base_model": "toy-student",
        "pipeline_tag": "text-generation",
        "tags": ["dpkd", "knowledge-distillation"],
    }
    assert "`toy-teacher`, weights sha256 `" in text
    assert TeacherCache.open(toy_cache).fingerprint in text
    assert "terms: 1 dpkd + 0.5 sft" in text
    assert "| Steps | 3 |" in text
    assert f"| kld | {metrics(run)[-1]['kld']:.4f} |" in text
    assert "dpkd train --config dpkd.toml" in text
    assert str(tmp_path / "run") not in text


def test_tensorboard_shows_the_steps_and_nothing_is_needed(
    tmp_path: Path, toy_cache: Path, toy_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(config(tmp_path / "run", toy_cache, toy_student, validation_examples=3))
    shown = EventAccumulator(str(run / "tracker" / "dpkd"))
    shown.Reload()
    values = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    assert [step for step, _ in values] == [1, 2, 3]
    assert all(
        math.isclose(value, line["loss"], rel_tol=1e-6) for (_, value), line in zip(values, metrics(run), strict=True)
    )
    assert [event.step for event in shown.Scalars("validation/kld")] == [0, 3]
    assert not (train(config(tmp_path / "none", toy_cache, toy_student, tracker="none")) / "tracker").exists()
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert trackers.choose_tracker("auto") is None
    with pytest.raises(UserError, match="the tracker is not installed: found --tracker wandb"):
        train(config(tmp_path / "asked", toy_cache, toy_student, tracker="wandb"))
    assert not (tmp_path / "asked").exists()


def test_memory_is_measured(
    tmp_path: Path, toy_cache: Path, toy_student: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = metrics(train(config(tmp_path / "run", toy_cache, toy_student)))
    assert all(10**8 < line["peak_memory_bytes"] < 10**12 for line in lines)
    assert f"memory {lines[-1]['peak_memory_bytes'] / 1e9:.2f} GB" in capfd.readouterr().err


def test_peak_memory_is_that_of_this_process_not_of_its_parent() -> None:
    show = "import torch; from dpkd.distill.run.logs import peak_memory_bytes as f; print(f(torch.device('cpu')))"
    start = f"import subprocess, sys; held = b'x' * 2**30; subprocess.run([sys.executable, '-c', {show!r}], check=True)"
    said = subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True).stdout
    assert 10**8 < int(said) < 2**30


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
def test_saving_memory_or_time_changes_no_number(
    tmp_path: Path, toy_cache: Path, toy_student: Path, option: str
) -> None:
    from torch._dynamo import config as dynamo
    from torch._dynamo.utils import counters

    plain = metrics(train(config(tmp_path / "plain", toy_cache, toy_student, steps=2)))
    before = counters["stats"]["unique_graphs"]
    with dynamo.patch(disable=False):
        other = metrics(train(config(tmp_path / "other", toy_cache, toy_student, steps=2, **{option: True})))
    assert (counters["stats"]["unique_graphs"] > before) == (option == "compile")
    for one, two in zip(plain, other, strict=True):
        for key in ("loss", "grad_norm", "kld"):
            assert math.isclose(one[key], two[key], rel_tol=1e-4), key


def test_a_run_says_where_it_started_and_where_it_ended(
    tmp_path: Path, toy_cache: Path, toy_student: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(config(tmp_path / "run", toy_cache, toy_student, validation_examples=4))
    first, last = (json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines())
    expected = (
        f"KL to the teacher {first['kld']:.2f} -> {last['kld']:.2f}, top-1 agreement {first['top1_agreement']:.0%}"
    )
    said = capfd.readouterr().err
    assert expected in said
    assert "warning" not in said
    train(config(tmp_path / "worse", toy_cache, toy_student, validation_examples=4, learning_rate=1.0))
    assert "warning: the student is further from the teacher than before training" in capfd.readouterr().err
