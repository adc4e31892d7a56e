"""Samples of the training student: their distribution, and what they must not depend on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.distill.live.sampler import Sampler, open_sampler
from dpkd.distill.live.store import Drawn
from dpkd.distill.live.transformers_sampler import TransformersSampler
from dpkd.distill.live.vllm_sampler import VllmSampler
from dpkd.distill.options.train import TrainConfig
from dpkd.teacher_cache.engines.engine import GenerateRequest, Sampling, ScoreRequest, results_only

PROMPTS = [[5, 9, 33], [7] * 40, [300, 301, 302, 303], [11, 12], [599, 0, 3], [250] * 3]
CPU = torch.device("cpu")
GREEDY = Sampling(0.0, 1.0, 24, (0,))
DRAWN = Sampling(1.0, 1.0, 16, (0,))


@pytest.fixture(scope="module")
def source(toy_student: Path) -> ModelSource:
    return locate_model(str(toy_student), "student")


@pytest.fixture
def model(source: ModelSource) -> PreTrainedModel:
    return source.load("float32").eval()


def sampler_of(
    model: torch.nn.Module,
    sampling: Sampling,
    *,
    num_tokens: int = 600,
    copies: bool = False,
    autocast: torch.dtype | None = None,
    batch_size: int = 32,
) -> TransformersSampler:
    return TransformersSampler(
        model, sampling, num_tokens=num_tokens, device=CPU, copies=copies, autocast=autocast, batch_size=batch_size
    )


def draw(sampler: Sampler, prompts: Sequence[list[int]] = PROMPTS, first_seed: int = 0) -> list[Drawn]:
    requests = [GenerateRequest(i, prompt, first_seed + i) for i, prompt in enumerate(prompts)]
    drawn = sorted(sampler.draw(requests, threading.Event()), key=lambda response: response.index)
    assert [response.index for response in drawn] == list(range(len(prompts)))
    return drawn


def ids_of(drawn: Sequence[Drawn]) -> list[list[int]]:
    return [response.response_ids.tolist() for response in drawn]


def test_greedy_is_what_transformers_generates(model: PreTrainedModel) -> None:
    drawn = draw(sampler_of(model, GREEDY))
    for prompt, response in zip(PROMPTS, drawn, strict=True):
        settings = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=0, pad_token_id=0)
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=settings
        )
        assert response.response_ids.tolist() == theirs[0, len(prompt) :].tolist()
        assert response.finish_reason == ("stop" if response.response_ids[-1] == 0 else "length")


def test_a_response_keeps_its_end_token_and_says_how_it_ended(model: PreTrainedModel) -> None:
    by_length = draw(sampler_of(model, GREEDY))[0]
    assert by_length.finish_reason == "length"
    assert len(by_length.response_ids) == 24
    stop = int(by_length.response_ids[5])
    first = by_length.response_ids.tolist().index(stop)
    stopped = draw(sampler_of(model, Sampling(0.0, 1.0, 24, (stop,))))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.response_ids.tolist() == by_length.response_ids[: first + 1].tolist()


def assert_logprobs(model: PreTrainedModel, drawn: Sequence[Drawn]) -> None:
    """The log-probs of drawn tokens are the model's at temperature 1, by a forward pass over prompt and response."""
    for prompt, response in zip(PROMPTS, drawn, strict=True):
        ids = torch.tensor([prompt + response.response_ids.tolist()])
        with torch.no_grad():
            log_q = model(ids).logits[0].double().log_softmax(1)[len(prompt) - 1 : -1]
        expected = log_q.gather(1, ids[0, len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(response.logprobs, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_say_how_likely_their_tokens_were(model: PreTrainedModel, temperature: float) -> None:
    assert_logprobs(model, draw(sampler_of(model, Sampling(temperature, 1.0, 16, (0, 7)), batch_size=4)))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9)])
