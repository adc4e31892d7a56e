"""The examples of docs/cache-format.md run, and agree with our reader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.toys import ROOT

from dpkd.teacher_cache.store.reader import TeacherCache

FORMAT = (ROOT / "docs" / "cache-format.md").read_text(encoding="utf-8")
BLOCKS = {
    name: block
    for name in ("duckdb", "polars", "datasets")
    for block in re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
    if re.search(rf"^import {name}\b", block, re.MULTILINE)
}


@pytest.mark.parametrize("name", ["duckdb", "polars", "datasets"])
def test_the_example_reads_the_cache(
    name: str, toy_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "cache").symlink_to(toy_cache)
    scope: dict[str, Any] = {}
    exec(compile(BLOCKS[name], "docs/cache-format.md", "exec"), scope)
    cache = TeacherCache.open(toy_cache)
    expected = {}
    for record in cache.shards("teacher"):
        shard = cache.read(record)
        for index in range(len(shard)):
            row = shard.row(index)
            assert row.distributions is not None
            count = int(row.distributions.counts_T[0])
            expected[row.example_id] = (
                row.distributions.ids_E[:count].tolist(),
                row.distributions.logprobs_E[:count].tolist(),
            )
    found = {example_id: (list(ids), list(logprobs)) for example_id, ids, logprobs in scope["first"]}
    assert found.keys() == expected.keys()
    for example_id, (ids, logprobs) in expected.items():
        assert found[example_id][0] == ids
        assert found[example_id][1] == pytest.approx(logprobs)
