"""A round: the student's responses to the cache's prompts, scored by the teacher, row for row beside the cache.

A round is a directory with a manifest of its own inside the cache, so a finished cache is never edited. It is built in
two phases that never hold two models at once: the student samples (kept in `sampled/`), then the teacher scores.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dpkd.teacher_cache.build import committed_rows, engine_options, logprobs_identity, sampling
from dpkd.teacher_cache.config import CacheConfig
from dpkd.teacher_cache.engine import Engine, GenerateRequest, ScoreRequest, check_fits, open_engine, resolve_engine
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.examples import open_examples
from dpkd.teacher_cache.identity import differences
from dpkd.teacher_cache.job import Job, ShardAssembler
from dpkd.teacher_cache.models import ModelSource, locate_model
from dpkd.teacher_cache.plan import request_seed
from dpkd.teacher_cache.progress import Progress, say
from dpkd.teacher_cache.reader import ROUND_KIND, TeacherCache, round_dir
from dpkd.teacher_cache.schema import PlannedRow, ShardRows
from dpkd.teacher_cache.shards import Ledger, read_shard

if TYPE_CHECKING:
    from dpkd.teacher_cache.manifest import Manifest

_SAMPLED = "sampled"


def build_round(config: CacheConfig) -> Manifest:
    """Build the round `config.round` of the finished cache `config.out`, or go on with it.

    Raises `UserError` when the cache, the teacher or the student is not the one that the round needs.
    """
    cache = TeacherCache.open(config.out)
    config = _with_cache_options(cache, config)
    assert config.student is not None  # the config's own check
    assert config.round is not None
    engine_name = resolve_engine(config.engine)
    teacher = locate_model(config.teacher, "teacher")
    student = locate_model(config.student, "student")
    _check_same_teacher(cache, teacher, config)
    cache.check_tokenizer(student, "student")
    check_fits(teacher, engine_options(config))
    check_fits(student, engine_options(config, top_k=0))

    directory = round_dir(config.out, config.round)
    job = Job(directory, ROUND_KIND, _identities(cache, config, engine_name, student))
    manifest = job.open(config.to_toml())
    if manifest is not None:
        say(f"the round {directory} is complete: {manifest.counts['rows']} rows")
        return manifest
    sampled = Job(directory / _SAMPLED, _SAMPLED, job.identities)
    sampled.committed = Ledger(sampled.directory).committed()
    num_rows = cache.manifest.counts["rows"]
    if committed_rows(job, "shards/") < num_rows:
        if committed_rows(sampled, "shards/") < num_rows:
            say(f"starting {engine_name} with the student {config.student}")
            with open_engine(engine_name, student, engine_options(config, top_k=0)) as engine:
                _sample(cache, sampled, engine, config, student)
        say(f"starting {engine_name} with the teacher {config.teacher}")
        with open_engine(engine_name, teacher, engine_options(config)) as engine:
            _score(cache, sampled, job, engine, student)
    manifest = job.finish([])
    shutil.rmtree(sampled.directory, ignore_errors=True)
    say(f"the round {directory} is complete: {manifest.counts['rows']} rows, {manifest.counts['positions']} tokens")
    return manifest


def _sample(cache: TeacherCache, sampled: Job, engine: Engine, config: CacheConfig, student: ModelSource) -> None:
    options = sampling(config, student.stop_token_ids())
    with Progress(
        "student responses", cache.manifest.counts["rows"], "rows", committed_rows(sampled, "shards/")
    ) as bar:
        for origin in cache.origins:
            with _assembler(cache, sampled, origin, student) as assembler:
                rows = assembler.pending(_rows(cache, origin, config.seed))
                requests = (GenerateRequest(row.index, row.prompt_ids, row.seed) for row in rows)
                for result in engine.generate(requests, options):
                    assembler.add(result)
                    bar.advance()


def _score(cache: TeacherCache, sampled: Job, job: Job, engine: Engine, student: ModelSource) -> None:
    with Progress("teacher scores", cache.manifest.counts["rows"], "rows", committed_rows(job, "shards/")) as bar:
        for origin in cache.origins:
            with _assembler(cache, job, origin, student) as assembler:
                rows = assembler.pending(_sampled_rows(cache, sampled, origin))
                requests = (
                    ScoreRequest(row.index, row.prompt_ids, row.response_ids)
                    for row in rows
                    if row.response_ids is not None
                )
                for result in engine.score(requests):
                    assembler.add(result)
                    bar.advance()


def _assembler(cache: TeacherCache, job: Job, origin: str, student: ModelSource) -> ShardAssembler:
    def to_text(ids: list[int]) -> str:
        return str(student.tokenizer.decode(ids, skip_special_tokens=True))

    return ShardAssembler(job, "student", cache.rows_per_shard, to_text, stem=origin)


def _beside(index: int, shard: ShardRows, place: int) -> PlannedRow:
    """The student's row for a row that is read back: the same example and prompt."""
    row = shard.row(place)
    prompt, _ = shard.texts(place)
    return PlannedRow(index, row.example_id, row.sample, "student", prompt, row.prompt_ids.tolist())


def _rows(cache: TeacherCache, origin: str, seed_of_round: int) -> Iterator[PlannedRow]:
    """One student row for every row of the cache, in the cache's order."""
    index = 0
    for record in cache.shards(origin):
        shard = cache.read(record)
        for place in range(len(shard)):
            row = shard.row(place)
            seed = request_seed(seed_of_round, f"{origin}/{row.example_id}", row.sample)
            yield replace(_beside(index, shard, place), seed=seed)
            index += 1


def _sampled_rows(cache: TeacherCache, sampled: Job, origin: str) -> Iterator[PlannedRow]:
    """The same rows with the responses that the student gave."""
    index = 0
    for path in sorted(path for path in sampled.committed if path.startswith(f"shards/{origin}-")):
        shard = read_shard(sampled.directory, sampled.committed[path])
        for place in range(len(shard)):
            row = shard.row(place)
            yield replace(
                _beside(index, shard, place),
                response_ids=row.response_ids.tolist(),
                finish_reason="stop" if row.finish_reason == "stop" else "length",
            )
            index += 1


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
                where=cache.directory,
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
                where=cache.directory,
                advice=f"Leave --{key.replace('_', '-')} out",
            )
    return config.model_copy(update=held)


def _check_same_teacher(cache: TeacherCache, teacher: ModelSource, config: CacheConfig) -> None:
    held = cache.manifest.identities["teacher"]
    ours = teacher.identity(config.dtype)
    if ours["weights_sha256"] != held["weights_sha256"] or ours["dtype"] != held["dtype"]:
        raise UserError(
            f"the teacher is not the one of the cache; differing: {'; '.join(differences(held, ours))}",
            where=cache.directory,
            advice="Give the teacher that the cache was built with",
        )


def _identities(cache: TeacherCache, config: CacheConfig, engine: str, student: ModelSource) -> dict[str, Any]:
    return {
        "cache": cache.manifest.fingerprint,
        "student": student.identity(config.dtype),
        "generation": {
            "engine": engine,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "stop_token_ids": student.stop_token_ids(),
            "seed": config.seed,
        },
        "logprobs": logprobs_identity(config),
    }
