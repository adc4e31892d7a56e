"""Build a teacher cache: ask the teacher once, commit shard by shard, write the manifest last."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from dpkd.core.models import ModelSource, locate_model, locate_remote_model
from dpkd.core.progress import Progress, say
from dpkd.core.prompts.examples import ExampleSource, SkippedRow, open_examples
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.filling import EndpointTeacher, Filler, open_filler
from dpkd.teacher_cache.build.plan import RowPlan
from dpkd.teacher_cache.build.request import (
    check_shard_size,
    engine_identity,
    engine_options,
    logprobs_identity,
    sampling,
    say_complete,
)
from dpkd.teacher_cache.build.survey import Part, Survey
from dpkd.teacher_cache.engines.engine import ResolvedEngine
from dpkd.teacher_cache.engines.open import check_engine, resolve_engine
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import CACHE_KIND
from dpkd.teacher_cache.store.shards import read_shard

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.manifest import Manifest


def build_cache(config: CacheConfig) -> Manifest:
    """Build the cache (with `config.student`: the round) that `config` describes, or resume it; returns the manifest.

    A finished cache with the same options is left as it is. `Manifest.failed` lists the rows that the engine could not
    answer. Raises `UserError` for options, data or models that cannot be used, before anything is written, and if the
    engine or the disk fails; committed shards are kept.
    """
    if config.student is not None:
        from dpkd.teacher_cache.build.rounds import build_round

        return build_round(config)
    inputs = open_inputs(config)
    survey = inputs.plan.survey
    _say_skipped(survey.skipped)
    survey.text.say()
    check_shard_size(config, max(survey.num_rows.values()))
    folder = open_folder(config.out)
    with contextlib.ExitStack() as stack:
        if config.engine == "openai":
            endpoint = stack.enter_context(EndpointTeacher(config, inputs.teacher, folder))
            config, inputs = endpoint.config, inputs._replace(endpoint=endpoint)
        job = Job(folder, CACHE_KIND, cache_identities(config, inputs))
        job.check_source = inputs.source.check_unchanged
        manifest = stack.enter_context(job.opened(config.to_toml(), survey.by_origin()))
        if manifest is None:
            fill_cache(config, inputs, survey, job)
            manifest = job.finish([asdict(row) for row in survey.skipped], survey.text.to_dict())
    say_complete(f"the cache {config.out}", manifest)
    return manifest


def fill_cache(config: CacheConfig, inputs: CacheInputs, survey: Survey, job: Job) -> None:
    """Commit every shard that is missing in `job`; raises `UserError` if the data changed meanwhile."""
    if job.num_done() < sum(survey.num_rows.values()):
        say(f"starting {inputs.engine} with the teacher {config.teacher_model or config.teacher}")
        if inputs.engine == "openai":
            endpoint = inputs.endpoint or EndpointTeacher(config, inputs.teacher, job.folder)
            opened = endpoint.filler()
        else:
            opened = open_filler(inputs.engine, inputs.teacher, engine_options(config), config)
        with opened as filler:
            for part, num_rows in survey.in_order():
                _fill(job, inputs.plan, part, filler, config, num_rows)
    inputs.source.check_unchanged(content=True)


class CacheInputs(NamedTuple):
    """What a cache is made of."""

    engine: ResolvedEngine
    source: ExampleSource
    teacher: ModelSource
    encoder: PromptEncoder
    plan: RowPlan
    endpoint: EndpointTeacher | None = None


def open_inputs(config: CacheConfig) -> CacheInputs:
    """Find and check the data, the teacher and the engine; raises `UserError` for those that cannot be used."""
    assert config.data is not None  # checked by the config
    engine = resolve_engine(config.engine)
    source = open_examples(config.data)
    if engine == "openai":
        teacher: ModelSource = locate_remote_model(config.teacher, str(config.teacher_model))
    else:
        teacher = locate_model(config.teacher, "teacher", needs_weights=engine != "server")
    check_engine(engine, teacher, engine_options(config), scores=config.responses != "teacher")
    encoder = PromptEncoder(teacher.tokenizer, config.template, config.template_arg)
    return CacheInputs(engine, source, teacher, encoder, RowPlan(source, encoder, config))


def _fill(job: Job, plan: RowPlan, part: Part, filler: Filler, config: CacheConfig, num_rows: int) -> None:
    layout = ShardLayout(part.origin, config.rows_per_shard, part.stem)
    done = job.num_done(layout.prefix)
    if done == num_rows:
        return
    asks = part.origin == "teacher"
    drawn = sampling(config, job.identities["generation"]["stop_token_ids"]) if asks else None
    label = ("teacher responses" if asks else "teacher scores of references") + part.note
    rows = plan.rows(part, EarlierAnswers(job)) if part.turn > 1 else plan.rows(part)
    with Progress(label, num_rows, "rows", done) as progress:
        filler(job, layout, rows, drawn, progress)


class EarlierAnswers:
    """The teacher's answers to earlier turns, from the shards that the job has committed."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @cached_property
    def _texts(self) -> dict[tuple[str, int], str]:
        texts: dict[tuple[str, int], str] = {}
        for record in list(self._job.committed.values()):
            if record.origin == "teacher":
                shard = read_shard(self._job.folder, record)
                texts |= {shard.key(index): shard.texts(index)[1] for index in range(len(shard))}
        return texts

    def __call__(self, name: str, sample: int) -> str | None:
        return self._texts.get((name, sample))


def cache_identities(config: CacheConfig, inputs: CacheInputs) -> dict[str, Any]:
    """What the cache's manifest says that it is."""
    engine, source, teacher, encoder, plan, endpoint = inputs
    if engine == "openai" and endpoint is None:
        endpoint = EndpointTeacher(config, teacher, open_folder(config.out))  # of a folder that knows it
    return {
        "teacher": teacher.identity(config.dtype),
        "tokenizer": teacher.tokenizer_identity() | {"probe": teacher.tokenizer_probe()},
        "template": encoder.identity(),
        "data": source.identity | {"limit": config.limit},
        "generation": {
            **engine_identity(engine, config),
            **({} if endpoint is None else {"endpoint": endpoint.facts}),
            "responses": config.responses,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "num_samples": config.num_samples,
            "max_prompt_tokens": config.max_prompt_tokens,
            "max_new_tokens": config.max_new_tokens,
            "stop_token_ids": teacher.stop_token_ids(),
            "seed": config.seed,
            **plan.survey.generation_identity,
            **({"thinking": config.thinking} if config.thinking != "keep" else {}),
        },
        "logprobs": logprobs_identity(config) | ({} if endpoint is None else endpoint.unknown_logprobs()),
        "layout": {"rows_per_shard": config.rows_per_shard, **plan.survey.layout_identity},
    }


def _say_skipped(skipped: list[SkippedRow]) -> None:
    if not skipped:
        return
    say(f"{len(skipped)} rows of the data are skipped (all are listed in the manifest):")
    for row in skipped[:5]:
        say(f"  line {row.line}: {row.reason}")
    kinds = Counter(re.sub(r"\d+", "N", row.reason) for row in skipped[5:])
    for kind, count in kinds.most_common(3):
        say(f"  … {count} more: {kind}")
