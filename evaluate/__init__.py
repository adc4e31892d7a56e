"""Text in, scores and reports out. Knows no loss and no cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpkd.core.lazy import lazy_exports

if TYPE_CHECKING:
    from dpkd.evaluate.evaluation import evaluate as evaluate
    from dpkd.evaluate.options.eval import EvalConfig as EvalConfig

__getattr__ = lazy_exports(
    __name__, {"evaluate": "dpkd.evaluate.evaluation", "EvalConfig": "dpkd.evaluate.options.eval"}
)
