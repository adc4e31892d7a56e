"""A round: the student's responses to the cache's prompts, scored by the teacher, with the cache's rows and shards.

A round is a directory with its own manifest inside the cache, so a finished cache is never edited. It is built in two
phases, so that only one model is loaded at a time: the student samples (into `sampled/`) and, if asked, scores the
cache's responses (into `scored/`), then the teacher scores. With `teacher_mix` both are loaded to sample.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.progress import Progress, say
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.filling import Filler, engine_filler, open_filler
from dpkd.teacher_cache.build.plan import request_seed
from dpkd.teacher_cache.build.request import (
    check_shard_size,
    engine_identity,
    engine_options,
    logprobs_identity,
    sampling,
    say_complete,
)
from dpkd.teacher_cache.build.round_options import with_cache_options
from dpkd.teacher_cache.engines.engine import FinishReason, ResolvedEngine
from dpkd.teacher_cache.engines.open import check_engine, resolve_engine
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import ROUND_KIND, TeacherCache, round_folder
from dpkd.teacher_cache.store.rows import PlannedRow
from dpkd.teacher_cache.store.shards import ShardRecord, read_shard

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.manifest import Manifest

_SAMPLED, _SCORED = "sampled", "scored"


def build_round(config: CacheConfig) -> Manifest:
    """Build the round `config.round` of the finished cache `config.out`, or resume it.

    Raises `UserError` if the cache, the teacher or the student is not the one that the round needs.
    """
    cache = TeacherCache.open(config.out)
    inputs = open_round(cache, config)
    config = inputs.config
    check_shard_size(config, cache.manifest.counts["rows"])
    assert config.round is not None  # checked by the config
    job = Job(round_folder(cache.folder, config.round), ROUND_KIND, round_identities(cache, inputs))
    with job.opened(config.to_toml(), {"student": cache.manifest.counts["rows"]}) as manifest:
        if manifest is None:
            fill_round(cache, inputs, job)
            manifest = job.finish([])
            discard_stages(job)
    say_complete(f"the round {job.folder}", manifest)
    return manifest


def fill_round(cache: TeacherCache, inputs: RoundInputs, job: Job) -> None:
    """Commit every shard of the round that is missing in `job`."""
    if job.num_done() == cache.manifest.counts["rows"]:
        return
    to_score = {record.path for record in cache.shards("teacher")} if inputs.config.score_cached else set()
    sampled = job.part(_SAMPLED, job.committed)
    scored = job.part(_SCORED, {path: record for path, record in job.committed.items() if path in to_score})
    _run_student(cache, sampled, scored, inputs)
    _run_teacher(cache, sampled, scored, job, inputs)


def discard_stages(job: Job) -> None:
    """Delete what only `fill_round` needs."""
    job.folder.delete(_SAMPLED)
    job.folder.delete(_SCORED)


class RoundInputs(NamedTuple):
    """What a round is made of; `config` has the cache's options."""

    config: CacheConfig
    engine: ResolvedEngine
    student: ModelSource
    teacher: ModelSource

    def open_student(self) -> contextlib.AbstractContextManager[Filler]:
        """The filler with the student loaded, and with the teacher beside it for a mixture of both."""
        config, options = self.config, engine_options(self.config, top_k=0)
        if config.teacher_mix is None:
            return open_filler(self.engine, self.student, options, config)
        from dpkd.teacher_cache.engines.mixed_engine import MixedEngine

        return engine_filler(MixedEngine(self.student, self.teacher, options, config.teacher_mix), self.student)

    def open_teacher(self) -> contextlib.AbstractContextManager[Filler]:
        """The filler with the teacher loaded."""
        return open_filler(self.engine, self.teacher, engine_options(self.config), self.config)


def open_round(cache: TeacherCache, config: CacheConfig) -> RoundInputs:
    """Find and check the models of a round of `cache`; raises `UserError` for those that it cannot use."""
    if cache.has_spans:
        raise UserError(
            "a round answers each row's prompt once, and rows of this cache have several spans",
            where=cache.folder,
            advice="Build the cache with --turns last, or with --responses teacher, which has a row for each turn",
        )
    config = with_cache_options(cache, config)
    assert config.student is not None  # checked by the config
    engine = "transformers" if config.teacher_mix else resolve_engine(config.engine)
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
    check_engine(engine, student, engine_options(config, top_k=0), scores=True, temperature=config.temperature)
    return RoundInputs(config, engine, student, teacher)


def _run_student(cache: TeacherCache, sampled: Job, scored: Job, inputs: RoundInputs) -> None:
    config, engine, student, _ = inputs
    num_rows = cache.manifest.counts["rows"]
    to_score = cache.shards("teacher") if config.score_cached else []
    num_scored = sum(record.rows for record in to_score)
    if sampled.num_done() == num_rows and scored.num_done() == num_scored:
        return
    say(f"starting {engine} with the student {config.student}" + (" and the teacher" if config.teacher_mix else ""))
    drawn = sampling(config, student.stop_token_ids())
    with inputs.open_student() as filler:
        with Progress("student responses", num_rows, "rows", sampled.num_done()) as progress:
            for stem in cache.stems:
                rows = planned_rows(cache, _missing(cache, stem, sampled), config.seed)
                filler(sampled, _layout(cache, stem), rows, drawn, progress)
        if to_score:
            with Progress("student scores", num_scored, "rows", scored.num_done()) as progress:
                for stem in dict.fromkeys(record.stem for record in to_score):
                    rows = _cached_rows(cache, _missing(cache, stem, scored))
                    filler(scored, _layout(cache, stem), rows, None, progress)


