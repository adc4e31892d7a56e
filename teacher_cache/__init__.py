"""Ask the teacher once and keep the answer in a form that cannot be mistaken.

The names below are imported when they are first used, so that the room itself costs nothing to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkd.teacher_cache.build import build_cache
    from dpkd.teacher_cache.config import CacheConfig
    from dpkd.teacher_cache.errors import UserError
    from dpkd.teacher_cache.reader import TeacherCache
    from dpkd.teacher_cache.verify import verify_cache

__all__ = ["CacheConfig", "TeacherCache", "UserError", "build_cache", "verify_cache"]

_HOME = {
    "build_cache": "build",
    "CacheConfig": "config",
    "TeacherCache": "reader",
    "UserError": "errors",
    "verify_cache": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
