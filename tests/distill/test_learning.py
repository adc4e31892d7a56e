"""A toy world: a tiny teacher that has learnt a task, and a smaller student that every objective brings closer to it.

The task puts an animal and a colour of the instruction into a sentence, in one of two wordings, so that the teacher's
distribution is not a point. Held-out instructions are combinations that neither model is trained on.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig

ANIMALS = ("cat", "dog", "horse", "bird", "fish", "cow", "fox", "bear")
COLOURS = ("red", "blue", "green", "white", "black", "brown")


def rows() -> list[dict[str, str]]:
    """Every combination twice, each with one of the two wordings."""
    draw = random.Random(0)
    made = []
    for number, (animal, colour) in enumerate(itertools.product(ANIMALS, COLOURS)):
        for copy in range(2):
            wording = f"The {animal} is {colour}." if draw.random() < 0.7 else f"A {colour} {animal} it is."
            made.append({"id": f"{number}-{copy}", "instruction": f"{animal} {colour}", "output": wording})
    draw.shuffle(made)
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> dict[str, Path]:
    """Teacher, student and cache (with the student's round r0) of the toy world."""
    from support.toys import make_toy

    directory = tmp_path_factory.mktemp("world")
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    teacher = make_toy(directory / "teacher", toy_tokenizer, layers=2, seed=1)
    learn(teacher, steps=300)
    student = make_toy(directory / "student", toy_tokenizer, layers=1, seed=2)
    learn(student, steps=15)  # it has heard of the task, as a student that was fine-tuned a little
    cache = directory / "cache"
    options: dict[str, Any] = {
        "out": cache, "engine": "transformers", "top_k": 64, "max_new_tokens": 16, "template": "chat", "device": "cpu"
    }  # fmt: skip
    build_cache(CacheConfig(teacher=str(teacher), data=str(data), responses="both", **options))
    build_cache(CacheConfig(teacher=str(teacher), student=str(student), round="r0", **options))
    return {"teacher": teacher, "student": student, "cache": cache, "data": data}


def learn(directory: Path, steps: int) -> None:
    """Plain cross-entropy on the task, apart from the product's own training."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(0)
    examples = []
    for row in rows():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["instruction"]}], add_generation_prompt=True, tokenize=False
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = prompt_ids + tokenizer(row["output"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        examples.append((ids, [-100] * len(prompt_ids) + ids[len(prompt_ids) :]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = random.Random(float(torch.rand(()))).sample(examples, 16)
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


# two arg-maxes alone hold nothing but the arg-max (test_optima.py): the released code adds cross-entropy
ARGMAX = {"level": "token", "token_pairs": "argmax", "sft_weight": 0.5}
PREFERENCES = [
    {},
    {"label_smoothing": 0.1},
    {"token_pairs": "drawn"},
    ARGMAX,
    ARGMAX | {"objective": "ipo"},
    ARGMAX | {"objective": "dpop"},
    ARGMAX | {"objective": "reference-free"},
    {"level": "sequence"},
    {"level": "sequence", "length_normalize": False},
    {"level": "sequence", "objective": "ipo"},
    {"level": "sequence", "objective": "cpo"},
    {"level": "sequence", "objective": "simpo"},
    {"level": "sequence", "objective": "dpop"},
    {"level": "sequence", "objective": "reference-free"},
]
OTHERS = [
    {"objective": "sft"},
    {"objective": "seqkd"},
    {"objective": "kd"},
    *({"objective": name} for name in ("forward-kl", "reverse-kl", "jeffreys", "jsd", "tvd", "akl", "alpha-beta")),
    {"objective": "skewed-forward-kl"},
    {"objective": "skewed-reverse-kl"},
    {"objective": "forward-kl", "tail": "renormalise"},
    {"objective": "forward-kl", "tail": "uniform"},
    {"objective": "reverse-kl", "student_samples": "cached"},
    {"objective": "jsd", "student_samples": "cached", "mix": 0.5},
    {"objective": "dpkd", "student_samples": "cached", "mix": 0.5},
    # a policy gradient: samples of an earlier student are good for a few steps
    {"objective": "minillm", "student_samples": "cached", "learning_rate": 3e-4, "steps": 20},
]


@pytest.mark.parametrize("options", PREFERENCES + OTHERS, ids=str)
def test_every_objective_brings_the_student_nearer_to_the_teacher(
    tmp_path: Path, world: dict[str, Path], options: dict[str, Any]
) -> None:
    """Its own validation loss falls, KL(teacher || student) falls, and a preference raises the margin, held out."""
    in_round = options.get("level") == "sequence" or options.get("student_samples") == "cached"
    out = train(
        TrainConfig(
            out=tmp_path / "run",
            cache=str(world["cache"]),
            student=str(world["student"]),
            batch_size=16,
            beta=1.0,
            device="cpu",
            validation_examples=24,
            validate_every=1000,
            save_every=None,
            round="r0" if in_round else None,
            responses="all" if options.get("objective") == "sft" else "teacher",
            **({"learning_rate": 2e-3, "steps": 60} | options),
        )
    )
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    if options.get("objective") == "minillm":  # it lowers KL(student || teacher), and its loss is no measure of it
        assert last["rkld"] < first["rkld"]
        return
    assert last["loss"] < first["loss"]
    assert last["kld"] < first["kld"]
    if options in PREFERENCES:
        assert last["reward_margin"] > first["reward_margin"]
