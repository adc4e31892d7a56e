"""docs/evaluation.md names every key of the report, every column of the rows, and every known set's files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.toys import ROOT

from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import KNOWN_SETS, EvalConfig
from dpkd.evaluate.report.build import FORMAT_VERSION

_DOCS = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture
def out(
    make_config: Callable[..., EvalConfig], write_rows: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> Path:
    given = write_rows([{"prediction": "word"}] * 6, "p.jsonl")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    config = make_config(
        predictions=[f"p={given}", f"q={given}"],
        data=f"d={write_rows(rows, 'd.jsonl')}",
        run=f"q={tmp_path / 'run'}",
    )
    return evaluate(config).parent


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def test_every_key_is_named(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert report["format_version"] == FORMAT_VERSION
    assert f"report.json, format {FORMAT_VERSION}" in _DOCS
    parts = [report[part] for part in ("models", "data", "comparisons", "runs", "significance")]
    named = {*report, *(key for part in parts for key in _keys(part))}
    values = {
        "p",
        "q",
        "d",
        "loss",
        "num_all_lost",
        "num_mostly_lost",
    }  # names of this test, and what `lost_text` counts
    assert not [key for key in sorted(named - values) if f"`{key}`" not in _DOCS]


def test_every_column_is_named(out: Path) -> None:
    columns = pq.read_schema(out / "per_example.parquet").names
    assert not [column for column in columns if f"`{column}`" not in _DOCS]


def test_every_known_set_is_named_with_its_files() -> None:
    for name, files in KNOWN_SETS.items():
        assert f"`{name}`" in _DOCS
        assert ", ".join(f"`{file}`" for file in files) in _DOCS
