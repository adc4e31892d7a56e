"""Text in, scores and reports out; knows no loss and no cache.

The names below are imported when they are first used, so that the room itself costs nothing to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkd.evaluate.config import EvalConfig
    from dpkd.evaluate.evaluation import evaluate

__all__ = ["EvalConfig", "evaluate"]

_HOME = {"evaluate": "evaluation", "EvalConfig": "config"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