def _run_teacher(cache: TeacherCache, sampled: Job, scored: Job, job: Job, inputs: RoundInputs) -> None:
    config = inputs.config
    say(f"starting {inputs.engine} with the teacher {config.teacher}")
    with (
        inputs.open_teacher() as filler,
        Progress("teacher scores", cache.manifest.counts["rows"], "rows", job.num_done()) as progress,
    ):
        for stem in cache.stems:
            rows = _sampled_rows(cache, sampled, scored, _missing(cache, stem, job), config)
            filler(job, _layout(cache, stem), rows, None, progress)


def _layout(cache: TeacherCache, stem: str) -> ShardLayout:
    return ShardLayout("student", cache.rows_per_shard, stem)


def _missing(cache: TeacherCache, stem: str, job: Job) -> list[ShardRecord]:
    """The cache's shards `stem` that `job` has not committed."""
    return [record for record in cache.shards(stem=stem) if record.path not in job.committed]


def planned_rows(cache: TeacherCache, shards: Sequence[ShardRecord], seed: int) -> Iterator[PlannedRow]:
    """One row of the student for each row of these shards of the cache, in the cache's order."""
    numbers = {record.path: number for stem in cache.stems for number, record in enumerate(cache.shards(stem=stem))}
    for record, shard in cache.scan(shards):
        for i in range(len(shard)):
            row, (prompt, _) = shard.row(i), shard.texts(i)
            row_seed = request_seed(seed, f"{record.origin}/{row.example_id}", row.sample)
            index = numbers[record.path] * cache.rows_per_shard + i
            yield PlannedRow(index, row.example_id, row.sample, "student", prompt, row.prompt_ids.tolist(), row_seed)


def _cached_rows(cache: TeacherCache, shards: Sequence[ShardRecord]) -> Iterator[PlannedRow]:
    """The teacher responses of these shards of the cache, for the student to score."""
    rows = planned_rows(cache, shards, 0)
    for _, shard in cache.scan(shards):
        for i, planned in enumerate(itertools.islice(rows, len(shard))):
            yield replace(planned, response_ids=shard.row(i).response_ids.tolist())


def _sampled_rows(
    cache: TeacherCache, sampled: Job, scored: Job, shards: Sequence[ShardRecord], config: CacheConfig
) -> Iterator[PlannedRow]:
    """The same rows with the student's responses; a row that it could not answer is marked as failed."""
    rows = planned_rows(cache, shards, config.seed)
    for record in shards:
        drawn = sampled.committed[record.path]
        reasons = {(row["example_id"], row["sample"]): f"the student: {row['reason']}" for row in drawn.failed}
        shard, cached = read_shard(sampled.folder, drawn), cache.read(record)
        of_cached = None
        if config.score_cached and record.origin == "teacher":
            of_cached = _sampling_logprobs_of_cached(cache, scored, record, config.teacher_mix)
        for planned in itertools.islice(rows, record.rows):
            key = (planned.example_id, planned.sample)
            if key in reasons:
                yield replace(planned, failed=reasons[key])
                continue
            if of_cached is not None and key not in of_cached:
                yield replace(planned, failed="the student cannot score the cache's response")
                continue
            answer = shard.row(shard.index_of[key])
            highest = int(answer.response_ids.max(initial=0))
            if highest >= cache.vocab_size:  # the student's logits are padded to a larger width
                yield replace(planned, failed=f"the student drew the id {highest}, which the teacher does not have")
                continue
            reason: FinishReason = "stop" if answer.finish_reason == "stop" else "length"
            asked = cached.row(cached.index_of[key]).teacher_prompt_ids
            yield replace(
                planned,
                teacher_prompt_ids=None if asked is None else asked.tolist(),
                response_ids=answer.response_ids.tolist(),
                finish_reason=reason,
                sampling_logprobs=answer.response_logprobs.tolist(),
                cached_sampling_logprob=None if of_cached is None else of_cached[key],
            )


def _sampling_logprobs_of_cached(
    cache: TeacherCache, scored: Job, record: ShardRecord, teacher_mix: float | None
) -> dict[tuple[str, int], float]:
    """log q0 of the whole responses of a shard of the cache, by key; without those that the student cannot score."""
    of_teacher, of_student = cache.read(record), read_shard(scored.folder, scored.committed[record.path])
    sums = {}
    for index in range(len(of_student)):
        key = of_student.key(index)
        logprobs_T = of_student.row(index).response_logprobs.astype(np.float64)
        if teacher_mix is not None:
            teacher_T = of_teacher.row(of_teacher.index_of[key]).response_logprobs
            logprobs_T = np.logaddexp(np.log(teacher_mix) + teacher_T, np.log1p(-teacher_mix) + logprobs_T)
        sums[key] = float(logprobs_T.sum())
    return sums


def round_identities(cache: TeacherCache, inputs: RoundInputs) -> dict[str, Any]:
    """What the round's manifest says that it is."""
    config, engine, student, _ = inputs
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
            **({} if config.teacher_mix is None else {"teacher_mix": config.teacher_mix}),
            **({"score_cached": True} if config.score_cached else {}),
        },
        "logprobs": logprobs_identity(config),
    }
