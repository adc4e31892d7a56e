"""A round: the student's responses to the cache's prompts, scored by the teacher, row for row beside the cache.

A round is a directory with a manifest of its own inside the cache, so a finished cache is never edited. It is built in
two phases that never hold two models at once: the student samples (kept in `sampled/`), then the teacher scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.identity import differences
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.progress import Progress, say
from dpkd.core.prompts.examples import open_examples
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.filling import open_filler
from dpkd.teacher_cache.build.plan import request_seed
from dpkd.teacher_cache.build.request import engine_identity, engine_options, logprobs_identity, sampling, say_complete
from dpkd.teacher_cache.engines.engine import ResolvedEngine
from dpkd.teacher_cache.engines.open import check_engine, resolve_engine
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import ROUND_KIND, TeacherCache, round_folder
from dpkd.teacher_cache.store.schema import PlannedRow, ShardRows
from dpkd.teacher_cache.store.shards import read_shard

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.manifest import Manifest

_SAMPLED = "sampled"


def build_round(config: CacheConfig) -> Manifest:
    """Build the round `config.round` of the finished cache `config.out`, or go on with it.

    Raises `UserError` when the cache, the teacher or the student is not the one that the round needs.
    """
    cache = TeacherCache.open(config.out)
    config = _with_cache_options(cache, config)
    assert config.student is not None  # the config's own check
    assert config.round is not None
    engine = resolve_engine(config.engine)
    if engine == "server":
        raise UserError(
            "a round needs the student and the teacher on one engine, and a server holds one model",
            found="--engine server",
            advice="Choose --engine vllm, ray or transformers for a round",
        )
    teacher = locate_model(config.teacher, "teacher")
    student = locate_model(config.student, "student")
    _check_same_teacher(cache, teacher, config)
    cache.check_tokenizer(student, "student")
    check_engine(engine, teacher, engine_options(config), scores=True)
    check_engine(engine, student, engine_options(config, top_k=0), scores=True)

    folder = round_folder(cache.folder, config.round)
    job = Job(folder, ROUND_KIND, _identities(cache, config, engine, student))
    num_rows = cache.manifest.counts["rows"]
    with job.opened(config.to_toml(), {"student": num_rows}) as manifest:
        if manifest is None:
            sampled = Job(folder.child(_SAMPLED), _SAMPLED, job.identities)
            sampled.committed = sampled.ledger.committed()
            if job.num_done() < num_rows:
                _sample_and_score(cache, sampled, job, engine, config, student, teacher)
            manifest = job.finish([])
            folder.delete(_SAMPLED)
    say_complete(f"the round {folder}", manifest)
    return manifest


def _sample_and_score(
    cache: TeacherCache,
    sampled: Job,
    job: Job,
    engine: ResolvedEngine,
    config: CacheConfig,
    student: ModelSource,
    teacher: ModelSource,
) -> None:
    num_rows = cache.manifest.counts["rows"]
    if sampled.num_done() < num_rows:
        say(f"starting {engine} with the student {config.student}")
        drawn = sampling(config, student.stop_token_ids())
        with (
            open_filler(engine, student, engine_options(config, top_k=0), config) as filler,
            Progress("student responses", num_rows, "rows", sampled.num_done()) as progress,
        ):
            for origin in cache.origins:
                filler(sampled, _layout(cache, origin), _rows(cache, origin, config.seed), drawn, progress)
    say(f"starting {engine} with the teacher {config.teacher}")
    with (
        open_filler(engine, teacher, engine_options(config), config) as filler,
        Progress("teacher scores", num_rows, "rows", job.num_done()) as progress,
    ):
        for origin in cache.origins:
            filler(job, _layout(cache, origin), _sampled_rows(cache, sampled, origin), None, progress)


def _layout(cache: TeacherCache, origin: str) -> ShardLayout:
    return ShardLayout("student", cache.rows_per_shard, stem=origin)


def _beside(index: int, shard: ShardRows, place: int) -> PlannedRow:
    """The student's row for a row that is read back: the same example and prompt."""
    row = shard.row(place)
    prompt, _ = shard.texts(place)
    return PlannedRow(index, row.example_id, row.sample, "student", prompt, row.prompt_ids.tolist())


