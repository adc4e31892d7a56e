"""Contamination: prompts that are also in a cache are counted, and the cache is verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpkd.core.errors import UserError
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig

MakeConfig = Callable[..., EvalConfig]
WriteRows = Callable[[list[dict[str, Any]], str], Path]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"id": f"row-{i}", "instruction": f"Say {i}", "output": "word"} for i in range(3)]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    def make(**options: Any) -> EvalConfig:
        short = {"out": tmp_path / "out", "engine": "transformers", "template": "raw", "seeds": "10",
                 "max_new_tokens": 6, "device": "cpu", "num_sign_flips": 100}  # fmt: skip
        return EvalConfig.parse(short | options, where="a test")

    return make


def test_prompts_of_the_cache_are_counted(
    make_config: MakeConfig,
    write_rows: WriteRows,
    rows: list[dict[str, Any]],
    toy_cache: Path,
    toy_student: Path,
    toy_data: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    trained_on = [json.loads(line) for line in toy_data.read_text().splitlines()][:2]
    data = write_rows([*rows, *({"id": f"t{i}", **row} for i, row in enumerate(trained_on))], "mixed.jsonl")
    config = make_config(
        model=[f"student={toy_student}"], data=[f"mixed={data}"], cache=toy_cache, max_prompt_tokens=200
    )
    path = evaluate(config)
    report = json.loads(path.read_text())
    assert report["overlap"]["rows"] == {"mixed": [row["id"] for row in trained_on]}
    assert report["identities"]["cache"] == report["overlap"]["cache"]
    assert "data mixed: 2 prompts are also in the cache" in capfd.readouterr().err
    assert "2 prompts also in the training cache" in (config.out / "report.md").read_text()
    assert evaluate(config) == path  # complete already


def test_a_cache_of_another_chat_template_is_refused(
    make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]], toy_cache: Path, toy_student: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    import shutil

    other = shutil.copytree(toy_student, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    config = make_config(model=[f"student={other}"], data=[f"d={write_rows(rows, 'd.jsonl')}"], cache=toy_cache)
    with pytest.raises(UserError, match="the cache was written with another prompt template"):
        evaluate(config)
