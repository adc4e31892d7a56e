"""`dpkd cache fidelity --pilot`: what a smaller K costs a student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Result, dpkd
from support.toys import make_toy
from support.world import learn, rows
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.pipelines.commands.pilot_of_k import pilot_of_k
from dpkd.teacher_cache.audit.fidelity_table import fidelity_table
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.audit import FidelityConfig
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> dict[str, Path]:
    """A teacher that is unsure of every token, so that one entry says little of it, and a student."""
    folder = tmp_path_factory.mktemp("pilot")
    teacher = make_toy(folder / "teacher", toy_tokenizer, layers=2, seed=1)
    learn(teacher, 60)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.model.norm.weight.data *= 0.35
    model.save_pretrained(teacher)
    student = make_toy(folder / "student", toy_tokenizer, layers=1, seed=2)
    data, cache = folder / "rows.jsonl", folder / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(1)), encoding="utf-8")
    build_cache(
        CacheConfig(
            teacher=str(teacher), data=str(data), out=str(cache), engine="transformers", top_k=64, max_new_tokens=16,
            template="chat", device="cpu",
        )
    )  # fmt: skip
    return {"teacher": teacher, "student": student, "cache": cache}


def fidelity(world: dict[str, Path], *more: object) -> Result:
    return dpkd("cache", "fidelity", "--cache", world["cache"], "--teacher", world["teacher"], "--limit", 4,
                "--engine", "transformers", "--device", "cpu", *more)  # fmt: skip


def test_a_student_learns_more_from_more_entries(world: dict[str, Path]) -> None:
    pilot = (
        "--pilot",
        "--student",
        world["student"],
        "--pilot-k",
        "64,1",
        "--pilot-steps",
        40,
        "--pilot-learning-rate",
        "3e-3",
        "--pilot-seeds",
        2,
    )
    result = fidelity(world, *pilot, "--json")
    assert result.returncode == 0, result.stderr
    whole = json.loads(result.stdout)
    report = whole["pilot"]
    one, most = report["runs"]
    assert (one["top_k"], most["top_k"]) == (1, 64)
    assert len(one["kl"]) == len(most["kl"]) == 2
    # the best entry alone says little of a teacher that is unsure: the cost is far above its spread over seeds
    assert one["over_mean"] > 3 * one["over_spread"] > 0
    assert most["kl_mean"] < one["kl_mean"] < report["kl_before"]
    assert (most["over_mean"], most["over_spread"]) == (0, 0)
    # hand arithmetic of the means and spreads
    first, second = (a - b for a, b in zip(one["kl"], most["kl"], strict=True))
    assert one["over_mean"] == pytest.approx((first + second) / 2)
    assert one["over_spread"] == pytest.approx(abs(first - second) / 2**0.5)
    row = f"| 1 | {one['kl_mean']:.4f} ± {one['kl_spread']:.4f} | {one['over_mean']:+.4f} ± {one['over_spread']:.4f} |"
    assert row in fidelity_table(whole)


def test_the_kl_is_that_of_both_models_in_memory(world: dict[str, Path]) -> None:
    """In float64, over the cache's entries and one outcome for all other tokens."""
    from dpkd.distill import TrainConfig
    from dpkd.distill.rows.sources import open_cache_rows
    from dpkd.pipelines.commands.pilot_of_k import _held_out_kl

    cache = TeacherCache.open(world["cache"])
    options = TrainConfig(
        cache=str(world["cache"]), student=str(world["student"]), out=Path("none"), steps=1, validation_examples=6,
        device="cpu",
    )  # fmt: skip
    measured = _held_out_kl(str(world["student"]), cache, options)
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(world[name]).eval() for name in ("teacher", "student")]
    held_out, total, tokens = open_cache_rows(cache, None, options).validation, 0.0, 0
    assert held_out is not None
    for group, size in enumerate(held_out.group_sizes):
        for index in range(size):
            row = held_out.row(group, index).chosen
            assert row.distributions is not None
            ids = torch.tensor([[*row.prompt_ids.tolist(), *row.response_ids.tolist()]])
            with torch.no_grad():
                p_TV, q_TV = (
                    model(ids).logits[0, len(row.prompt_ids) - 1 : -1].double().softmax(-1) for model in models
                )
            ends = [0, *row.distributions.counts_T.cumsum().tolist()]
            for position, (p_V, q_V) in enumerate(zip(p_TV, q_TV, strict=True)):
                kept = torch.from_numpy(row.distributions.ids_E[ends[position] : ends[position + 1]].copy()).long()
                outcomes = [torch.cat([x[kept], 1 - x[kept].sum()[None]]) for x in (p_V, q_V)]
                total += float((outcomes[0] * (outcomes[0] / outcomes[1]).log()).sum())
            tokens += len(row.response_ids)
    assert measured == pytest.approx(total / tokens, abs=2e-3)


def test_what_cannot_be_piloted_is_refused(world: dict[str, Path], tmp_path: Path) -> None:
    cache = TeacherCache.open(world["cache"])
    plain = {"cache": str(world["cache"]), "teacher": str(world["teacher"])}
    config = FidelityConfig(**plain, pilot=True, student=str(world["student"]), pilot_k=(4, 65))
    with pytest.raises(UserError, match=r"not have so many entries per position: found --pilot-k 65, expected at most"):
        pilot_of_k(config, cache)
    for wrong in ({"pilot": True}, {"student": "s"}, {"pilot": True, "student": "s", "pilot_k": "0"}):
        with pytest.raises(UserError, match="--pilot"):
            FidelityConfig.parse(plain | wrong, where="a test")
    for unread in ({"pilot_k": "4"}, {"pilot_steps": 9}, {"pilot_seeds": 2}, {"pilot_learning_rate": 1e-3}):
        with pytest.raises(UserError, match=f"{FidelityConfig.flag(next(iter(unread)))} goes with --pilot: nothing"):
            FidelityConfig.parse(plain | unread, where="a test")
    FidelityConfig.parse(plain | {"pilot_steps": 60, "pilot_seeds": 3}, where="defaults that are spelt out")
    shutil.copytree(world["student"], tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").unlink()
    result = fidelity(world, "--pilot", "--student", tmp_path / "student")
    assert result.returncode == 2
    assert "holds no *.safetensors" in result.stderr
