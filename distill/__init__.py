"""Learn from the cached teacher.

The names below are imported when they are first used, so that the room itself costs nothing to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkd.distill.config import TrainConfig
    from dpkd.distill.student_config import InitStudentConfig
    from dpkd.distill.students import init_student
    from dpkd.distill.training import train

__all__ = ["InitStudentConfig", "TrainConfig", "init_student", "train"]

_HOME = {
    "train": "training",
    "TrainConfig": "config",
    "init_student": "students",
    "InitStudentConfig": "student_config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
