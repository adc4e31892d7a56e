"""A hub of models in a folder, in the layout of huggingface_hub's cache, which is read without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """Repositories whose commits are copies of a model directory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._num_commits = root, 0
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def commit(self, name: str, model: Path, files: Mapping[str, Any] | None = None) -> str:
        """Make a copy of `model` the newest commit of `name`; the revision.

        `files` are other contents by the name of the file: a text, or keys to set in JSON.
        """
        self._num_commits += 1
        revision = f"{self._num_commits:040x}"
        repository = self._root / f"models--{name.replace('/', '--')}"
        directory = Path(shutil.copytree(model, repository / "snapshots" / revision))
        (directory / "README.md").write_text(f"commit {self._num_commits}")
        for file, content in (files or {}).items():
            path = directory / file
            if isinstance(content, dict):
                content = json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | content)
            path.write_text(content)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(revision)
        return revision
