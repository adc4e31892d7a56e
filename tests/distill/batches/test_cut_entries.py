"""`--top-k` and `--top-mass` of `dpkd train`: a run on fewer entries than the cache keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import cut_entries
from dpkd.distill.batches.collate import collate
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.sources import CacheRows
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache


def first_line(out: Path, cache: Path, student: Path, **options: Any) -> dict[str, Any]:
    shared = {"steps": 1, "batch_size": 8, "device": "cpu", "responses": "teacher", "objective": "forward-kl"}
    shared |= {"validation_examples": 4}
    run = train(TrainConfig(out=out, cache=str(cache), student=str(student), **(shared | options)))
    line, start = (json.loads((run / f"{log}.jsonl").read_text().splitlines()[0]) for log in ("metrics", "validation"))
    return line | {f"{name} at the start": start[name] for name in ("loss", "kld")}


@pytest.mark.parametrize(("cut", "built"), [({"top_k": 4}, {"top_k": 4}), ({"top_mass": 0.5}, {"top_mass": 0.5})])
def test_a_cut_cache_trains_as_one_that_was_built_so(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path, cut: dict[str, Any], built: dict[str, Any]
) -> None:
    """The same teacher and seed answer alike, so the two caches differ in their entries alone."""
    options: dict[str, Any] = {
        "teacher": str(toy_teacher), "data": str(toy_data), "engine": "transformers", "template": "chat",
        "max_new_tokens": 6, "device": "cpu",
    }  # fmt: skip
    build_cache(CacheConfig(out=str(tmp_path / "large"), top_k=128, **options))
    build_cache(CacheConfig(out=str(tmp_path / "small"), **options, **built))
    one = first_line(tmp_path / "a", tmp_path / "large", toy_student, **cut)
    two = first_line(tmp_path / "b", tmp_path / "small", toy_student)
    whole = first_line(tmp_path / "c", tmp_path / "large", toy_student)
    for name in ("loss", "kld", "rkld", "grad_norm", "loss at the start", "kld at the start"):
        # stored logs lie on a grid of 1/128 nat, so masses near the limit and the tail differ a little
        assert math.isclose(one[name], two[name], rel_tol=0.02), name
    for name in ("loss", "kld at the start"):
        assert one[name] < whole[name] - 0.05  # merging outcomes lowers a divergence
    ((key, value),) = cut.items()
    with pytest.raises(
        UserError, match=f"{key} is more than the cache keeps: found {key} .*, expected at most {value}"
    ):
        first_line(tmp_path / "d", tmp_path / "small", toy_student, **{key: value * 1.5 if value < 1 else value + 1})


def test_no_mass_is_lost(toy_cache: Path) -> None:
    cache = TeacherCache.open(toy_cache)
    rows = CacheRows(cache, cache.shards("teacher"))
    batch = collate([rows.row(0, index) for index in range(3)], with_distributions=True)
    assert batch.entry_logprobs_TK is not None
    assert batch.log_tail_T is not None
    mass_T = batch.entry_logprobs_TK.exp().sum(1) + batch.log_tail_T.exp()
    for limits in ((1, None), (5, None), (None, 0.3), (7, 0.6), (16, None)):
        cut = cut_entries(batch, *limits)
        assert cut.entry_logprobs_TK is not None
        assert cut.log_tail_T is not None
        assert cut.entry_counts_T is not None
        torch.testing.assert_close(cut.entry_logprobs_TK.exp().sum(1) + cut.log_tail_T.exp(), mass_T)
        assert int(cut.entry_counts_T.max()) <= (limits[0] or 16)
        assert int(cut.entry_counts_T.min()) >= 1
    assert cut_entries(batch, None, None) is batch


def test_more_entries_than_the_cache_keeps_are_refused(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    with pytest.raises(UserError, match="top_k is more than the cache keeps: found top_k 17, expected at most 16"):
        first_line(tmp_path / "run", toy_cache, toy_student, top_k=17)
    with pytest.raises(UserError, match="--data has none"):
        TrainConfig.parse({"data": "d", "student": "s", "out": "o", "objective": "sft", "top_k": 3}, where="here")
