"""What fills a folder's shards: an engine in this process, an endpoint, or replicas on a Ray cluster.

What an endpoint returns is measured once, and part of the identity of its cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from dpkd.core.progress import Progress, say
from dpkd.teacher_cache.build.assembling import ShardLayout, fill
from dpkd.teacher_cache.build.request import engine_options, sampling
from dpkd.teacher_cache.engines.engine import Engine, EngineOptions, ResolvedEngine, Sampling
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.store.folder import MANIFEST
from dpkd.teacher_cache.store.job import ANSWERS, Job, read_job
from dpkd.teacher_cache.store.manifest import load_manifest
from dpkd.teacher_cache.store.reader import CACHE_KIND
from dpkd.teacher_cache.store.rows import PlannedRow

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource
    from dpkd.teacher_cache.engines.openai.engine import OpenAIEngine
    from dpkd.teacher_cache.options.cache import CacheConfig
    from dpkd.teacher_cache.store.folder import Folder


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


class EndpointTeacher:
    """The endpoint of `config`.

    The folder of an earlier run says what the endpoint returns, so a finished cache is found without asking it, and a
    job that resumes refuses an endpoint that has changed. For a new folder the endpoint is measured at once, and with
    `tools` must read those of a chat.

    Attributes:
        facts: what it accepts and returns, as in the cache's identity.
        config: the options with the number of entries that it returns.
    """

    def __init__(self, config: CacheConfig, model: ModelSource, folder: Folder, *, tools: bool) -> None:
        self._model, self._folder, self._tools = model, folder, tools
        self._engine: OpenAIEngine | None = None
        self.config = config
        known = _known(folder)
        if known is None:
            say(f"asking {config.teacher_url} what it returns")
            self._engine = self._open(None, at_least=config.top_k is not None)
            known = self._engine.dialect.facts()
        self.facts: dict[str, Any] = known
        if config.top_mass is not None:
            self.config = config.model_copy(update={"max_top_k": min(config.most_entries, known["top_k"])})
        elif config.top_k is None:
            self.config = config.model_copy(update={"top_k": known["top_k"]})

    def _open(self, known: dict[str, Any] | None, *, at_least: bool) -> OpenAIEngine:
        from dpkd.teacher_cache.engines.openai.engine import OpenAIEngine

        drawn = sampling(self.config, self._model.stop_token_ids())
        options, answers = engine_options(self.config), self._folder.child(ANSWERS)
        return OpenAIEngine(
            self._model,
            options,
            self.config,
            drawn,
            at_least=at_least,
            known=known,
            answers=answers,
            tools=self._tools,
        )

    def unknown_logprobs(self) -> dict[str, str]:
        """What is unknown of the cache's log-probs, as its identity records it."""
        unknown = {"end": self.facts["end"]}
        return unknown if self.facts["top_k"] else unknown | {"responses": "unknown"}

    @contextlib.contextmanager
    def filler(self) -> Iterator[Filler]:
        """What fills the cache's shards; closes the connection after the block."""
        engine, self._engine = self._engine or self._open(self.facts, at_least=True), None
        with engine_filler(engine, self._model) as filler:
            yield filler

    def close(self) -> None:
        """Close the connection of an endpoint that was measured, and perhaps not used."""
        if self._engine is not None:
            self._engine.close()


def _known(folder: Folder) -> dict[str, Any] | None:
    """What an earlier run in `folder` measured of the endpoint; None for a new folder, and for one of another job."""
    if folder.exists(MANIFEST):
        identities = load_manifest(folder, CACHE_KIND).identities
    elif (job := read_job(folder)) is not None:
        identities = job["identities"]
    else:
        return None
    known: dict[str, Any] | None = identities.get("generation", {}).get("endpoint")
    return known
