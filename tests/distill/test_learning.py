"""Every objective brings the student of the toy world nearer to its teacher (support/world.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train

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
