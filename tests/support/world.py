"""A toy world: a tiny teacher that has learned a task, and a student that has heard of it.

The task puts an animal and a colour of the instruction into a sentence, in one of two wordings, so that the teacher's
distribution is not a point.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.toys import make_toy
from transformers import AutoModelForCausalLM, AutoTokenizer

ANIMALS = ("cat", "dog", "horse", "bird", "fish", "cow", "fox", "bear")
COLOURS = ("red", "blue", "green", "white", "black", "brown")


def rows(copies: int = 2) -> list[dict[str, str]]:
    """Every combination several times, each with one of the two wordings."""
    draw = random.Random(0)
    made = []
    for number, (animal, colour) in enumerate(itertools.product(ANIMALS, COLOURS)):
        for copy in range(copies):
            wording = f"The {animal} is {colour}." if draw.random() < 0.7 else f"A {colour} {animal} it is."
            made.append({"id": f"{number}-{copy}", "instruction": f"{animal} {colour}", "output": wording})
    draw.shuffle(made)
    return made


def build_world(
    directory: Path,
    tokenizer: Path,
    make: Callable[..., Path] = make_toy,
    *,
    top_k: int = 64,
    teacher_steps: int = 300,
    student_steps: int = 15,
    with_round: bool = True,
    copies: int = 2,
) -> dict[str, Path]:
    """`teacher`, `student` and `cache` in `directory`; the cache has the student's round r0 if it is asked for."""
    from dpkd.teacher_cache.build.cache import build_cache
    from dpkd.teacher_cache.options.cache import CacheConfig

    data, cache = directory / "rows.jsonl", directory / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(copies)), encoding="utf-8")
    teacher = make(directory / "teacher", tokenizer, layers=2, seed=1)
    learn(teacher, teacher_steps)
    student = make(directory / "student", tokenizer, layers=1, seed=2)
    learn(student, student_steps)  # as a student that was fine-tuned a little
    options: dict[str, Any] = {
        "out": cache, "engine": "transformers", "top_k": top_k, "max_new_tokens": 16, "template": "chat",
        "device": "cpu",
    }  # fmt: skip
    build_cache(CacheConfig(teacher=str(teacher), data=str(data), responses="both", **options))
    if with_round:
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
