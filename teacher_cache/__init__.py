"""Ask the teacher once and keep the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpkd.core.lazy import lazy_exports

if TYPE_CHECKING:
    from dpkd.core.errors import UserError as UserError
    from dpkd.teacher_cache.audit.verify import verify_cache as verify_cache
    from dpkd.teacher_cache.build.cache import build_cache as build_cache
    from dpkd.teacher_cache.build.derived.filtering import filter_cache as filter_cache
    from dpkd.teacher_cache.build.derived.merging import merge_caches as merge_caches
    from dpkd.teacher_cache.options.cache import CacheConfig as CacheConfig
    from dpkd.teacher_cache.options.derive import CacheFilterConfig as CacheFilterConfig
    from dpkd.teacher_cache.options.derive import CacheMergeConfig as CacheMergeConfig
    from dpkd.teacher_cache.store.reader import TeacherCache as TeacherCache

__getattr__ = lazy_exports(
    __name__,
    {
        "build_cache": "dpkd.teacher_cache.build.cache",
        "CacheConfig": "dpkd.teacher_cache.options.cache",
        "CacheFilterConfig": "dpkd.teacher_cache.options.derive",
        "CacheMergeConfig": "dpkd.teacher_cache.options.derive",
        "filter_cache": "dpkd.teacher_cache.build.derived.filtering",
        "merge_caches": "dpkd.teacher_cache.build.derived.merging",
        "TeacherCache": "dpkd.teacher_cache.store.reader",
        "UserError": "dpkd.core.errors",
        "verify_cache": "dpkd.teacher_cache.audit.verify",
    },
)
