"""A round: the student's responses to the cache's prompts, scored by the teacher, with the cache's rows and shards.

A round is a directory with its own manifest inside the cache, so a finished cache is never edited. It is built in two
phases, so that only one model is loaded at a time: the student samples (into `sampled/`), then the teacher scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.progress import Progress, say
from dpkd.core.prompts.examples import open_examples
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.filling import open_filler
from dpkd.teacher_cache.build.plan import request_seed
from dpkd.teacher_cache.build.request import engine_identity, engine_options, logprobs_identity, sampling, say_complete
from dpkd.teacher_cache.engines.engine import FinishReason, ResolvedEngine
from dpkd.teacher_cache.engines.open import check_engine, resolve_engine
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import ROUND_KIND, TeacherCache, round_folder
from dpkd.teacher_cache.store.schema import PlannedRow
from dpkd.teacher_cache.store.shards import read_shard

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.manifest import Manifest

_SAMPLED = "sampled"


def build_round(config: CacheConfig) -> Manifest:
    """Build the round `config.round` of the finished cache `config.out`, or resume it.

    Raises `UserError` if the cache, the teacher or the student is not the one that the round needs.
    """
    cache = TeacherCache.open(config.out)
    config = _with_cache_options(cache, config)
    assert config.student is not None  # checked by the config
    assert config.round is not None
    engine = resolve_engine(config.engine)
    if engine == "server":
        raise UserError(
            "a round cannot use servers: it runs the student and the teacher on one engine",
            found="--engine server",
            advice="Choose --engine vllm, ray or transformers for a round",
        )
    teacher = locate_model(config.teacher, "teacher")
    student = locate_model(config.student, "student")
    cache.check_teacher(teacher, advice="Give the teacher that the cache was built with")
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
            filler(job, _layout(cache, origin), _sampled_rows(cache, sampled, origin, config.seed), None, progress)


def _layout(cache: TeacherCache, origin: str) -> ShardLayout:
    return ShardLayout("student", cache.rows_per_shard, stem=origin)


def _rows(cache: TeacherCache, origin: str, seed: int) -> Iterator[PlannedRow]:
    """One row of the student for each row of the cache, in the cache's order and shards."""
    for number, (_, shard) in enumerate(cache.scan(cache.shards(origin))):
        for i in range(len(shard)):
            row, (prompt, _) = shard.row(i), shard.texts(i)
            row_seed = request_seed(seed, f"{origin}/{row.example_id}", row.sample)
            index = number * cache.rows_per_shard + i
            yield PlannedRow(index, row.example_id, row.sample, "student", prompt, row.prompt_ids.tolist(), row_seed)


def _sampled_rows(cache: TeacherCache, sampled: Job, origin: str, seed: int) -> Iterator[PlannedRow]:
    """The same rows with the student's responses; a row that it could not answer is marked as failed."""
    rows = _rows(cache, origin, seed)
    for record in cache.shards(origin):
        drawn = sampled.committed[record.path]
        reasons = {(row["example_id"], row["sample"]): f"the student: {row['reason']}" for row in drawn.failed}
        shard = read_shard(sampled.folder, drawn)
        for planned in itertools.islice(rows, record.rows):
            key = (planned.example_id, planned.sample)
            if key in reasons:
                yield replace(planned, failed=reasons[key])
                continue
            answer = shard.row(shard.index_of[key])
            highest = int(answer.response_ids.max(initial=0))
            if highest >= cache.vocab_size:  # the student's logits are padded to a larger width
                yield replace(planned, failed=f"the student drew the id {highest}, which the teacher does not have")
                continue
            reason: FinishReason = "stop" if answer.finish_reason == "stop" else "length"
            yield replace(
                planned,
                response_ids=answer.response_ids.tolist(),
                finish_reason=reason,
                sampling_logprobs=answer.response_logprobs.tolist(),
            )


def _with_cache_options(cache: TeacherCache, config: CacheConfig) -> CacheConfig:
    """`config` with the options of the cache; raises `UserError` for one that is given and differs."""
    identities = cache.manifest.identities
    generation = identities["generation"]
    if config.data is not None:
        actual = open_examples(config.data).identity["sha256"]
        if actual != identities["data"]["sha256"]:
            raise UserError(
                "the data is not that of the cache",
                found=f"sha256 {actual[:12]} of {config.data}",
                expected=f"{identities['data']['sha256'][:12]} of {identities['data']['name']}",
                where=cache.folder,
                advice="Leave --data out: a round uses the cache's prompts",
            )
    shared = {
        "dtype": identities["teacher"]["dtype"],
        "template": identities["template"]["name"],
        "limit": identities["data"]["limit"],
        "responses": generation["responses"],
        "num_samples": generation["num_samples"],
        "max_prompt_tokens": generation["max_prompt_tokens"],
        "rows_per_shard": cache.rows_per_shard,
    }
    for key, value in shared.items():
        given = getattr(config, key)
        if given not in (value, CacheConfig.model_fields[key].default):
            raise UserError(
                f"a round uses the {key} of its cache",
                found=given,
                expected=value,
                where=cache.folder,
                advice=f"Leave --{key.replace('_', '-')} out",
            )
    # responses of other lengths or another temperature are not what training compares: only if someone asks for them
    drawn = {key: generation[key] for key in ("max_new_tokens", "temperature", "top_p")}
    given = {key: getattr(config, key) for key in drawn if key in config.model_fields_set}
    if differing := [key for key, value in given.items() if value != drawn[key]]:
        ours, theirs = (", ".join(f"{key} {values[key]}" for key in differing) for values in (given, drawn))
        say(f"the student's responses are drawn with {ours}; those of the cache were with {theirs}")
    return config.model_copy(update=shared | drawn | given)


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
