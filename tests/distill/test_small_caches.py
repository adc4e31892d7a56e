"""Four entries a position: what becomes of the tail, by the true KL on full logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import full_logprobs, read_rows
from support.world import build_world
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.requirements import check_distributions
from dpkd.distill.training import train
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.reader import CacheReader, TeacherCache

COMMON: dict[str, Any] = {
    "batch_size": 16, "device": "cpu", "save_every": None, "tracker": "none", "best_metric": "last",
    "validate_every": 1000,
}  # fmt: skip


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> dict[str, Path]:
    """A teacher that is unsure, a cache of 4 entries, an unrelated student, and one that was the teacher."""
    directory = tmp_path_factory.mktemp("thin")
    world = build_world(directory, toy_tokenizer, top_k=4, teacher_steps=20, with_round=False)
    related = TrainConfig(
        out=directory / "related", cache=str(world["cache"]), student=str(world["teacher"]), objective="sft",
        responses="reference", steps=30, learning_rate=2e-3, **COMMON,
    )  # fmt: skip
    return world | {"related": train(related)}


@torch.no_grad()
def true_kl(world: dict[str, Path], student: Path) -> float:
    """Mean KL(p || q) over the whole vocabulary at the positions of a few rows."""
    p, q = (AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (world["teacher"], student))
    values: list[float] = []
    for row, _ in list(read_rows(TeacherCache.open(world["cache"]), None))[:30]:
        log_p_TV, log_q_TV = full_logprobs(p, row), full_logprobs(q, row)
        values += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(1).tolist()
    return sum(values) / len(values)


@pytest.mark.parametrize("student", ["student", "related"])
def test_a_free_tail_never_ends_above_its_start_and_the_run_says_that_it_is_free(
    tmp_path: Path, thin: dict[str, Path], student: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The default, and the tail spread evenly: the one is better for a student that was the teacher, the other else."""
    before, after = true_kl(thin, thin[student]), {}
    for tail in ("bucket", "uniform"):
        run = train(
            TrainConfig(
                out=tmp_path / tail, cache=str(thin["cache"]), student=str(thin[student]), objective="forward-kl",
                tail=tail, steps=100, learning_rate=3e-3, **COMMON,
            )
        )  # fmt: skip
        after[tail] = true_kl(thin, run)
        logged = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])["kld"]
        if tail == "bucket":
            assert logged < after[tail]  # the log cannot see into the tail
            assert "the cached entries hold 71% of the teacher's probability" in capfd.readouterr().err
    assert after["bucket"] < before - 0.3
    assert (after["bucket"] < after["uniform"]) == (student == "related")


def test_a_cache_that_keeps_enough_is_not_mentioned(
    tmp_path: Path, world: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    options = COMMON | {"cache": str(world["cache"]), "student": str(world["student"]), "steps": 1}
    train(TrainConfig(out=tmp_path / "whole", **options))
    assert "the cached entries hold" not in capfd.readouterr().err
    train(TrainConfig(out=tmp_path / "cut", objective="forward-kl", top_mass=0.1, **options))
    train(TrainConfig(out=tmp_path / "sft", objective="sft", **options))
    assert "the cached entries hold" not in capfd.readouterr().err  # this teacher is sure: one entry is enough


@pytest.mark.parametrize(
    ("top_k", "tail", "found", "advice"),
    [
        (64, "uniform", 49_152, "Leave --tail out"),
        (4097, "bucket", 4097, "Give --top-k 4096"),
        (60_000, "renormalise", 49_152, "Give --top-k 4096"),
    ],
)
def test_all_pairs_of_too_many_tokens_are_refused(
    tmp_path: Path, top_k: int, tail: str, found: int, advice: str
) -> None:
    """One position would take gigabytes: 16 bytes for each pair of its outcomes."""

    def cache_of(top_k: int) -> CacheReader:
        return CacheReader(open_folder(tmp_path), {"teacher": {"vocab_size": 49_152}, "logprobs": {"top_k": top_k}})

    given = {"cache": "c", "student": "s", "out": Path("o"), "tail": tail}
    message = rf"all pairs of them are too many: found {found} tokens, expected at most 4096 .*\. {advice}, or give --o"
    with pytest.raises(UserError, match=message):
        check_distributions(cache_of(top_k), None, TrainConfig(**given))
    check_distributions(cache_of(top_k), None, TrainConfig(**given, objective="jeffreys"))
    if tail != "uniform":
        check_distributions(cache_of(top_k), None, TrainConfig(**given, top_k=4096))
        check_distributions(cache_of(4096), None, TrainConfig(**given))
