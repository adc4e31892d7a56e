"""What fills a folder's shards: an engine in this process, or replicas on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

from dpkd.core.progress import Progress
from dpkd.teacher_cache.build.assembling import ShardLayout, fill
from dpkd.teacher_cache.engines.engine import Engine, EngineOptions, ResolvedEngine, Sampling
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.schema import PlannedRow

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource
    from dpkd.teacher_cache.options.cache import CacheConfig


class Filler(Protocol):
    """Commits every shard of `rows` that is missing: draws responses, or (sampling None) scores the given ones."""

    def __call__(
        self, job: Job, layout: ShardLayout, rows: Iterable[PlannedRow], sampling: Sampling | None, progress: Progress
    ) -> None: ...


@contextlib.contextmanager
def open_filler(
    name: ResolvedEngine, model: ModelSource, options: EngineOptions, config: CacheConfig
) -> Iterator[Filler]:
    """The filler for the engine `name`, with `model` loaded while the block runs."""
    if name == "ray":
        from dpkd.teacher_cache.build.ray.engine import RayFiller

        with RayFiller(model, options, config) as filler:
            yield filler
    else:
        with engine_filler(open_engine(name, model, options), model) as filler:
            yield filler


@contextlib.contextmanager
def engine_filler(engine: Engine, model: ModelSource) -> Iterator[Filler]:
    """The filler for an open engine, which is closed after the block; `model` decodes its responses."""
    with engine:
        yield partial(fill, engine, model.decode)
