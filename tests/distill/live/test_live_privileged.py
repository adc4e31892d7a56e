"""Live samples where the teacher sees more than the student: each model is asked under its own prompt.

The teacher runs in this process, by transformers, instead of behind a server.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.local_teacher import LocalTeacher
from support.samples import stored_rows
from transformers import AutoTokenizer, PreTrainedModel

from dpkd.core.models import locate_model
from dpkd.distill.live import rows as live_module
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig

MAX_NEW_TOKENS = 12


def logprobs(model: PreTrainedModel, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
    """Log-probs [T, V] in float64 of the model in memory."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    found: np.ndarray = logits.double().log_softmax(-1).numpy()
    return found


def test_teacher_and_student_have_their_own_prompts(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalTeacher, "directory", toy_teacher, raising=False)
    monkeypatch.setattr(live_module, "TeacherServers", LocalTeacher)
    own = {f"r{i}": [{"role": "user", "content": f"What is {i} and {i}?"}] for i in range(6)}
    hints = {name: [{"role": "system", "content": "Say it in words."}, *turns] for name, turns in own.items()}
    lines: list[dict[str, Any]] = [{"id": name, "messages": own[name], "teacher_messages": hints[name]} for name in own]
    data, cache, run = tmp_path / "hints.jsonl", tmp_path / "cache", tmp_path / "run"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(toy_teacher)
    own_lengths, hint_lengths = (
        [len(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]) for turns in of.values()]
        for of in (own, hints)
    )
    assert max(own_lengths) < max(hint_lengths)
    narrow = tmp_path / "student"  # its positions are enough for its own prompts alone
    shutil.copytree(toy_student, narrow)
    config_json = narrow / "config.json"
    positions = {"max_position_embeddings": max(own_lengths) + MAX_NEW_TOKENS}
    config_json.write_text(json.dumps(json.loads(config_json.read_text()) | positions))
    build_cache(
        CacheConfig(
            teacher=str(toy_teacher), data=str(data), out=str(cache), engine="transformers", template="chat",
            top_k=16, max_new_tokens=MAX_NEW_TOKENS, device="cpu",
        )
    )  # fmt: skip
    config = TrainConfig(
        cache=str(cache), student=str(narrow), out=run, student_samples="live", teacher_url=("http://127.0.0.1:1",),
        level="token", steps=2, batch_size=3, validation_examples=0, staleness=0, learning_rate=1e-9, device="cpu",
    )  # fmt: skip
    train(config)

    teacher, student = (locate_model(str(path), "model").load("float32").eval() for path in (toy_teacher, toy_student))
    rows, differences = list(stored_rows(run)), []
    assert len(rows) == 6
    for row in rows:
        own_ids, hint_ids = (
            tokenizer.apply_chat_template(turns[row.example_id], add_generation_prompt=True)["input_ids"]
            for turns in (own, hints)
        )
        assert row.prompt_ids.tolist() == own_ids  # what the student reads
        assert row.asked_ids.tolist() == hint_ids
        response = row.response_ids.tolist()
        positions = np.arange(len(response))
        # the student has drawn under its own prompt (the step of 1e-9 leaves its weights as they are)
        assert row.sampling_logprobs is not None
        np.testing.assert_allclose(
            row.sampling_logprobs, logprobs(student, own_ids, response)[positions, response], atol=1e-3
        )
        # the teacher's values are those of its longer prompt
        full_TV = logprobs(teacher, hint_ids, response)
        np.testing.assert_allclose(row.response_logprobs, full_TV[positions, response], atol=1e-3)
        assert row.distributions is not None
        ids_TK = row.distributions.ids_E.reshape(-1, 16)
        kept_TK = np.take_along_axis(full_TV, ids_TK, axis=1)
        np.testing.assert_allclose(row.distributions.logprobs_E.reshape(-1, 16), kept_TK, atol=1 / 256 + 1e-3)
        differences.append(np.abs(full_TV - logprobs(teacher, own_ids, response)).max())
    assert min(differences) > 0.1  # the prompts differ in what the teacher says
