"""Build a teacher cache: ask the teacher once, commit shard by shard, write the manifest last."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from dpkd.core.models import ModelSource, locate_model, locate_remote_model
from dpkd.core.progress import Progress, say
from dpkd.core.prompts.examples import SkippedRow
from dpkd.core.prompts.sources import ExampleSource, open_examples
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.filling import EndpointTeacher, Filler, open_filler
from dpkd.teacher_cache.build.plan import AnswerOf, RowPlan
from dpkd.teacher_cache.build.request import (
    check_shard_size,
    engine_identity,
    engine_options,
    logprobs_identity,
    sampling,
    say_complete,
)
from dpkd.teacher_cache.build.survey import Part
from dpkd.teacher_cache.engines.engine import ResolvedEngine
from dpkd.teacher_cache.engines.open import check_engine, resolve_engine
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import CACHE_KIND
from dpkd.teacher_cache.store.shards import read_table

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.folder import Folder
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
    folder = open_folder(config.out)
    inputs = open_inputs(config, folder)
    survey = inputs.plan.survey
    _say_skipped(survey.skipped)
    survey.text.say()
    with contextlib.ExitStack() as stack:
        if inputs.endpoint is not None:
            stack.callback(inputs.endpoint.close)
        job = Job(folder, CACHE_KIND, cache_identities(inputs))
        job.check_source = inputs.source.check_unchanged
        manifest = stack.enter_context(job.opened(inputs.config.to_toml(), survey.by_origin()))
        if manifest is None:
            fill_cache(inputs, job)
            manifest = job.finish([asdict(row) for row in survey.skipped], survey.text.to_dict())
    say_complete(f"the cache {config.out}", manifest)
    return manifest


class CacheInputs(NamedTuple):
    """What a cache is made of; `config` asks an endpoint for as many entries as it returns."""

    config: CacheConfig
    engine: ResolvedEngine
    source: ExampleSource
    teacher: ModelSource
    encoder: PromptEncoder
    plan: RowPlan
    endpoint: EndpointTeacher | None

    def open_teacher(self) -> contextlib.AbstractContextManager[Filler]:
        """The filler with the teacher loaded, or connected to its endpoint."""
        if self.endpoint is not None:
            return self.endpoint.filler()
        return open_filler(self.engine, self.teacher, engine_options(self.config), self.config)


def open_inputs(config: CacheConfig, folder: Folder) -> CacheInputs:
    """Find and check the data, the teacher and the engine; raises `UserError` for those that cannot be used.

    An endpoint is asked last, because its answers cost money. `folder` may know what it returns.
    """
    assert config.data is not None  # checked by the config
    engine = resolve_engine(config.engine)
    source = open_examples(config.data)
    if engine == "openai":
        teacher: ModelSource = locate_remote_model(config.teacher, str(config.teacher_model))
    else:
        teacher = locate_model(config.teacher, "teacher", needs_weights=engine != "server")
    scores, draws = config.responses != "teacher", config.responses != "reference"
    temperature = config.temperature if draws else 0.0
    check_engine(engine, teacher, engine_options(config), scores=scores, temperature=temperature)
    encoder = PromptEncoder(teacher.tokenizer, config.template, config.template_arg)
    plan = RowPlan(source, encoder, config)
    check_shard_size(config, max(plan.survey.num_rows.values()))
    endpoint = None
    if engine == "openai":
        endpoint = EndpointTeacher(config, teacher, folder, tools=plan.survey.has_tools)
        config = endpoint.config
    return CacheInputs(config, engine, source, teacher, encoder, plan, endpoint)


def fill_cache(inputs: CacheInputs, job: Job) -> None:
    """Commit every shard that is missing in `job`; raises `UserError` if the data changed meanwhile."""
    config, survey = inputs.config, inputs.plan.survey
    if job.num_done() < sum(survey.num_rows.values()):
        say(f"starting {inputs.engine} with the teacher {config.teacher_model or config.teacher}")
        with inputs.open_teacher() as filler:
            for part, num_rows in survey.in_order():
                _fill(job, inputs.plan, part, filler, config, num_rows)
    inputs.source.check_unchanged(content=True)


def _fill(job: Job, plan: RowPlan, part: Part, filler: Filler, config: CacheConfig, num_rows: int) -> None:
    layout = ShardLayout(part.origin, config.rows_per_shard, part.stem)
    done = job.num_done(layout.prefix)
    if done == num_rows:
        return
    asks = part.origin == "teacher"
    drawn = sampling(config, job.identities["generation"]["stop_token_ids"]) if asks else None
    label = ("teacher responses" if asks else "teacher scores of references") + part.note
    rows = plan.rows(part, earlier_answers(job)) if part.turn > 1 else plan.rows(part)
    with Progress(label, num_rows, "rows", done) as progress:
        filler(job, layout, rows, drawn, progress)


def earlier_answers(job: Job) -> AnswerOf:
    """The teacher's answers to earlier turns, from the shards that the job has committed."""
    texts: dict[tuple[str, int], str] = {}
    for record in list(job.committed.values()):
        if record.origin == "teacher":
            table = read_table(job.folder, record, ("example_id", "sample", "response"))
            names, samples, responses = (table[name].to_pylist() for name in table.column_names)
            texts |= zip(zip(names, samples, strict=True), responses, strict=True)
    return lambda name, sample: texts.get((name, sample))


def cache_identities(inputs: CacheInputs) -> dict[str, Any]:
    """What the cache's manifest says that it is."""
    config, engine, source, teacher, encoder, plan, endpoint = inputs
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
