"""The toy world that several tests train in."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.world import build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> dict[str, Path]:
    """Teacher, student and cache (with the student's round r0); never written to."""
    return build_world(tmp_path_factory.mktemp("world"), toy_tokenizer)
