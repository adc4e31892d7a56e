"""Fidelity by value: against full logits, shards decoded by hand, and a cache of the full vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.teacher_cache.audit import fidelity, fidelity_measures
from dpkd.teacher_cache.audit.fidelity import measure_fidelity, spread_rows
from dpkd.teacher_cache.audit.fidelity_measures import FullDistributions, Scores, compare, full_distributions
from dpkd.teacher_cache.audit.fidelity_table import fidelity_table
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.engines.engine import Distributions
from dpkd.teacher_cache.options.audit import FidelityConfig
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.store.reader import TeacherCache

CONTROLS = ("live_vs_itself", "live_vs_transformers")
NOISE_NATS = 1e-4  # float32 on toy models, other batches


def build(out: Path, teacher: Path, data: Path, **options: object) -> Path:
    defaults: dict[str, object] = {
        "engine": "transformers",
        "template": "chat",
        "max_new_tokens": 12,
        "rows_per_shard": 4,
        "limit": 6,
    }
    build_cache(CacheConfig(out=out, teacher=str(teacher), data=str(data), **(defaults | options)))
    return out


def measure(cache: Path, teacher: Path, **options: object) -> dict[str, Any]:
    defaults: dict[str, object] = {"engine": "transformers"}
    return measure_fidelity(FidelityConfig(cache=str(cache), teacher=str(teacher), **(defaults | options)))


def positions_by_hand(cache: Path, teacher: Path) -> list[dict[str, Any]]:
    """Every position of a cache: the live log-probs [V] and what the Parquet files hold, decoded as the docs say."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    found = []
    for path in sorted((cache / "shards").iterdir()):
        for row in pq.read_table(path).to_pylist():
            with torch.no_grad():
                logits_SV = model(input_ids=torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
            begin = 0
            for place, token in enumerate(row["response_ids"]):
                end = begin + row["entry_counts"][place]
                found.append(
                    {
                        "live_V": torch.log_softmax(logits_SV[len(row["prompt_ids"]) - 1 + place].double(), dim=0),
                        "token": token,
                        "logprob": row["response_logprobs"][place],
                        "ids": row["entry_ids"][begin:end],
                        "kept": torch.tensor(-np.cumsum(row["entry_logprob_steps"][begin:end]) / 128),
                        "outside": np.exp(np.float64(row["log_remainder"][place])),
                    }
                )
                begin = end
    return found


def kl_by_hand(live_V: torch.Tensor, ids: list[int], kept: torch.Tensor, outside: float) -> float:
    """torch's own KL from the live distribution to the entries with the mass outside spread evenly."""
    probs_V = torch.full_like(live_V, outside / max(len(live_V) - len(ids), 1))
    probs_V[ids] = kept.exp().to(probs_V.dtype)
    live, cached = (torch.distributions.Categorical(probs=p) for p in (live_V.exp(), probs_V))  # scaled to sum to 1
    return float(torch.distributions.kl_divergence(live, cached))


def test_every_figure_is_the_one_found_by_hand(toy_cache: Path, toy_teacher: Path) -> None:
    report = measure(toy_cache, toy_teacher, limit=1000)
    assert report == json.loads(json.dumps(report, allow_nan=False))
    at = positions_by_hand(toy_cache, toy_teacher)
    assert (report["rows"], report["positions"], report["entries"]) == (40, len(at), 16 * len(at))

    sampled = np.array([abs(float(p["live_V"][p["token"]]) - p["logprob"]) for p in at])
    errors_TK = np.array([(p["live_V"][p["ids"]] - p["kept"]).abs().tolist() for p in at])
    probs_TK = np.array([p["live_V"][p["ids"]].exp().tolist() for p in at])
    for against in ("cached_vs_live", "cached_vs_transformers"):
        found = report[against]
        assert found["sampled"]["max"] == pytest.approx(sampled.max(), abs=2e-5)
        assert found["sampled"]["mean"] == pytest.approx(sampled.mean(), abs=2e-5)
        assert found["entries"]["max"] == pytest.approx(errors_TK.max(), abs=2e-5)
        assert found["entries"]["mean"] == pytest.approx(errors_TK.mean(), abs=2e-5)
        assert found["entries"]["weighted_mean"] == pytest.approx((probs_TK * errors_TK).sum(axis=1).mean(), abs=2e-5)

    loss = report["distributions"]
    kept = [(p["live_V"], p["ids"], p["kept"], p["outside"]) for p in at]
    exact = [(live_V, ids, live_V[ids], 1 - float(live_V[ids].exp().sum())) for live_V, ids, _, _ in kept]
    kl, kl_cut = (float(np.mean([kl_by_hand(*position) for position in held])) for held in (kept, exact))
    assert loss["kl"] == pytest.approx(kl, abs=1e-5)
    assert loss["kl_cut"] == pytest.approx(kl_cut, abs=1e-5)
    assert loss["kl_grid"] == pytest.approx(kl - kl_cut, abs=1e-6)
    assert loss["mass_kept"] == pytest.approx(probs_TK.sum(axis=1).mean(), abs=1e-6)
    tail_errors = np.array([abs(outside - (1 - float(live_V[ids].exp().sum()))) for live_V, ids, _, outside in kept])
    assert loss["tail_error"]["max"] == pytest.approx(tail_errors.max(), abs=1e-6)
    totals = np.array([abs(float(p["kept"].exp().sum()) + p["outside"] - 1) for p in at])
    assert loss["total_error"]["max"] == pytest.approx(totals.max(), abs=1e-6)
    assert loss["total_error"]["mean"] == pytest.approx(totals.mean(), abs=1e-6)


def test_the_bound_holds_and_the_controls_are_near_zero(toy_cache: Path, toy_teacher: Path) -> None:
    report = measure(toy_cache, toy_teacher, limit=10)
    assert report["rows"] == 10
    for control in CONTROLS:
        assert report[control]["sampled"]["max"] < NOISE_NATS
        assert report[control]["entries"]["max"] < NOISE_NATS
        assert report[control]["entries"]["positions_with_other_ids"] == 0
    assert report["cached_vs_live"]["sampled"]["max"] < NOISE_NATS
    bound = report["bound"]
    assert bound["holds"]
    assert bound["grid_nats"] == 1 / 256
    # half a step is used up by some of the entries, or the codec would be finer than it claims
    assert 0.9 / 256 < bound["max_error_nats"] <= 1 / 256 + NOISE_NATS

    files = list((toy_cache / "shards").iterdir())
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    positions = sum(len(row["response_ids"]) for row in rows)
    assert report["size"]["bytes_per_position"] == sum(path.stat().st_size for path in files) / positions
    assert report["size"]["bytes_per_entry"] == report["size"]["bytes_per_position"] / 16


def test_the_whole_vocabulary_loses_only_the_grid(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    cache = build(tmp_path / "all", toy_teacher, toy_data, top_k=600)
    report = measure(cache, toy_teacher)
    loss = report["distributions"]
    assert abs(loss["kl_cut"]) < 1e-6
    assert 0 <= loss["kl"] < MAX_ERROR_NATS**2
    assert loss["mass_kept"] == pytest.approx(1, abs=1e-6)
    assert loss["tail_error"]["max"] < 1e-6
    live_V = positions_by_hand(cache, toy_teacher)[0]["live_V"]
    full = FullDistributions(live_V[None].float())
    ids_V = live_V.argsort(descending=True)
    exact = Distributions(
        np.array([600], np.int32),
        ids_V.numpy().astype(np.int32),
        live_V[ids_V].float().numpy(),
        np.array([-np.inf], np.float32),
    )
    assert abs(full.loss_of(exact).kl_T[0]) < 1e-6


def test_kl_falls_as_more_is_kept(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    found = []
    for top_k in (2, 16, 128):
        cache = build(tmp_path / str(top_k), toy_teacher, toy_data, top_k=top_k, responses="reference")
        found.append(measure(cache, toy_teacher)["distributions"])
    kls, masses = ([loss[key] for loss in found] for key in ("kl", "mass_kept"))
    assert kls == sorted(kls, reverse=True)
    assert kls[0] > 2 * kls[2] > 0
    assert masses == sorted(masses)
    assert all(0 < loss["kl_grid"] < 1e-4 for loss in found)


def test_an_adaptive_cache(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    cache = build(tmp_path / "adaptive", toy_teacher, toy_data, top_mass=0.3, max_top_k=64)
    report = measure(cache, toy_teacher)
    at = positions_by_hand(cache, toy_teacher)
    counts = np.array([len(p["ids"]) for p in at])
    assert len(set(counts)) > 3
    assert (report["cache"]["top_k"], report["cache"]["top_mass"]) == (64, 0.3)
    assert report["entries"] == counts.sum()
    assert report["size"]["entries_per_position"] == pytest.approx(counts.mean())
    kl = float(np.mean([kl_by_hand(p["live_V"], p["ids"], p["kept"], p["outside"]) for p in at]))
    assert report["distributions"]["kl"] == pytest.approx(kl, abs=1e-5)
    assert report["bound"]["holds"]
    assert "top mass 0.3, at most 64" in fidelity_table(report)


def test_a_cache_without_distributions(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    report = measure(build(tmp_path / "none", toy_teacher, toy_data, top_k=0), toy_teacher)
    assert report["entries"] == 0
    assert report["distributions"] is report["bound"] is report["size"]["bytes_per_entry"] is None
    for name in ("cached_vs_live", "cached_vs_transformers", *CONTROLS):
        assert report[name]["entries"] is None
        assert report[name]["sampled"]["max"] < NOISE_NATS
    assert "KL" not in fidelity_table(report)


def test_a_padded_vocabulary(tmp_path: Path, toy_teacher: Path, toy_tokenizer: Path, toy_data: Path) -> None:
    teacher = tmp_path / "padded"
    shutil.copytree(toy_tokenizer, teacher)
    model = AutoModelForCausalLM.from_pretrained(toy_teacher, dtype=torch.float32)
    model.resize_token_embeddings(640)
    model.save_pretrained(teacher)
    cache = build(tmp_path / "cache", teacher, toy_data, top_k=8, responses="reference")
    report = measure(cache, teacher)
    at = positions_by_hand(cache, teacher)
    assert len(at[0]["live_V"]) == report["cache"]["vocab_size"] == 640
    kl = float(np.mean([kl_by_hand(p["live_V"], p["ids"], p["kept"], p["outside"]) for p in at]))
    assert report["distributions"]["kl"] == pytest.approx(kl, abs=1e-5)


def test_another_teacher_is_refused(
    toy_cache: Path, toy_student: Path, toy_teacher: Path, other_student: Path, tmp_path: Path
) -> None:
    message = rf"the teacher is not the one of the cache: found weights_sha256 \w+ of {toy_student}, expected \w+ of "
    with pytest.raises(UserError, match=message + toy_teacher.name):
        measure(toy_cache, toy_student)
    mixed = Path(shutil.copytree(other_student, tmp_path / "mixed"))  # the teacher's weights with another tokenizer
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(toy_teacher / name, mixed / name)
    with pytest.raises(UserError, match="the teacher's tokenizer is not the cache's"):
        measure(toy_cache, mixed)


def test_rows_are_spread_evenly_and_are_always_the_same(toy_cache: Path) -> None:
    cache = TeacherCache.open(toy_cache)
    every = [(row.origin, row.example_id) for row in spread_rows(cache, 1000)]
    assert len(set(every)) == 40
    for limit, step in ((10, 4), (1, 40), (40, 1)):
        assert [(row.origin, row.example_id) for row in spread_rows(cache, limit)] == every[::step]


def test_chunks_of_positions_change_nothing(toy_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_teacher, dtype=torch.float32)
    prompt, response = [5, 9, 33], [300, 301, 7, 7, 12, 0, 44]

    def in_chunks(num_positions: int) -> list[tuple[slice, torch.Tensor]]:
        monkeypatch.setattr(fidelity_measures, "_CHUNK_LOGITS", 600 * num_positions)
        return [(part, full._logprobs_TV) for part, full in full_distributions(model, prompt, response)]

    ((part, whole_TV),) = in_chunks(7)
    assert part == slice(0, 7)
    for size, parts in ((1, 7), (3, 3)):
        chunks = in_chunks(size)
        assert len(chunks) == parts
        assert max(chunk.shape[0] for _, chunk in chunks) == size
        torch.testing.assert_close(torch.cat([chunk for _, chunk in chunks]), whole_TV, atol=1e-5, rtol=0)


def test_comparison_matches_entries_by_id() -> None:
    def scores(ids: list[int], logprobs: list[float], counts: list[int]) -> Scores:
        top = Distributions(np.array(counts), np.array(ids), np.log(logprobs), np.zeros(len(counts)))
        return Scores(np.array([-1.0, -2.0]), top)

    # position 0 in another order; position 1 with token 9 in place of 8
    one = scores([4, 5, 4, 9], [0.5, 0.3, 0.6, 0.1], [2, 2])
    two = scores([5, 4, 4, 8], [0.3, 0.25, 0.6, 0.1], [2, 2])
    found = compare(one, two, vocab_size=10)["entries"]
    assert found["positions_with_other_ids"] == 1
    assert found["max"] == pytest.approx(np.log(2))
    assert found["mean"] == pytest.approx(np.log(2) / 3)
    assert found["weighted_mean"] == pytest.approx(0.25 * np.log(2) / 2)


def test_the_table_names_what_was_measured(toy_cache: Path, toy_teacher: Path) -> None:
    report = measure(toy_cache, toy_teacher, limit=4)
    table = fidelity_table(report)
    for text in (
        f"4 of 40 rows of `{toy_cache}`",
        "top 16",
        "cache against live transformers",
        "control: live transformers against itself",
        f"| KL(teacher to cached), nats | {report['distributions']['kl']:.5f} |",
        "holds.",
    ):
        assert text in table
    for holds, text in ((False, "DOES NOT HOLD"), (None, "unknown, the controls are larger")):
        assert text in fidelity_table(report | {"bound": report["bound"] | {"holds": holds}})


def test_a_bound_is_broken_by_the_cache_alone_and_unknown_below_the_noise() -> None:
    def bound(error: float, itself: float, transformers: float) -> dict[str, Any]:
        errors = {"cached_vs_live": error, "live_vs_itself": itself, "live_vs_transformers": transformers}
        found = fidelity._bound({name: {"entries": {"max": value}} for name, value in errors.items()})
        assert found is not None
        return found

    assert bound(1 / 256, 0.0, 0.0)["holds"] is True
    assert bound(1 / 256 + 2e-5, 0.0, 1e-4)["holds"] is True
    assert bound(1 / 256 + 2e-5, 0.0, 0.0)["holds"] is False
    assert bound(0.01, 1e-3, 1e-4)["holds"] is False
    assert bound(0.4, 0.0, 0.5)["holds"] is None
    assert bound(0.6, 0.0, 0.5)["holds"] is False


def test_the_control_is_batched_otherwise() -> None:
    for number in range(5, 70):
        one, two = fidelity._two_orders([7 * i % 31 for i in range(number)])
        assert sorted(one) == sorted(two) == list(range(number))
        batches = [{frozenset(order[i : i + 4]) for i in range(0, number, 4)} for order in (one, two)]
        assert not batches[0] & batches[1]


@pytest.mark.engine
def test_vllm_scores_a_cache_of_its_own(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    cache = build(tmp_path / "vllm", toy_teacher, toy_data, engine="vllm", top_k=16, responses="both")
    report = measure(cache, toy_teacher, engine="auto", max_num_seqs=3)
    assert report["cache"]["engine"] == report["live"]["engine"] == "vllm"
    assert report["bound"]["holds"]
    for name in ("cached_vs_live", "cached_vs_transformers", *CONTROLS):
        assert report[name]["sampled"]["max"] < 1e-3