def _rows(cache: TeacherCache, origin: str, seed_of_round: int) -> Iterator[PlannedRow]:
    """One student row for every row of the cache, in the cache's order and shards."""
    for number, (_, shard) in enumerate(cache.scan(cache.shards(origin))):
        for place in range(len(shard)):
            row = shard.row(place)
            seed = request_seed(seed_of_round, f"{origin}/{row.example_id}", row.sample)
            yield replace(_beside(number * cache.rows_per_shard + place, shard, place), seed=seed)


def _sampled_rows(cache: TeacherCache, sampled: Job, origin: str) -> Iterator[PlannedRow]:
    """The same rows with the responses that the student gave; a row that it could not answer comes out as failed."""
    for number, record in enumerate(cache.shards(origin)):
        held = sampled.committed[record.path]
        reasons = {(row["example_id"], row["sample"]): row["reason"] for row in held.failed}
        answered = read_shard(sampled.folder, held)
        answers = {answered.key(place): answered.row(place) for place in range(len(answered))}
        shard = cache.read(record)
        for place in range(len(shard)):
            planned = _beside(number * cache.rows_per_shard + place, shard, place)
            key = (planned.example_id, planned.sample)
            if key in reasons:
                yield replace(planned, failed=f"the student: {reasons[key]}")
                continue
            response_ids = answers[key].response_ids.tolist()
            if max(response_ids, default=0) >= cache.vocab_size:  # its logits are padded to a greater width
                reason = f"the student drew the id {max(response_ids)}, which the teacher has no place for"
                yield replace(planned, failed=reason)
                continue
            yield replace(
                planned,
                response_ids=response_ids,
                finish_reason="stop" if answers[key].finish_reason == "stop" else "length",
            )


def _with_cache_options(cache: TeacherCache, config: CacheConfig) -> CacheConfig:
    """`config` with the options that a round shares with its cache; raises `UserError` for one asked otherwise."""
    identities = cache.manifest.identities
    generation = identities["generation"]
    if config.data is not None:
        found = open_examples(config.data).identity["sha256"]
        if found != identities["data"]["sha256"]:
            raise UserError(
                "the data are not those of the cache",
                found=f"sha256 {found[:12]} of {config.data}",
                expected=f"{identities['data']['sha256'][:12]} of {identities['data']['name']}",
                where=cache.folder,
                advice="Leave --data out: a round takes the cache's prompts",
            )
    held = {
        "template": identities["template"]["name"],
        "limit": identities["data"]["limit"],
        "responses": generation["responses"],
        "num_samples": generation["num_samples"],
        "max_prompt_tokens": generation["max_prompt_tokens"],
        "rows_per_shard": cache.rows_per_shard,
    }
    for key, value in held.items():
        asked = getattr(config, key)
        if asked not in (value, CacheConfig.model_fields[key].default):
            raise UserError(
                f"a round has the {key} of its cache",
                found=asked,
                expected=value,
                where=cache.folder,
                advice=f"Leave --{key.replace('_', '-')} out",
            )
    return config.model_copy(update=held)


def _check_same_teacher(cache: TeacherCache, teacher: ModelSource, config: CacheConfig) -> None:
    held = cache.manifest.identities["teacher"]
    ours = teacher.identity(config.dtype)
    if ours["weights_sha256"] != held["weights_sha256"] or ours["dtype"] != held["dtype"]:
        raise UserError(
            f"the teacher is not the one of the cache; differing: {'; '.join(differences(held, ours))}",
            where=cache.folder,
            advice="Give the teacher that the cache was built with",
        )


def _identities(
    cache: TeacherCache, config: CacheConfig, engine: ResolvedEngine, student: ModelSource
) -> dict[str, Any]:
    return {
        "cache": cache.manifest.fingerprint,
        "student": student.identity(config.dtype),
        "generation": {
            **engine_identity(engine, config),
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "stop_token_ids": student.stop_token_ids(),
            "seed": config.seed,
        },
        "logprobs": logprobs_identity(config),
    }
