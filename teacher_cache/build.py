"""Build a teacher cache: ask once, commit shard by shard, write the manifest last."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dpkd.teacher_cache.codec import GRID_NATS
from dpkd.teacher_cache.config import CacheConfig
from dpkd.teacher_cache.engine import (
    Engine,
    EngineOptions,
    GenerateRequest,
    Sampling,
    ScoreRequest,
    check_fits,
    open_engine,
    resolve_engine,
)
from dpkd.teacher_cache.examples import ExampleSource, SkippedRow, open_examples
from dpkd.teacher_cache.job import Job, ShardAssembler
from dpkd.teacher_cache.models import ModelSource, locate_model
from dpkd.teacher_cache.plan import RowPlan
from dpkd.teacher_cache.progress import Progress, say
from dpkd.teacher_cache.reader import CACHE_KIND
from dpkd.teacher_cache.schema import Origin
from dpkd.teacher_cache.templates import PromptEncoder

if TYPE_CHECKING:
    from dpkd.teacher_cache.manifest import Manifest


def build_cache(config: CacheConfig) -> Manifest:
    """Build the cache (or, with `config.student`, the round) that `config` describes, or go on with it.

    Returns the manifest; a finished cache of the same options is left as it is. Raises `UserError` for options, data
    or models that cannot be used, before anything is written.
    """
    if config.student is not None:
        from dpkd.teacher_cache.rounds import build_round

        return build_round(config)
    assert config.data is not None  # the config's own check
    engine_name = resolve_engine(config.engine)
    source = open_examples(config.data)
    teacher = locate_model(config.teacher, "teacher")
    check_fits(teacher, engine_options(config))
    encoder = PromptEncoder(teacher.tokenizer, config.template)
    plan = RowPlan(source, encoder, config)
    survey = plan.survey()
    _say_skipped(survey.skipped)

    job = Job(config.out, CACHE_KIND, _identities(config, engine_name, teacher, encoder, source))
    manifest = job.open(config.to_toml())
    if manifest is not None:
        say(f"the cache {config.out} is complete: {manifest.counts['rows']} rows")
        return manifest
    engine: Engine | None = None
    try:
        for origin in plan.origins:
            done = committed_rows(job, f"shards/{origin}-")
            if done == survey.num_rows[origin]:
                continue
            if engine is None:
                say(f"starting {engine_name} with the teacher {config.teacher}")
                engine = open_engine(engine_name, teacher, engine_options(config))
            _fill(job, plan, origin, engine, encoder, config, survey.num_rows[origin], done)
    finally:
        if engine is not None:
            engine.close()
    manifest = job.finish([asdict(row) for row in survey.skipped])
    say(f"the cache {config.out} is complete: {manifest.counts['rows']} rows, {manifest.counts['positions']} tokens")
    return manifest


def _fill(
    job: Job,
    plan: RowPlan,
    origin: Origin,
    engine: Engine,
    encoder: PromptEncoder,
    config: CacheConfig,
    num_rows: int,
    done: int,
) -> None:
    label = "teacher responses" if origin == "teacher" else "teacher scores of references"
    with (
        Progress(label, num_rows, "rows", done) as progress,
        ShardAssembler(job, origin, config.rows_per_shard, encoder.decode) as assembler,
    ):
        rows = assembler.pending(plan.rows(origin))
        if origin == "teacher":
            results = engine.generate(
                (GenerateRequest(row.index, row.prompt_ids, row.seed) for row in rows),
                sampling(config, job.identities["generation"]["stop_token_ids"]),
            )
        else:
            results = engine.score(
                ScoreRequest(row.index, row.prompt_ids, row.response_ids)
                for row in rows
                if row.response_ids is not None
            )
        tokens = 0
        for result in results:
            assembler.add(result)
            tokens += len(result.response_ids)
            progress.advance(1, tokens=tokens)


def committed_rows(job: Job, prefix: str) -> int:
    """Rows of committed shards whose path starts with `prefix`."""
    return sum(record.rows for path, record in job.committed.items() if path.startswith(prefix))


def engine_options(config: CacheConfig, top_k: int | None = None) -> EngineOptions:
    """The engine's options as `config` asks for them, with another `top_k` where given."""
    return EngineOptions(
        max_length=config.max_prompt_tokens + config.max_new_tokens,
        top_k=config.top_k if top_k is None else top_k,
        dtype=config.dtype,
        device=config.device,
        max_num_seqs=config.max_num_seqs,
    )


def sampling(config: CacheConfig, stop_token_ids: list[int]) -> Sampling:
    """How responses are drawn as `config` asks for it."""
    return Sampling(config.temperature, config.top_p, config.max_new_tokens, tuple(stop_token_ids))


def logprobs_identity(config: CacheConfig) -> dict[str, Any]:
    """How log-probs were taken and are kept."""
    return {
        "mode": "raw_logprobs",
        "temperature": 1.0,
        "unit": "nats",
        "top_k": config.top_k,
        "entry_grid_nats": GRID_NATS,
    }


def _identities(
    config: CacheConfig, engine: str, teacher: ModelSource, encoder: PromptEncoder, source: ExampleSource
) -> dict[str, Any]:
    return {
        "teacher": teacher.identity(config.dtype),
        "tokenizer": teacher.tokenizer_identity(),
        "template": encoder.identity(),
        "data": source.identity | {"limit": config.limit},
        "generation": {
            "engine": engine,
            "responses": config.responses,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "num_samples": config.num_samples,
            "max_prompt_tokens": config.max_prompt_tokens,
            "max_new_tokens": config.max_new_tokens,
            "stop_token_ids": teacher.stop_token_ids(),
            "seed": config.seed,
        },
        "logprobs": logprobs_identity(config),
        "layout": {"rows_per_shard": config.rows_per_shard},
    }


def _say_skipped(skipped: list[SkippedRow]) -> None:
    if not skipped:
        return
    say(f"{len(skipped)} rows of the data are left out (all are listed in the manifest):")
    for row in skipped[:5]:
        say(f"  line {row.line}: {row.reason}")
    for reason, count in Counter(row.reason.split(" tokens")[0] for row in skipped[5:]).most_common(3):
        say(f"  … {count} more, such as: {reason}")
