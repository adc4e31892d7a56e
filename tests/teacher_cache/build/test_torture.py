"""Twenty random faults over one job; benchmarks/cache_torture.py runs more of them, and in an object store too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.toys import ROOT

pytestmark = pytest.mark.engine


def test_twenty_random_faults_lose_and_double_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    from cache_torture import torture

    report = torture(str(tmp_path / "cache"), tmp_path, faults=20, seed=5, rows=60)
    assert report["findings"] == []
    counts = report["by_kind"]
    assert isinstance(counts, dict)
    assert counts["repaired"] >= 1
    assert counts["finished"] >= 1
