"""Who fills a folder's shards: an engine in this process, or replicas on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from dpkd.core.progress import Progress
from dpkd.teacher_cache.build.assembling import ShardAssembler, ShardLayout, fill
from dpkd.teacher_cache.engines.engine import Engine, EngineOptions, ResolvedEngine, Sampling
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.schema import PlannedRow

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource
    from dpkd.teacher_cache.options.cache import CacheConfig


class Filler(Protocol):
    """Commits every shard of `rows` that is not there yet: draws responses, or (sampling None) scores given ones."""

    def __call__(
        self,
        job: Job,
        layout: ShardLayout,
        rows: Iterable[PlannedRow],
        sampling: Sampling | None,
        progress: Progress,
    ) -> None: ...


class EngineFiller:
    """A filler around one engine in this process."""

    def __init__(self, engine: Engine, model: ModelSource) -> None:
        self._engine, self._model = engine, model

    def __call__(
        self,
        job: Job,
        layout: ShardLayout,
        rows: Iterable[PlannedRow],
        sampling: Sampling | None,
        progress: Progress,
    ) -> None:
        """See `Filler`."""
        with ShardAssembler(job, layout, self._model.decode) as assembler:
            fill(assembler, rows, self._engine, sampling, progress)


@contextlib.contextmanager
def open_filler(
    name: ResolvedEngine, model: ModelSource, options: EngineOptions, config: CacheConfig
) -> Iterator[Filler]:
    """The filler that `name` stands for, with `model` loaded while the block runs."""
    if name == "ray":
        from dpkd.teacher_cache.build.ray.engine import RayFiller

        with RayFiller(model, options, config) as filler:
            yield filler
    else:
        with open_engine(name, model, options) as engine:
            yield EngineFiller(engine, model)
