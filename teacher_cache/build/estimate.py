"""What a cache or a round would cost, from a pilot of a few rows on the real engine; nothing is written to `--out`."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dpkd.core.devices import choose_device, is_out_of_memory
from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed
from dpkd.core.progress import say
from dpkd.teacher_cache.build.cache import CacheInputs, open_inputs
from dpkd.teacher_cache.build.cost import CacheCost, Phase
from dpkd.teacher_cache.build.filling import Filler
from dpkd.teacher_cache.build.pilot import PilotRun, Slots, run_pilot
from dpkd.teacher_cache.build.request import engine_options, sampling
from dpkd.teacher_cache.build.rounds import RoundInputs, open_round, planned_rows
from dpkd.teacher_cache.build.survey import Part
from dpkd.teacher_cache.engines.engine import Sampling, ScoreRequest, results_only
from dpkd.teacher_cache.engines.open import open_engine, resolve_engine
from dpkd.teacher_cache.engines.transformers_engine import batch_sizes
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.reader import TeacherCache

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.rows import Origin, PlannedRow

Measure = Callable[..., "tuple[Phase, PilotRun]"]
_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate_cost(config: CacheConfig, *, num_rows: int | None = None, live: bool = True) -> CacheCost:
    """What `build_cache(config)` would cost: runs `config.pilot_rows` rows for real, in a temporary directory.

    `num_rows` is the number of rows of a round whose cache is smaller now. `live` False leaves the live teacher out.
    Raises `UserError` as `build_cache` does for options, data and models that cannot be used.
    """
    return _of_cache(config, live=live) if config.round is None else _of_round(config, num_rows)


def _of_cache(config: CacheConfig, *, live: bool) -> CacheCost:
    started_s = time.monotonic()
    phases, scored = [], []
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(tempfile.TemporaryDirectory(prefix="dpkd-pilot-"))
        inputs = open_inputs(config, open_folder(nowhere))
        survey = inputs.plan.survey
        survey_s = time.monotonic() - started_s
        measure = stack.enter_context(_opened(inputs.config, inputs.open_teacher))
        answers: list[str] = []  # of the pilot's first turns; they stand for those before the later turns
        kinds: dict[tuple[Origin, bool], list[Part]] = {}
        for part, number in survey.in_order():
            if number:
                kinds.setdefault((part.origin, part.turn > 1), []).append(part)
        for (origin, is_later), parts in kinds.items():
            num_rows = sum(survey.num_rows[part] for part in parts)
            drawn = sampling(inputs.config, inputs.teacher.stop_token_ids()) if origin == "teacher" else None
            label = "teacher responses" if drawn else "teacher scores of references"
            answer_of = partial(_one_of, answers)
            rows = (row for part in parts for row in inputs.plan.rows(part, answer_of) if row.failed is None)
            phase, run = measure(label + (", later turns" if is_later else ""), rows, num_rows, drawn)
            phases.append(phase)
            scored.append((run, num_rows))
            answers = answers or [inputs.teacher.decode(list(row.response_ids or ())) for row in run.rows]
    live_s, reason = _live_epoch(inputs, scored) if live else (None, "as asked")
    return _cost(inputs, survey_s, phases, live_s, reason, num_skipped=len(survey.skipped))


def _one_of(answers: list[str], name: str, sample: int) -> str:
    """The answer that stands for that of a row; empty where there are none."""
    return answers[derive_seed(0, name, sample, bits=31) % len(answers)] if answers else ""


def _of_round(config: CacheConfig, num_rows: int | None) -> CacheCost:
    started_s = time.monotonic()
    cache = TeacherCache.open(config.out)
    inputs = open_round(cache, config)
    config, num_cached = inputs.config, cache.manifest.counts["rows"]
    num_rows = num_rows or num_cached
    survey_s = time.monotonic() - started_s
    rows = planned_rows(cache, cache.shards(), config.seed)
    drawn = sampling(config, inputs.student.stop_token_ids())
    with _opened(config, inputs.open_student) as measure:
        phase, run = measure("student responses", rows, num_cached, drawn, num_rows)
    phases = [replace(phase, num_bytes=0)]  # deleted at the end
    with _opened(config, inputs.open_teacher) as measure:
        phase, _ = measure("teacher scores", iter(run.rows), len(run.rows), None, num_rows)
    reason = "because it would answer for responses that the student draws in every step"
    return _cost(inputs, survey_s, [*phases, phase], None, reason)


@contextlib.contextmanager
def _opened(config: CacheConfig, start: Callable[[], AbstractContextManager[Filler]]) -> Iterator[Measure]:
    """A function that runs rows on the engine that `start` starts, and gives their phase and pilot run."""
    say("pilot: starting the engine")
    started_s = time.monotonic()
    with start() as filler, tempfile.TemporaryDirectory(prefix="dpkd-pilot-") as directory:
        start_s = time.monotonic() - started_s

        def measure(
            label: str, rows: Iterator[PlannedRow], num_given: int, drawn: Sampling | None, of: int | None = None
        ) -> tuple[Phase, PilotRun]:
            nonlocal start_s
            num_rows = num_given if of is None else of
            run = run_pilot(filler, rows, num_given, config.pilot_rows, drawn, Path(directory, label))
            slots, share = _slots(config), num_rows / len(run.rows)
            phase = Phase(
                label,
                num_rows,
                start_s,
                run.seconds(num_rows, slots, drawn=drawn is not None),
                float(run.response_lengths_N.sum()) * share if drawn else 0.0,
                float(run.prompt_lengths_N.sum()) * share,
                run.num_bytes * share,
                run.relative_error,
            )
            start_s = 0.0
            return phase, run

        yield measure


def _slots(config: CacheConfig) -> Slots:
    engine = resolve_engine(config.engine)
    if engine == "transformers" or config.teacher_mix:
        return Slots(batch_sizes(choose_device(config.device), config.max_num_seqs).generated, refilled=False)
    return Slots(config.max_num_seqs * max(len(config.server_url), config.ray_replicas))


def _live_epoch(inputs: CacheInputs, scored: list[tuple[PilotRun, int]]) -> tuple[float | None, str]:
    """Seconds of a live teacher for an epoch on these rows: a forward pass of each by transformers. None: why not."""
    if inputs.engine in ("server", "openai"):
        return None, "because the teacher is on a server"
    if _num_devices(inputs.config) > 1:
        return None, "because the teacher takes more than one device"
    say("pilot: timing a live teacher on the same rows")
    try:
        return _seconds_of_scoring(inputs, scored), ""
    except (UserError, RuntimeError, MemoryError) as error:  # the cache's own cost is known: that must not be lost
        if not is_out_of_memory(error):
            raise
        return None, "because it runs out of memory by transformers"


def _seconds_of_scoring(inputs: CacheInputs, scored: list[tuple[PilotRun, int]]) -> float:
    seconds = 0.0
    with open_engine("transformers", inputs.teacher, engine_options(inputs.config, top_k=0)) as live:
        for run, num_rows in scored:
            requests = [
                ScoreRequest(index, row.prompt_ids, row.response_ids or ()) for index, row in enumerate(run.rows)
            ]
            for _ in results_only(live.score(iter(requests[:2]))):  # kernels are chosen
                pass
            started_s = time.monotonic()
            answered = sum(1 for _ in results_only(live.score(iter(requests))))
            seconds += (time.monotonic() - started_s) * num_rows / answered
    return seconds


def _num_devices(config: CacheConfig) -> int:
    if config.engine == "server":
        return len(config.server_url)
    per_replica = math.prod(int(config.engine_arg.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    return per_replica * (config.ray_replicas if config.engine == "ray" else 1)


def _cost(
    inputs: CacheInputs | RoundInputs,
    survey_s: float,
    phases: list[Phase],
    live_epoch_s: float | None,
    no_live_reason: str,
    num_skipped: int = 0,
) -> CacheCost:
    config, parameters = inputs.config, inputs.teacher.num_parameters
    at = {"server": "server", "openai": "endpoint"}
    return CacheCost(
        out=config.out if config.round is None else f"the round {config.round} of {config.out}",
        engine=inputs.engine,
        device=at.get(inputs.engine) or choose_device(config.device).type,
        devices=_num_devices(config),
        num_skipped=num_skipped,
        survey_s=survey_s,
        phases=phases,
        live_epoch_s=live_epoch_s,
        no_live_reason=no_live_reason,
        teacher_bytes=None if parameters is None else parameters * _BYTES_OF_DTYPE[config.dtype],
        price_per_hour=config.price_per_hour,
        prices=(config.price_in, config.price_out),
        pilot_rows=config.pilot_rows,
    )
