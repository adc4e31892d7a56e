"""A fact that only the teacher's prompt has is learnt by the student, and answers questions it was not trained on.

The teacher has learnt to put an animal and a colour of its prompt into a sentence. Which colour an animal has is said
in `teacher_prompt` alone: the student reads the animal and a word that means nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from support.world import ANIMALS, COLOURS
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig

FACTS = {animal: COLOURS[number % len(COLOURS)] for number, animal in enumerate(ANIMALS)}
WORDS = ("now", "then", "here", "there", "up", "down", "in", "out")
HELD_OUT = ("left", "right")


def write_rows(path: Path, *, with_facts: bool) -> Path:
    rows = [
        {"id": f"{animal}-{word}", "instruction": f"{animal} {word}"}
        | ({"teacher_prompt": f"{animal} {colour}"} if with_facts else {})
        for animal, colour in FACTS.items()
        for word in WORDS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def share_known(model_dir: Path) -> float:
    """Share of held-out questions (an animal and a new word) whose greedy answer has the animal's colour."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    known = []
    for animal, colour in FACTS.items():
        for word in HELD_OUT:
            turns = [{"role": "user", "content": f"{animal} {word}"}]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                answer = model.generate(**ids, max_new_tokens=14, do_sample=False)[0, ids["input_ids"].shape[1] :]
            known.append(colour in tokenizer.decode(answer, skip_special_tokens=True))
    return sum(known) / len(known)


def test_a_fact_of_the_teachers_prompt_is_learnt(tmp_path: Path, world: dict[str, Path]) -> None:
    teacher, shares = world["teacher"], {}
    for with_facts in (True, False):
        name = "with" if with_facts else "without"
        options: dict[str, Any] = {
            "engine": "transformers", "device": "cpu", "template": "chat", "top_k": 64, "max_new_tokens": 16,
        }  # fmt: skip
        data = write_rows(tmp_path / f"{name}.jsonl", with_facts=with_facts)
        build_cache(CacheConfig(teacher=str(teacher), data=str(data), out=str(tmp_path / name), **options))
        student = Path(shutil.copytree(teacher, tmp_path / f"student-{name}"))
        learning: dict[str, Any] = {"steps": 120, "batch_size": 16, "learning_rate": 1e-3, "validation_examples": 0}
        cache, run = str(tmp_path / name), tmp_path / f"run-{name}"
        train(TrainConfig(cache=cache, student=str(student), out=run, device="cpu", **learning))
        shares[name] = share_known(run)
    assert shares["with"] >= 0.8
    assert shares["without"] <= 0.4
