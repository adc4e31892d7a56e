"""Thinking: learnt from or the teacher's alone, and stripped before an evaluation scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.chat_templates import THINKING, chat_tokenizer
from support.conversations import say, write
from support.openai_endpoint import serving_toy
from support.toys import make_toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.core.errors import UserError
from dpkd.core.prompts.thinking import count_thinking, without_thinking
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

ANSWERS = {"cat": "red", "dog": "blue"}


def thought(animal: str) -> str:
    return f"<think>\nthe {animal}\n</think>\n\n"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has learnt to think before each of its two answers."""
    directory = tmp_path_factory.mktemp("thinking")
    tokenizer = chat_tokenizer(THINKING, directory=directory / "tokenizer")
    teacher = make_toy(directory / "teacher", directory / "tokenizer", layers=1, seed=1)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((teacher / name).read_text()) | {"eos_token_id": 1, "pad_token_id": 1}
        (teacher / name).write_text(json.dumps(values))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokenizer.pad_token, rows = tokenizer.eos_token, []
    for animal, colour in ANSWERS.items():
        turns = [say("user", animal), say("assistant", thought(animal) + colour)]
        rows.append(tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n"))
    batch = tokenizer(rows, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for _ in range(150):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(teacher)
    return teacher


def build(out: Path, teacher: Path, data: Path, **options: Any) -> dict[str, CachedRow]:
    defaults: dict[str, Any] = {
        "engine": "transformers", "template": "chat", "max_new_tokens": 60, "top_k": 8, "temperature": 0.0,
        "device": "cpu",
    }  # fmt: skip
    build_cache(CacheConfig(out=str(out), teacher=str(teacher), data=str(data), **(defaults | options)))
    verify_cache(str(out))
    cache = TeacherCache.open(out)
    shards = [cache.read(record) for record in cache.shards()]
    return {shard.row(index).example_id: shard.row(index) for shard in shards for index in range(len(shard))}


def test_dropped_thinking_is_the_teachers_alone(tmp_path: Path, thinker: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    data = write(tmp_path / "data.jsonl", [{"id": animal, "prompt": animal} for animal in ANSWERS])
    kept = build(tmp_path / "kept", thinker, data)
    dropped = build(tmp_path / "dropped", thinker, data, thinking="drop")
    for animal, colour in ANSWERS.items():
        whole, answer = kept[animal], dropped[animal]
        assert tokenizer.decode(whole.response_ids) == f"{thought(animal)}{colour}<|im_end|>"
        assert tokenizer.decode(answer.response_ids) == f"{colour}<|im_end|>"
        assert answer.prompt_ids.tolist() == whole.prompt_ids.tolist()
        number = len(whole.response_ids) - len(answer.response_ids)
        assert answer.asked_ids.tolist() == [*whole.prompt_ids.tolist(), *whole.response_ids[:number].tolist()]
        # the teacher's distributions on its answer are those behind its thinking
        np.testing.assert_array_equal(answer.response_logprobs, whole.response_logprobs[number:])
        assert answer.distributions is not None
        assert whole.distributions is not None
        np.testing.assert_array_equal(answer.distributions.ids_E, whole.distributions.ids_E[8 * number :])


def test_thinking_is_dropped_from_texts_alone(tmp_path: Path, thinker: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    data = write(tmp_path / "data.jsonl", [{"id": animal, "prompt": animal} for animal in ANSWERS])
    with serving_toy(thinker) as (_, endpoint):
        of_endpoint = {"engine": "openai", "teacher_url": endpoint.url, "teacher_model": "toy", "device": "auto"}
        rows = build(tmp_path / "cache", thinker, data, thinking="drop", top_k=0, **of_endpoint)
    for animal, colour in ANSWERS.items():
        assert tokenizer.decode(rows[animal].response_ids) == f"{colour}<|im_end|>"
        assert len(rows[animal].response_logprobs) == 0
        assert tokenizer.decode(rows[animal].asked_ids).endswith(thought(animal))


def test_thinking_that_does_not_end_is_a_failed_row(tmp_path: Path, thinker: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"id": animal, "prompt": animal} for animal in ANSWERS])
    rows = build(tmp_path / "cache", thinker, data, thinking="drop", max_new_tokens=8)
    assert not rows
    failed = TeacherCache.open(tmp_path / "cache").manifest.failed
    assert {row["reason"] for row in failed} == {"the response ends inside its thinking: raise --max-new-tokens"}


def test_references_lose_their_thinking_before_they_are_encoded(tmp_path: Path, thinker: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    given = {
        "messages": [
            say("user", "cat"), say("assistant", thought("cat") + "red"), say("user", "dog"),
            say("assistant", thought("dog") + "blue"),
        ],
    }  # fmt: skip
    data = write(tmp_path / "data.jsonl", [given | {"id": "talk"}])
    options: dict[str, Any] = {"responses": "reference", "temperature": 1.0, "turns": "all", "thinking": "drop"}
    [row] = build(tmp_path / "cache", thinker, data, **options).values()
    assert tokenizer.decode(row.response_ids) == "red<|im_end|>blue<|im_end|>"
    assert "think" not in tokenizer.decode(row.sequence_ids())


def test_a_template_that_begins_the_thinking_itself_is_refused(tmp_path: Path, thinker: Path) -> None:
    import shutil

    opening = Path(shutil.copytree(thinker, tmp_path / "opening"))
    template = opening / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%"))
    data = write(tmp_path / "data.jsonl", [{"prompt": "cat"}])
    with pytest.raises(UserError, match="the template begins the thinking in the prompt"):
        build(tmp_path / "cache", opening, data, thinking="drop")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain <b>text</b>", "plain <b>text</b>"),
        ("<think>\nso\n</think>\n\nThe answer.", "The answer."),
        ("so it is</think>The answer.", "The answer."),
        ("<think>a</think>b<think>c</think> d", "d"),
        ("<think>for ever", ""),
        ("First. <think>for ever", "First."),
    ],
)
def test_what_is_scored(text: str, answer: str) -> None:
    assert without_thinking(text) == answer
    tokens = list(text)
    count = count_thinking(list(range(len(tokens))), lambda ids: "".join(tokens[i] for i in ids))
    if "</think>" in text:
        assert count is not None
        assert "".join(tokens[:count]).rstrip().endswith("</think>")
    else:
        assert count == (None if "<think>" in text else 0)


def test_an_evaluation_scores_the_answer_and_says_so(tmp_path: Path, thinker: Path) -> None:
    rows = [{"id": animal, "instruction": animal, "output": colour} for animal, colour in ANSWERS.items()]
    options: dict[str, Any] = {
        "model": [f"t={thinker}"], "data": [f"d={write(tmp_path / 'd.jsonl', rows)}"], "out": tmp_path / "out",
        "engine": "transformers", "template": "chat", "temperature": 0.0, "max_new_tokens": 60, "device": "cpu",
        "num_sign_flips": 100,
    }  # fmt: skip
    evaluate(EvalConfig.parse(options, where="a test"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    summary = report["models"]["t"]["data"]["d"]
    assert summary["exact_match"]["mean"] == 100
    assert summary["share_with_thinking"] == 1
    assert "Thinking was stripped before scoring: `t`." in (tmp_path / "out" / "report.md").read_text()
    responses = pq.read_table(tmp_path / "out" / "per_example.parquet")["response"].to_pylist()
    assert responses == [thought(animal) + colour for animal, colour in ANSWERS.items()]


def test_answers_that_do_not_end_are_said(
    tmp_path: Path, toy_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(i), "instruction": f"Count to {i}", "output": "1 2"} for i in range(4)]
    options: dict[str, Any] = {
        "model": [f"t={toy_teacher}"], "data": [f"d={write(tmp_path / 'd.jsonl', rows)}"], "out": tmp_path / "out",
        "engine": "transformers", "template": "chat", "temperature": 0.0, "max_new_tokens": 2, "device": "cpu",
        "num_sign_flips": 100,
    }  # fmt: skip
    evaluate(EvalConfig.parse(options, where="a test"))
    said = capsys.readouterr().err
    assert "model t: 4 of 4 answers to d did not end within 2 tokens." in said
    assert "--eos-from-teacher" in said
