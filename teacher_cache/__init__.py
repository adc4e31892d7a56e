"""Ask the teacher once and keep the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpkd.core.lazy import lazy_exports

if TYPE_CHECKING:
    from dpkd.core.errors import UserError as UserError
    from dpkd.teacher_cache.audit.verify import verify_cache as verify_cache
    from dpkd.teacher_cache.build.cache import build_cache as build_cache
    from dpkd.teacher_cache.options.cache import CacheConfig as CacheConfig
    from dpkd.teacher_cache.store.reader import TeacherCache as TeacherCache

__getattr__ = lazy_exports(
    __name__,
    {
        "build_cache": "dpkd.teacher_cache.build.cache",
        "CacheConfig": "dpkd.teacher_cache.options.cache",
        "TeacherCache": "dpkd.teacher_cache.store.reader",
        "UserError": "dpkd.core.errors",
        "verify_cache": "dpkd.teacher_cache.audit.verify",
    },
)
