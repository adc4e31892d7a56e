"""A model measured on a cache's rows, against plain torch on full logits in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from support.reference import entries_of, full_logprobs, merged, read_rows
from support.toys import make_toy
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.distill.student.measures import measure_model
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache

BETA = 0.3


@torch.no_grad()
def plain_measures(model_dir: Path, cache_dir: Path) -> dict[str, float]:
    """The same values with sums over single positions; every row of the cache."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).double().eval()
    found: dict[str, list[float]] = {name: [] for name in ("nll", "kl", "rkld", "kld_first", "rkld_first", "agrees")}
    found |= {"reward": [], "reward_sum": []}
    for row, _ in read_rows(TeacherCache.open(cache_dir), None):
        log_q_TV, ids = full_logprobs(model, row), row.response_ids.tolist()
        log_q_of_ids = [float(log_q_TV[place, token]) for place, token in enumerate(ids)]
        for place, (entries, rest) in enumerate(entries_of(row)):
            log_p = merged({**entries, -1: rest}, log_q_TV.shape[1])
            tokens = [token for token in log_p if token >= 0]
            q = [math.exp(float(log_q_TV[place, token])) for token in tokens]
            p = [math.exp(log_p[token]) for token in tokens]
            q, p = [*q, 1 - sum(q)], [*p, math.exp(log_p[-1])]
            p = [value / sum(p) for value in p]
            forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
            backward = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            found["kl"].append(forward)
            found["rkld"].append(backward)
            if place == 0:
                found["kld_first"].append(forward)
                found["rkld_first"].append(backward)
            found["agrees"].append(int(log_q_TV[place].argmax()) == tokens[0])
        found["nll"] += [-value for value in log_q_of_ids]
        log_ratio = sum(log_q_of_ids) - float(row.response_logprobs.astype("float64").sum())
        found["reward"].append(BETA * log_ratio / len(ids))
        found["reward_sum"].append(BETA * log_ratio)
    return {name: mean(values) for name, values in found.items()} | {"tokens": len(found["nll"])}


def test_measures_are_those_of_full_logits(toy_student: Path, toy_cache: Path) -> None:
    measures = measure_model(str(toy_student), toy_cache, num_rows=1000, beta=BETA, device="cpu")
    plain = plain_measures(toy_student, toy_cache)
    assert (measures["rows"], measures["tokens"]) == (40, plain["tokens"])
    assert measures["beta"] == BETA
    assert measures["perplexity"] == pytest.approx(math.exp(plain["nll"]), rel=1e-4)
    assert measures["top1_agreement"] == pytest.approx(plain["agrees"])
    for name in ("kl", "rkld", "kld_first", "rkld_first", "reward", "reward_sum"):
        assert measures[name] == pytest.approx(plain[name], rel=1e-3), name
    assert abs(measures["kld_first"] - measures["kl"]) > 0.01  # the first token is told apart
    assert measures["reward"] < 0  # the student finds the teacher's responses less likely than the teacher does


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_measures_nearly_the_same(dtype: str, toy_student: Path, toy_cache: Path) -> None:
    whole, half = (
        measure_model(str(toy_student), toy_cache, num_rows=8, device="cpu", dtype=name) for name in ("float32", dtype)
    )
    for name in ("kl", "rkld", "perplexity", "reward"):
        assert half[name] == pytest.approx(whole[name], rel=0.02), name


def test_the_teacher_has_no_distance_from_its_cache(toy_teacher: Path, toy_cache: Path) -> None:
    measures = measure_model(str(toy_teacher), toy_cache, num_rows=9, device="cpu")
    assert measures["rows"] == 9
    for name in ("kl", "rkld", "kld_first", "rkld_first", "reward", "reward_sum"):
        assert measures[name] == pytest.approx(0, abs=1e-3), name


def test_a_cache_without_distributions_gives_nulls(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(f"{line}\n" for line in toy_data.read_text().splitlines()[:3]))
    options: dict[str, Any] = {"teacher": str(toy_teacher), "data": str(short), "out": tmp_path / "cache"}
    options |= {"engine": "transformers", "template": "chat", "max_new_tokens": 5, "top_k": 0, "responses": "reference"}
    build_cache(CacheConfig(**options))
    measures = measure_model(str(toy_student), tmp_path / "cache", num_rows=3, device="cpu")
    nulls = {name for name, value in measures.items() if value is None}
    assert nulls == {"kl", "rkld", "kld_first", "rkld_first", "top1_agreement"}
    assert measures["reward_sum"] == pytest.approx(5 * measures["reward"], rel=1e-5)  # each of 5 tokens


def test_a_model_of_another_tokenizer_is_refused(other_student: Path, toy_cache: Path) -> None:
    with pytest.raises(UserError, match="the model's tokenizer is not the cache's"):
        measure_model(str(other_student), toy_cache, num_rows=3, device="cpu")


def test_a_model_of_another_template_is_refused(
    tmp_path: Path, toy_tokenizer: Path, toy_student: Path, toy_cache: Path
) -> None:
    model = make_toy(tmp_path / "m", toy_tokenizer, layers=1, seed=4)
    (model / "dpkd.json").write_text(json.dumps({"template": {"name": "alpaca", "sha256": "0" * 64}}))
    with pytest.raises(
        UserError, match=r"prompt template is not the cache's: found alpaca \(sha256 000.* expected chat"
    ):
        measure_model(str(model), toy_cache, num_rows=3, device="cpu")
    (model / "dpkd.json").write_text("{}")
    with pytest.raises(UserError, match=r"dpkd\.json has no template"):
        measure_model(str(model), toy_cache, num_rows=3, device="cpu")
    told = {"template": TeacherCache.open(toy_cache).identities["template"]}
    (model / "dpkd.json").write_text(json.dumps(told))
    assert measure_model(str(model), toy_cache, num_rows=3, device="cpu")["rows"] == 3
    other = Path(shutil.copytree(toy_student, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="prompt template is not the cache's: found chat"):
        measure_model(str(other), toy_cache, num_rows=3, device="cpu")
