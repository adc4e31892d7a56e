"""Short rows and the options of a short evaluation, for the tests of evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpkd.evaluate.options.eval import EvalConfig

MakeConfig = Callable[..., EvalConfig]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Six short rows with references of 2, 30 and 70 words, so that each bucket of (30, 70) holds two."""
    return [
        {"id": f"row-{i}", "instruction": f"Say {i}", "output": " ".join(["word"] * words), "category": "qa"}
        for i, words in enumerate((2, 30, 70, 2, 30, 70))
    ]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Options of a short evaluation on the CPU with the transformers engine; keywords override."""

    def make(**options: Any) -> EvalConfig:
        short = {
            "out": tmp_path / "out",
            "engine": "transformers",
            "template": "raw",
            "seeds": "10,20",
            "max_new_tokens": 6,
            "max_prompt_tokens": 48,
            "device": "cpu",
            "num_sign_flips": 100,
        }
        return EvalConfig.parse(short | options, where="a test")

    return make
