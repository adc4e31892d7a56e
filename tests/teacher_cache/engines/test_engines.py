"""Both engines against each other: the same ids give the same log-probs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineOptions,
    EngineResult,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.engines.open import open_engine, resolve_engine
from dpkd.teacher_cache.engines.transformers_engine import batches_to_score
from dpkd.teacher_cache.engines.vllm.engine import VllmEngine
from dpkd.teacher_cache.options.cache import CacheConfig

pytestmark = pytest.mark.engine

PROMPTS = [[5, 9, 33], [7] * 40, [300, 301, 302, 303], [11, 12]]
OPTIONS = EngineOptions(max_length=96, top_k=12, dtype="float32", max_num_seqs=3)
KV_BYTES = 2**27


@pytest.fixture(scope="module")
def vllm(toy_teacher: Path) -> Iterator[VllmEngine]:
    options = replace(OPTIONS, engine_args={"kv_cache_memory_bytes": str(KV_BYTES)})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        with VllmEngine(locate_model(str(toy_teacher), "teacher"), options) as engine:
            yield engine
    gc.collect()


@pytest.fixture(scope="module")
def transformers(toy_teacher: Path) -> Iterator[Engine]:
    with open_engine("transformers", locate_model(str(toy_teacher), "teacher"), OPTIONS) as engine:
        yield engine


def generate(engine: Engine, **changes: object) -> dict[int, EngineResult]:
    sampling = Sampling(**({"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20, "stop_token_ids": (0,)} | changes))  # type: ignore[arg-type]
    requests = (GenerateRequest(i, ids, seed=100 + i) for i, ids in enumerate(PROMPTS))
    return {result.index: result for result in engine.generate(requests, sampling)}


def score(engine: Engine, responses: dict[int, EngineResult]) -> dict[int, EngineResult]:
    requests = (ScoreRequest(i, PROMPTS[i], result.response_ids) for i, result in responses.items())
    return {result.index: result for result in engine.score(requests)}


def assert_same_scores(one: EngineResult, two: EngineResult, tolerance: float = 1e-3) -> None:
    assert one.response_ids.tolist() == two.response_ids.tolist()
    assert np.abs(one.logprobs_T - two.logprobs_T).max() < tolerance
    assert one.distributions is not None
    assert two.distributions is not None
    assert one.distributions.counts_T.tolist() == two.distributions.counts_T.tolist()
    assert np.abs(one.distributions.logprobs_E - two.distributions.logprobs_E).max() < tolerance
    assert np.abs(one.distributions.log_tail_T - two.distributions.log_tail_T).max() < 10 * tolerance


def test_sampled_responses_are_scored_the_same_by_both(vllm: Engine, transformers: Engine) -> None:
    drawn = generate(vllm)
    assert sorted(drawn) == [0, 1, 2, 3]
    again = score(vllm, drawn)
    reference = score(transformers, drawn)
    for index, result in drawn.items():
        # generation and scoring agree, and both agree with transformers
        assert_same_scores(result, again[index])
        assert_same_scores(result, reference[index])


def test_greedy_responses_are_the_same(vllm: Engine, transformers: Engine) -> None:
    ours, theirs = generate(vllm, temperature=0.0), generate(transformers, temperature=0.0)
    for index in ours:
        assert ours[index].response_ids.tolist() == theirs[index].response_ids.tolist()
        assert ours[index].finish_reason == theirs[index].finish_reason


def test_logprobs_are_raw_whatever_the_temperature(vllm: Engine, transformers: Engine) -> None:
    for engine in (vllm, transformers):
        drawn = generate(engine, temperature=0.3, top_p=0.8)
        scores = score(transformers, drawn)
        for index in drawn:
            assert_same_scores(drawn[index], scores[index])


def test_draws_depend_on_the_seed_alone(vllm: Engine, transformers: Engine) -> None:
    sampling = Sampling(1.0, 1.0, 12, (0,))
    for engine in (vllm, transformers):
        alone = next(iter(engine.generate([GenerateRequest(7, PROMPTS[2], seed=102)], sampling)))
        among = generate(engine, max_new_tokens=12)[2]
        assert alone.response_ids.tolist() == among.response_ids.tolist()


def test_stop_tokens_end_a_response_and_are_kept(vllm: Engine, transformers: Engine) -> None:
    for engine in (vllm, transformers):
        first = generate(engine, temperature=0.0)[0].response_ids.tolist()
        stop = first[2]
        cut = generate(engine, temperature=0.0, stop_token_ids=(stop,))[0]
        assert cut.finish_reason == "stop"
        assert cut.response_ids.tolist() == first[: first.index(stop) + 1]


def test_only_the_given_stop_tokens_end_a_response(vllm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "allowed_token_ids", [0, 5, 9])  # 0 is the EOS of the model's config
    drawn = generate(vllm, temperature=2.0, stop_token_ids=(9,)).values()
    assert any(0 in result.response_ids for result in drawn)
    for result in drawn:
        ended = result.response_ids[-1] == 9
        assert (result.finish_reason, 9 in result.response_ids[:-1]) == ("stop" if ended else "length", False)
        assert ended or len(result.response_ids) == 20


def test_an_abandoned_generation_leaves_the_engine_usable(vllm: Engine) -> None:
    requests = (GenerateRequest(i, PROMPTS[i % 4], seed=i) for i in range(12))
    results = vllm.generate(requests, Sampling(1.0, 1.0, 20, (0,)))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert sorted(generate(vllm)) == [0, 1, 2, 3]


def test_the_real_teacher_scores_the_same_in_both(teacher_dir: Path) -> None:
    model = locate_model(str(teacher_dir), "teacher")
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why is the sky blue?"}], add_generation_prompt=True, return_dict=False
    )
    answer = [*model.tokenizer.encode("Because of Rayleigh scattering, which favours short waves."), 2]
    options = EngineOptions(max_length=128, top_k=64, dtype="float32", max_num_seqs=2)
    found = {}
    for name in ("vllm", "transformers"):
        with open_engine(name, model, options) as engine:  # type: ignore[arg-type]
            found[name] = next(iter(engine.score([ScoreRequest(0, prompt, answer)])))
        gc.collect()
    assert np.abs(found["vllm"].logprobs_T - found["transformers"].logprobs_T).max() < 1e-3
    ours, theirs = found["vllm"].distributions, found["transformers"].distributions
    assert ours is not None
    assert theirs is not None
    assert np.abs(ours.logprobs_E - theirs.logprobs_E).max() < 1e-3
    assert (ours.ids_E == theirs.ids_E).mean() > 0.99  # entries of equal log-prob may change places


def test_the_kv_cache_on_a_cpu_is_that_of_the_engine_argument(vllm: VllmEngine) -> None:
    assert vllm._llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes == KV_BYTES
    # nothing is left behind for the next engine in this process
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ


def test_long_responses_are_scored_in_smaller_batches() -> None:
    """Batches hold full logits of every padded response: rows alone do not bound them."""
    lengths = [3, 3, 3, 3, 3, 9, 3, 3, 40, 3]
    requests = [ScoreRequest(index, [1], [2] * length) for index, length in enumerate(lengths)]
    batches = list(batches_to_score(requests, rows=4, positions=20))
    assert [request for batch in batches for request in batch] == requests
    # 4 rows of 4 positions; 4 and then 10 are 20; a third row would make 30
    assert [[len(request.response_ids) for request in batch] for batch in batches] == [
        [3, 3, 3, 3], [3, 9], [3, 3], [40], [3],
    ]  # fmt: skip


def test_auto_is_vllm_where_it_is_installed() -> None:
    assert resolve_engine("auto") == "vllm"
    assert resolve_engine("transformers") == "transformers"


@pytest.mark.parametrize("temperature", [2.5, 0.001])
@pytest.mark.parametrize("engine", ["vllm", "server"])
def test_a_temperature_that_vllm_would_refuse_or_change_is_an_error(
    engine: str, temperature: float, toy_teacher: Path, toy_data: Path, tmp_path: Path
) -> None:
    urls = {"server_url": "http://127.0.0.1:1"} if engine == "server" else {}
    config = CacheConfig.parse(
        {"teacher": str(toy_teacher), "data": str(toy_data), "out": str(tmp_path / "cache"), "engine": engine}
        | {"temperature": temperature, **urls},
        where="a test",
    )
    with pytest.raises(UserError, match=rf"vLLM cannot draw .*: found {temperature:g}, expected 0, or 0.01 to 2"):
        build_cache(config)
    assert not (tmp_path / "cache").exists()


def test_a_sequence_beyond_the_positions_is_an_error(toy_teacher: Path) -> None:
    with pytest.raises(
        UserError, match="are longer than the model's positions: found 600 tokens, expected at most 512"
    ):
        open_engine(
            "vllm", locate_model(str(toy_teacher), "teacher"), EngineOptions(max_length=600, top_k=0, dtype="float32")
        )