def test_first_tokens_come_as_often_as_the_distribution_says(
    model: PreTrainedModel, temperature: float, top_p: float
) -> None:
    prompt, number = PROMPTS[0], 4000
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double().numpy()
    probs = np.exp(logits / temperature - (logits / temperature).max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = order[: int(np.searchsorted(probs[order].cumsum(), top_p)) + 1] if top_p < 1 else order
    expected = np.zeros_like(probs)
    expected[kept] = probs[kept] / probs[kept].sum()

    sampler = sampler_of(model, Sampling(temperature, top_p, 1, (0,)), batch_size=500)
    tokens = np.concatenate([response.response_ids for response in draw(sampler, [prompt] * number)])
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[expected == 0].sum() == 0
    # chi-squared over the tokens with ten draws and more, the rest together; far above its mean plus 5 deviations fails
    often = expected * number >= 10
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * number
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


def test_padding_of_the_vocabulary_is_never_drawn(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[590:] *= 50  # type: ignore[union-attr]
    tokens = np.concatenate([response.response_ids for response in draw(sampler_of(model, DRAWN))])
    assert (tokens >= 590).any()
    for sampling in (DRAWN, GREEDY, Sampling(1.0, 0.5, 16, (0,))):
        tokens = np.concatenate([drawn.response_ids for drawn in draw(sampler_of(model, sampling, num_tokens=590))])
        assert tokens.max() < 590


def test_a_draw_does_not_depend_on_its_batch(model: PreTrainedModel) -> None:
    together = ids_of(draw(sampler_of(model, DRAWN)))
    assert ids_of(draw(sampler_of(model, DRAWN, batch_size=1))) == together
    assert ids_of(draw(sampler_of(model, DRAWN, batch_size=4))) == together
    requests = [GenerateRequest(i, PROMPTS[i], i) for i in (4, 2)]
    found = {
        drawn.index: drawn.response_ids.tolist() for drawn in sampler_of(model, DRAWN).draw(requests, threading.Event())
    }
    assert found == {4: together[4], 2: together[2]}
    assert ids_of(draw(sampler_of(model, DRAWN), first_seed=100)) != together


def test_the_trainer_finds_its_generator_mode_and_gradients_untouched(model: PreTrainedModel) -> None:
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    draw(sampler_of(model, DRAWN))
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[arg-type]
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_a_sampler_uses_the_weights_of_its_last_refresh(model: PreTrainedModel) -> None:
    sampler = sampler_of(model, DRAWN, copies=True)
    old = ids_of(draw(sampler))
    assert old == ids_of(draw(sampler_of(model, DRAWN)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    new = ids_of(draw(sampler_of(model, DRAWN)))
    assert new != old
    assert ids_of(draw(sampler)) == old
    sampler.refresh(model)
    assert ids_of(draw(sampler)) == new
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_half_precision_draws_as_training_computes(model: PreTrainedModel) -> None:
    half = draw(sampler_of(model, DRAWN, autocast=torch.bfloat16))
    whole = draw(sampler_of(model, DRAWN))
    assert all(len(response.response_ids) for response in half)
    same = sum(ours[0] == theirs[0] for ours, theirs in zip(ids_of(half), ids_of(whole), strict=True))
    assert same >= 4  # of 6: a rounding moves few first tokens


def test_a_cancelled_draw_ends_soon(model: PreTrainedModel) -> None:
    cancelled = threading.Event()
    sampler = sampler_of(model, DRAWN, batch_size=1)
    responses = sampler.draw([GenerateRequest(i, prompt, i) for i, prompt in enumerate(PROMPTS)], cancelled)
    next(responses)
    cancelled.set()
    with pytest.raises(KeyboardInterrupt):
        next(responses)


def test_running_out_of_memory_is_explained(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model, "forward", fail)
    sampler = sampler_of(model, DRAWN)
    with pytest.raises(
        UserError, match=r"ran out of memory: CUDA .*6 responses of up to 16 tokens.*sample_max_new_tokens"
    ):
        draw(sampler)


def test_the_sampler_follows_the_options(source: ModelSource, model: PreTrainedModel, toy_cache: Path) -> None:
    config = TrainConfig(
        cache=toy_cache, student=str(source.path), out="out", student_samples="live", teacher_url=("http://h:1",),
        sample_temperature=0.0,
    )  # fmt: skip
    with torch.no_grad():
        sampler = open_sampler(config, source, model, CPU, 24, 64)
        before = ids_of(draw(sampler))
        model.get_output_embeddings().weight.mul_(-1)  # type: ignore[union-attr]
        assert ids_of(draw(sampler)) == before
        fresh = open_sampler(config.model_copy(update={"staleness": 0}), source, model, CPU, 24, 64)
        assert ids_of(draw(fresh)) != before
        for top_p, is_greedy in ((1e-9, True), (1.0, False)):
            drawn = {"staleness": 0, "sample_temperature": 1.0, "sample_top_p": top_p}
            other = open_sampler(config.model_copy(update=drawn), source, model, CPU, 24, 64)
            assert (ids_of(draw(other)) == ids_of(draw(fresh))) == is_greedy


@pytest.mark.engine
def test_a_vllm_engine_takes_over_the_weights(source: ModelSource, model: PreTrainedModel) -> None:
    config = TrainConfig(
        cache="c", student="s", out="o", student_samples="live", teacher_url=("http://h:1",), sampler="vllm",
        staleness=0,
    )  # fmt: skip
    prompt, response = [5, 9, 33], [7, 8, 300, 2, 0]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampler = open_sampler(config, source, model, CPU, 16, 100)
    assert isinstance(sampler, VllmSampler)

    def furthest() -> float:
        """Largest difference (nats) of the engine's log-probs of a fixed response to the trainer's."""
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0].float(), dim=-1)
        ours = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0].numpy()
        scored = next(iter(results_only(sampler.score([ScoreRequest(0, prompt, response)]))))
        return float(np.abs(scored.logprobs_T - ours).max())

    try:
        before = ids_of(draw(sampler))
        for step in range(2):
            random = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
            assert furthest() > 0.1
            sampler.refresh(model)
            assert furthest() < 1e-4
        after = ids_of(draw(sampler))
        assert after != before
        again = draw(sampler)
        assert ids_of(again) == after
        assert_logprobs(model, again)
        assert torch.equal(torch.rand(3), expected)
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(KeyboardInterrupt):
            next(sampler.draw([GenerateRequest(0, prompt, 0)], cancelled))
    finally:
        sampler.close()


def test_a_vllm_engine_is_refused_where_it_would_disturb_training() -> None:
    options = {"cache": "c", "student": "s", "out": "o", "student_samples": "live", "teacher_url": "http://h:1"}
    with pytest.raises(UserError, match=r"--sampler vllm .*training must wait for it: give --staleness 0"):
        TrainConfig.parse(options | {"sampler": "vllm"}, where="here")
    with pytest.raises(UserError, match=r"--sampler vllm needs whole weights.*give --sampler transformers"):
        TrainConfig.parse(options | {"sampler": "vllm", "staleness": 0, "lora_rank": 4}, where="here")
