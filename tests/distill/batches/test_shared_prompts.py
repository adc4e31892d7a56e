"""Pairs whose prompt is read once: the log-probs and gradients of two sequences, or an error where they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from dpkd.core.errors import UserError
from dpkd.distill.batches.collate import collate
from dpkd.distill.batches.shared_prompts import share_prompts
from dpkd.distill.objectives.statistics import target_logprob
from dpkd.distill.objectives.student_forward import StudentScorer, check_sharing
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.training import train
from dpkd.teacher_cache.store.rows import CachedRow

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
CONFIGS: list[PretrainedConfig] = [
    LlamaConfig(**SMALL),
    Qwen2Config(**SMALL),
    GemmaConfig(**SMALL | {"head_dim": 8}),
    GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
               resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
              word_embed_proj_dim=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1),
]  # fmt: skip


def rows(*lengths: tuple[int, int, int]) -> list[TrainingRow]:
    random = np.random.default_rng(0)

    def cached(name: int, prompt_ids: np.ndarray, num_tokens: int) -> CachedRow:
        ids = random.integers(2, 97, num_tokens).astype(np.int32)
        return CachedRow(str(name), 0, "teacher", "stop", prompt_ids, ids, np.zeros(0, np.float32), None)

    made = []
    for name, (prompt, chosen, rejected) in enumerate(lengths):
        prompt_ids = random.integers(2, 97, prompt).astype(np.int32)
        made.append(TrainingRow(cached(name, prompt_ids, chosen), cached(name, prompt_ids, rejected)))
    return made


def logprobs_and_gradient(model: PreTrainedModel, pairs: list[TrainingRow], *, shared: bool) -> tuple[Tensor, Tensor]:
    scorer = StudentScorer(model, num_tokens=97, logits_chunk=7)
    batch = collate(pairs, with_distributions=False)
    fields = {"target_id": batch.target_T}
    model.zero_grad()
    if shared:
        packed = share_prompts(pairs)
        assert packed.input_ids_PS.shape[0] == len(pairs)
        read = scorer(
            packed.input_ids_PS, packed.row_T, packed.predict_T, fields, (target_logprob,), packed.mask(),
            packed.position_ids_PS,
        )  # fmt: skip
    else:
        read = scorer(batch.input_ids_BS, batch.row_T, batch.predict_T, fields, (target_logprob,))
    # every position has a different weight, so none can be mistaken for another
    (read["target"] * torch.linspace(-1, 1, len(read["target"]))).sum().backward()
    gradient = torch.cat([parameter.grad.ravel() for parameter in model.parameters() if parameter.grad is not None])
    return read["target"].detach(), gradient


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_log_probs_and_gradients_are_those_of_two_sequences(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    check_sharing(model, config.model_type)
    assert model.training
    pairs = rows((5, 3, 4), (2, 1, 9), (11, 8, 1), (1, 2, 2))
    apart, apart_gradient = logprobs_and_gradient(model, pairs, shared=False)
    together, together_gradient = logprobs_and_gradient(model, pairs, shared=True)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together_gradient, apart_gradient, atol=1e-4, rtol=1e-4)


def test_who_sees_whom() -> None:
    """Prompt of 2, chosen of 1, rejected of 2, padding to 7, by hand."""
    shared = share_prompts(rows((2, 1, 2), (3, 2, 2)))
    assert shared.mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert shared.position_ids_PS.tolist() == [[0, 1, 2, 2, 3, 0, 0], [0, 1, 2, 3, 4, 3, 4]]
    assert list(zip(shared.row_T.tolist(), shared.predict_T.tolist(), strict=True)) == [
        *((0, 1), (1, 2), (1, 3)),
        *((0, 1), (0, 3), (1, 2), (1, 5)),
    ]


@pytest.mark.parametrize("config", [MistralConfig(**SMALL, sliding_window=4), Gemma2Config(**SMALL | {"head_dim": 8})])
def test_sliding_windows_are_refused(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UserError, match=r"cannot read a prompt once for two responses: found attention within a window of \d+ tokens"
    ):
        check_sharing(model, "student")


def test_a_run_with_shared_prompts_is_the_run_without(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    def metrics(name: str, **options: Any) -> list[dict[str, Any]]:
        given: dict[str, Any] = {
            "cache": str(toy_cache), "student": str(toy_student), "level": "sequence", "round": "r0", "beta": 1.0,
            "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu", "tracker": "none",
            "validation_examples": 3,
        }  # fmt: skip
        run = train(TrainConfig(out=tmp_path / name, **given | options))
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    for apart, shared in zip(metrics("apart"), metrics("shared", share_prompt=True), strict=True):
        for name in ("loss", "reward_margin", "kld", "grad_norm", "tokens", "rejected_length"):
            assert shared[name] == pytest.approx(apart[name], rel=1e-4, abs=1e-6), name
    with pytest.raises(ValueError, match="--share-prompt needs --level sequence"):
        metrics("token", level="token", round=None, share_prompt=True)
