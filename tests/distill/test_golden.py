"""Golden loss curves of the two presets: 30 steps of a toy world that must not change unnoticed.

`python tests/distill/test_golden.py` writes them anew; its diff is to be read and explained by the commit.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"
CURVES: dict[str, dict[str, Any]] = {
    "released-code": {"preset": "released-code"},
    "paper": {"preset": "paper", "round": "r0", "beta": 1.0, "responses": "teacher"},
}
SHOWN = ("loss", "grad_norm", "reward_margin", "kld")


def curve(directory: Path, cache: Path, student: Path, name: str) -> list[dict[str, float]]:
    """30 steps of the preset, in figures of a width that another CPU gives too."""
    from support.toys import dolly_texts

    from dpkd.distill.options.train import TrainConfig
    from dpkd.distill.training import train

    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in dolly_texts("heldout")), encoding="utf-8")
    out = train(
        TrainConfig(
            out=directory / name,
            cache=str(cache),
            student=str(student),
            steps=30,
            batch_size=4,
            learning_rate=5e-4,
            device="cpu",
            save_every=None,
            lm_data=str(corpus),
            lm_length=32,
            validation_examples=0,
            **CURVES[name],
        )
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: float(f"{line[key]:.5g}") for key in SHOWN} for line in lines]


@pytest.mark.parametrize("name", CURVES)
def test_the_loss_curve_of_a_preset_is_the_golden_one(
    tmp_path: Path, golden_cache: Path, toy_student: Path, name: str
) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    found = curve(tmp_path, golden_cache, toy_student, name)
    assert len(found) == len(golden) == 30
    for step, (one, two) in enumerate(zip(found, golden, strict=True), start=1):
        for key in SHOWN:
            assert math.isclose(one[key], two[key], rel_tol=2e-3, abs_tol=1e-4), f"{key} of step {step}"


def build(directory: Path, teacher: Path, student: Path, data: Path) -> Path:
    """The cache of the curves. It is made by transformers: vLLM may round otherwise from version to version."""
    from dpkd.teacher_cache.build.cache import build_cache
    from dpkd.teacher_cache.options.cache import CacheConfig

    options: dict[str, Any] = {
        "out": directory / "cache", "teacher": str(teacher), "engine": "transformers", "top_k": 32,
        "max_new_tokens": 16, "template": "chat", "device": "cpu", "temperature": 0.0,
    }  # fmt: skip
    build_cache(CacheConfig(data=str(data), responses="both", **options))
    build_cache(CacheConfig(student=str(student), round="r0", **options))
    return directory / "cache"


@pytest.fixture(scope="module")
def golden_cache(
    tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> Path:
    return build(tmp_path_factory.mktemp("golden"), toy_teacher, toy_student, toy_data)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from support import toys

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        toys.train_tokenizer(directory / "tokenizer", toys.dolly_texts("train"), toys.VOCAB_SIZE)
        teacher = toys.make_toy(directory / "teacher", directory / "tokenizer", layers=2, seed=1)
        student = toys.make_toy(directory / "student", directory / "tokenizer", layers=1, seed=2)
        cache = build(directory, teacher, student, toys.write_toy_data(directory / "train.jsonl"))
        GOLDEN.mkdir(exist_ok=True)
        for name in CURVES:
            lines = ",\n".join(map(json.dumps, curve(directory, cache, student, name)))
            (GOLDEN / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
