"""`dpkd train --cache C --student S --out R` and nothing else: students of several families get nearer to the teacher.

Their KL and agreement are measured here, on full logits of the teacher, not read from the run's own log; Rouge-L is
that of `dpkd eval`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.reference import full_logprobs, read_rows
from support.toys import VOCAB_SIZE, make_toy
from support.world import build_world
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, Qwen2Config

from dpkd.distill.rows.held_out import choose_examples
from dpkd.pipelines.cli import run as command_line
from dpkd.teacher_cache.store.reader import TeacherCache

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def qwen2(layers: int) -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, **HEADS,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.15, eos_token_id=0,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def gpt2(layers: int) -> PretrainedConfig:
    """With dropout, as GPT-2 has it."""
    return GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=layers, n_head=2, n_positions=512, initializer_range=0.1,
        eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def of_family(config: Callable[[int], PretrainedConfig]) -> Callable[..., Path]:
    def make(directory: Path, tokenizer: Path, *, layers: int, seed: int) -> Path:
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config(layers)).save_pretrained(directory)
        for file in tokenizer.glob("*"):
            shutil.copyfile(file, directory / file.name)
        return directory

    return make


@pytest.mark.parametrize("make", [make_toy, of_family(qwen2), of_family(gpt2)], ids=["llama", "qwen2", "gpt2"])
def test_the_command_alone_distils(tmp_path: Path, toy_tokenizer: Path, make: Callable[..., Path]) -> None:
    sizes = {"copies": 12, "teacher_steps": 150, "student_steps": 8}
    world = build_world(tmp_path, toy_tokenizer, make, with_round=False, **sizes)
    out = tmp_path / "run"
    options = ("--cache", world["cache"], "--student", world["student"], "--out", out)
    assert command_line(["train", *map(str, options)]) == 0
    before, after = (measure(world, student) for student in (world["student"], out))
    assert after[0] < 0.8 * before[0]  # KL, in nats
    assert after[1] > before[1] + 0.02  # share of positions with the same likeliest token
    facts = json.loads((out / "run.json").read_text())
    assert facts["alarms"] == []
    assert facts["validation"]["best_metric"] == "kld"
    better = compare_rouge_l(world, tmp_path, untrained=world["student"], trained=out)
    assert better["low"] > 0
    # what the run says of itself, on the kept entries, is a lower bound of the truth and not far from it
    best = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()][-1]
    assert best["kld"] <= after[0] + 1e-3
    assert best["kld"] > 0.7 * after[0]


def compare_rouge_l(world: dict[str, Path], directory: Path, **models: Path) -> dict[str, float]:
    """The second model less the first, by `dpkd eval`: one row for each prompt of the task, five seeds."""
    data, out = directory / "prompts.jsonl", directory / "report"
    lines = {json.loads(line)["instruction"]: line for line in world["data"].read_text().splitlines()}
    data.write_text("\n".join(lines.values()) + "\n")
    named = [argument for name, path in models.items() for argument in ("--model", f"{name}={path}")]
    options = ("--engine", "transformers", "--template", "chat", "--max-new-tokens", "16", "--seeds", "0,1,2,3,4")
    assert command_line(["eval", "--data", f"toy={data}", "--out", str(out), *named, *options]) == 0
    (comparison,) = json.loads((out / "report.json").read_text())["comparisons"]["toy"]
    assert (comparison["model"], comparison["baseline"]) == ("trained", "untrained")
    return comparison["rouge_l"]


@torch.no_grad()
def measure(world: dict[str, Path], student: Path) -> tuple[float, float]:
    """Mean KL(p || q) over the whole vocabulary and agreement, at the positions of the held-out rows."""
    rows = [row for row, _ in read_rows(TeacherCache.open(world["cache"]), None)]
    examples = {row.example_id for row in rows}
    held_out = choose_examples(examples, 16, seed=0)
    p, q = (AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (world["teacher"], student))
    divergences: list[float] = []
    agreements: list[float] = []
    for row in rows:
        if row.example_id in held_out:
            log_p_TV, log_q_TV = full_logprobs(p, row), full_logprobs(q, row)
            divergences += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(1).tolist()
            agreements += (log_p_TV.argmax(1) == log_q_TV.argmax(1)).double().tolist()
    return sum(divergences) / len(divergences), sum(agreements) / len(agreements)
