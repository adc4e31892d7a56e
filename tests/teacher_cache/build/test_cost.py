"""The cost of a cache from a pilot: counts and sizes against the real job, times against laws with known rates."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import dpkd
from support.openai_endpoint import rows_of, serving_toy

from dpkd.core.errors import UserError
from dpkd.teacher_cache.build import estimate
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.build.cost import CacheCost, Phase
from dpkd.teacher_cache.build.estimate import estimate_cost
from dpkd.teacher_cache.build.pilot import PilotRun, Slots, decoding_steps, fit_rates, pick_evenly
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.rows import PlannedRow


def row(index: int) -> PlannedRow:
    return PlannedRow(index, f"e{index}", 0, "teacher", "", [1])


def test_steps_of_a_queue_by_hand() -> None:
    # two slots: 3 | 1, then 2 in the slot that is free first
    assert decoding_steps([3, 1, 2], Slots(2)) == 3
    assert decoding_steps([3, 1, 2, 4], Slots(2)) == 7
    assert decoding_steps([3, 1, 2, 4], Slots(2, refilled=False)) == 3 + 4
    assert decoding_steps([3, 1, 2], Slots(8)) == 3


def test_rates_are_those_that_made_the_times() -> None:
    steps, tokens = (90.0, 96.0), (600.0, 2100.0)
    times = [0.02 * s + 0.004 * t for s, t in zip(steps, tokens, strict=True)]
    assert fit_rates(list(zip(steps, tokens, times, strict=True))) == pytest.approx((0.02, 0.004))
    # scored rows have no steps
    assert fit_rates([(0, 100, 1.0), (0, 300, 3.2)]) == pytest.approx((0, 4.2 / 400))
    # noise that would make one rate negative leaves the other
    assert fit_rates([(100, 100, 2.0), (100, 900, 1.9)]) == pytest.approx((3.9 / 200, 0))
    assert fit_rates([(100, 100, 0.5), (100, 900, 9.0)]) == pytest.approx((0, 9.5 / 1000))


def test_rows_of_a_pilot_are_spread_over_the_data() -> None:
    picked = sorted(r.index for r in pick_evenly(map(row, range(1000)), 1000, 11))
    assert picked[0] == 0
    assert picked[-1] == 999
    assert np.diff(picked) == pytest.approx(100, abs=1)
    assert sorted(r.index for r in pick_evenly(map(row, range(3)), 3, 11)) == [0, 1, 2]


@pytest.mark.parametrize("refilled", [True, False])
@pytest.mark.parametrize(("per_step", "per_token"), [(0.03, 1e-4), (1e-3, 2e-3)])
def test_a_pilot_with_a_half_empty_engine_foretells_a_full_one(
    refilled: bool, per_step: float, per_token: float
) -> None:
    """The time of 5,000 rows on 64 slots from 32 rows, on machines where steps cost most, and where tokens do."""
    rng, slots = np.random.default_rng(3), Slots(64, refilled)

    def law(lengths: np.ndarray, prompts: np.ndarray) -> float:
        return per_step * decoding_steps(lengths.tolist(), slots) + per_token * float(lengths.sum() + prompts.sum())

    lengths, prompts = rng.integers(5, 97, 5000), rng.integers(20, 60, 5000)
    pilot = rng.choice(5000, 32, replace=False)
    parts = [slice(0, 8), slice(8, 32)]
    groups = [(part, law(lengths[pilot][part], prompts[pilot][part])) for part in parts]
    run = PilotRun([row(i) for i in range(32)], groups, 0, prompts[pilot], lengths[pilot])
    actual = law(lengths, prompts)
    assert run.seconds(5000, slots, drawn=True) == pytest.approx(actual, rel=1.5 * run.relative_error)
    # the rate of the pilot alone would not do where steps cost most
    if per_step > 0.01:
        naive = sum(taken for _, taken in groups) / 32 * 5000
        assert naive > 1.5 * actual


@pytest.fixture
def job(toy_teacher: Path, repeat_rows: Callable[[Path, int], Path], tmp_path: Path) -> dict[str, Any]:
    """A job of some seconds, with a row that is skipped."""
    data = repeat_rows(tmp_path / "many.jsonl", 12)
    with data.open("a") as file:
        file.write(json.dumps({"instruction": "word " * 400, "output": "x"}) + "\n")
    return {
        "teacher": str(toy_teacher), "data": str(data), "out": str(tmp_path / "cache"), "engine": "transformers",
        "template": "chat", "max_new_tokens": 24, "top_k": 16, "rows_per_shard": 48,
    }  # fmt: skip


def test_an_estimate_is_near_the_real_job(job: dict[str, Any]) -> None:
    config = CacheConfig(**job, responses="both", dry_run=True, pilot_rows=48, price_per_hour=2.0)
    cost = estimate_cost(config)
    assert not Path(job["out"]).exists()

    started_s = time.monotonic()
    manifest = build_cache(config.model_copy(update={"dry_run": False}))
    taken_s = time.monotonic() - started_s
    assert cost.num_rows == manifest.counts["rows"]
    assert cost.num_skipped == len(manifest.skipped) == 1
    drawn = sum(record.positions for record in manifest.shards if record.origin == "teacher")
    generated = sum(phase.generated for phase in cost.phases)
    assert generated == pytest.approx(drawn, rel=2 * cost.phases[0].relative_error)
    assert cost.num_bytes == pytest.approx(manifest.counts["bytes"], rel=0.25)
    # the bound is wide for busy machines; benchmarks/cost_estimates.py measures how near it is
    assert taken_s / 3 < cost.seconds < taken_s * 3
    assert cost.live_epoch_s is not None
    assert cost.live_runs == int(np.ceil(cost.seconds / cost.live_epoch_s))
    assert "dry_run" not in Path(job["out"], "dpkd.toml").read_text()


def test_a_round_is_estimated_in_both_phases(cache_copy: Path, toy_teacher: Path, toy_student: Path) -> None:
    models = {"teacher": str(toy_teacher), "student": str(toy_student), "engine": "transformers"}
    config = CacheConfig(out=str(cache_copy), round="r1", **models, dry_run=True, pilot_rows=8)
    before = sorted(cache_copy.rglob("*"))
    cost = estimate_cost(config)
    assert sorted(cache_copy.rglob("*")) == before
    manifest = build_cache(config.model_copy(update={"dry_run": False}))
    assert cost.num_rows == manifest.counts["rows"]
    assert [phase.label for phase in cost.phases] == ["student responses", "teacher scores"]
    assert all(phase.start_s > 0 for phase in cost.phases)
    assert "live teacher: not measured" in cost.text()


def test_a_teacher_that_does_not_fit_live_leaves_the_caches_cost(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is filled by another engine, which may hold a teacher that transformers cannot."""
    opened = estimate.open_engine

    def open_engine(name: str, *arguments: Any, **options: Any) -> Any:
        engine = opened(name, *arguments, **options)
        monkeypatch.setattr(engine, "_score_batch", out_of_memory)
        return engine

    def out_of_memory(_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 40.00 GiB")

    monkeypatch.setattr(estimate, "open_engine", open_engine)
    cost = estimate_cost(CacheConfig(**job, dry_run=True, pilot_rows=4))
    assert cost.seconds > 0
    assert cost.live_epoch_s is None
    assert "live teacher: not measured, because it runs out of memory by transformers" in cost.text()


def test_the_text_has_hours_sizes_and_price() -> None:
    phase = Phase("teacher responses", 1_000_000, 60.0, 36_000.0, 2.0e8, 9.9e7, 3.3e10, 0.05)
    cost = CacheCost("c", "vllm", "cuda", 4, 0, 340.0, [phase], 9_000.0, "", 14_000_000_000, 2.5, 32)
    text = cost.text()
    assert "10.1 h (9.6 h to 10.6 h): 40 GPU hours" in text
    assert "200,000,000 generated, 99,000,000 of prompts" in text
    assert "33.0 GB" in text
    assert f"price     {36_400 * 4 / 3600 * 2.5:.2f}" in text
    assert "after 5 student runs of one epoch" in text  # 36,400 s against 9,000 s
    assert "not measured, because of this" in replace(cost, live_epoch_s=None, no_live_reason="because of this").text()


def test_the_command_prints_the_estimate_and_writes_nothing(job: dict[str, Any]) -> None:
    options = [part for key, value in job.items() for part in (f"--{key.replace('_', '-')}", value)]
    result = dpkd("cache-teacher", *options, "--dry-run", "--pilot-rows", 6, "--price-per-hour", 3.6e6)
    assert result.returncode == 0, result.stderr
    price = re.search(r"price +([\d.,]+)", result.stdout)
    assert price
    assert float(price[1].replace(",", "")) > 1  # a millisecond costs 1; from a second on there is a comma
    assert "from a pilot of 6 rows (transformers on cpu)" in result.stdout
    assert not Path(job["out"]).exists()


def test_a_pilot_without_a_dry_run_is_refused(job: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--pilot-rows goes with --dry-run"):
        CacheConfig.parse(job | {"pilot_rows": 8}, where="here")


def test_an_endpoint_is_estimated_by_its_prices(
    toy_teacher: Path, repeat_rows: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    data, out = repeat_rows(tmp_path / "many.jsonl", 4), tmp_path / "cache"
    with serving_toy(toy_teacher) as (_, endpoint):
        options = {
            "teacher": str(toy_teacher), "data": str(data), "out": str(out), "engine": "openai",
            "teacher_url": endpoint.url, "teacher_model": "toy", "template": "chat", "max_new_tokens": 12,
            "price_in": 100.0, "price_out": 300.0,
        }  # fmt: skip
        config = CacheConfig.parse(options | {"dry_run": True, "pilot_rows": 24}, where="a test")
        cost = estimate_cost(config)
        assert not out.exists()
        manifest = build_cache(CacheConfig.parse(options, where="a test"))
    assert cost.num_rows == manifest.counts["rows"] + manifest.counts["failed"]
    rows = rows_of(out)
    prompts, answers = (
        sum(len(ids) for ids in lists) for lists in zip(*((r.prompt_ids, r.response_ids) for r in rows), strict=True)
    )
    assert cost.price == pytest.approx((100 * prompts + 300 * answers) / 1e6, rel=0.15)
    assert "live teacher: not measured, because the teacher is on a server" in cost.text()
    with pytest.raises(UserError, match="give --price-in and --price-out"):
        CacheConfig.parse(options | {"dry_run": True, "price_per_hour": 2.0}, where="a test")
