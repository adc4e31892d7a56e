"""A pilot: a few rows of a job are really run and timed, and the cost of the whole job follows from them.

Time is fitted as `seconds = per_step * decoding steps + per_token * tokens`, from a small group of rows and a large one
that the engine runs alone. A rate alone would be wrong by a factor: a pilot fills the engine less than a job does, so
its tokens cost more steps each.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.progress import Progress
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.filling import Filler
from dpkd.teacher_cache.engines.engine import Sampling
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.rows import PlannedRow
from dpkd.teacher_cache.store.shards import read_shard

_WARM_UP = 2  # rows that are run first and not timed: kernels are chosen and memory is taken
_SIMULATED = 20_000  # rows of the simulated queue; more are scaled
_SEED = 0


@dataclass(frozen=True)
class Slots:
    """How many responses an engine decodes at one time; `refilled`: a free slot is given the next row at once."""

    number: int
    refilled: bool = True


@dataclass(frozen=True)
class PilotRun:
    """The timed rows of a pilot: N of them, in two groups.

    Attributes:
        rows: the pilot's rows with their responses, those of the warm-up left out.
        groups: for each group the indices of its rows, and its seconds.
        num_bytes: size of the shards of the timed rows.
        prompt_lengths_N: tokens.
        response_lengths_N: tokens.
    """

    rows: list[PlannedRow]
    groups: list[tuple[slice, float]]
    num_bytes: int
    prompt_lengths_N: np.ndarray
    response_lengths_N: np.ndarray

    def seconds(self, num_rows: int, slots: Slots, *, drawn: bool) -> float:
        """Seconds for a job of `num_rows` such rows; `drawn`: responses are decoded, not scored."""
        tokens_N = self.prompt_lengths_N + self.response_lengths_N

        def steps(lengths_N: np.ndarray) -> float:
            return decoding_steps(lengths_N.tolist(), slots) if drawn else 0.0

        per_step, per_token = fit_rates(
            [
                (steps(self.response_lengths_N[part]), float(tokens_N[part].sum()), taken_s)
                for part, taken_s in self.groups
            ]
        )
        simulated = min(num_rows, _SIMULATED)
        lengths_N = np.random.default_rng(_SEED).choice(self.response_lengths_N, simulated)
        return per_step * steps(lengths_N) * num_rows / simulated + per_token * float(tokens_N.mean()) * num_rows

    @property
    def relative_error(self) -> float:
        """Half the width of a 95% interval of the mean tokens of a row, as a share of the mean."""
        lengths_N = self.prompt_lengths_N + self.response_lengths_N
        return float(1.96 * lengths_N.std(ddof=1) / math.sqrt(len(lengths_N)) / lengths_N.mean())


def run_pilot(
    filler: Filler, rows: Iterator[PlannedRow], num_rows: int, pilot_rows: int, drawn: Sampling | None, directory: Path
) -> PilotRun:
    """Run `pilot_rows` of the `num_rows` of a job, spread evenly over it, into shards under `directory`.

    `drawn` None: the rows' responses are scored. Raises `UserError` if the engine cannot answer them.
    """
    picked = pick_evenly(rows, num_rows, pilot_rows + _WARM_UP)
    warm = min(_WARM_UP, len(picked) // 3)
    small = warm + max((len(picked) - warm) // 4, 1)
    done: list[PlannedRow] = []
    groups, num_bytes = [], 0
    with Progress("pilot", len(picked), "rows") as progress:
        for number, part in enumerate((picked[:warm], picked[warm:small], picked[small:])):
            if not part:
                continue
            job = Job(open_folder(str(directory / str(number))), "pilot", {})
            layout = ShardLayout(part[0].origin, len(part), stem="pilot")
            started_s = time.monotonic()
            numbered = (replace(row, index=i, drops_thinking=False) for i, row in enumerate(part))
            filler(job, layout, numbered, drawn, progress)
            taken_s = time.monotonic() - started_s
            if number:
                answered = _answered(job, part)
                groups.append((slice(len(done), len(done) + len(answered)), taken_s))
                done += answered
                num_bytes += sum(record.num_bytes for record in job.committed.values())
    if len(done) < 2:
        raise UserError(
            "the pilot has too few rows to say what the job costs",
            found=f"{len(done)} answered rows of {len(picked)}",
            expected="2 or more",
            advice="Run the job itself, or choose a larger --pilot-rows",
        )
    prompts_N = np.array([len(row.asked_ids) for row in done])
    responses_N = np.array([len(row.response_ids or ()) for row in done])
    return PilotRun(done, groups, num_bytes, prompts_N, responses_N)


def _answered(job: Job, rows: Sequence[PlannedRow]) -> list[PlannedRow]:
    """`rows` with the responses that the job committed, without failed ones."""
    (record,) = job.committed.values()
    shard = read_shard(job.folder, record)
    return [
        replace(row, response_ids=shard.row(shard.index_of[key]).response_ids.tolist())
        for row in rows
        if (key := (row.example_id, row.sample)) in shard.index_of
    ]


def pick_evenly(rows: Iterator[PlannedRow], num_rows: int, most: int) -> list[PlannedRow]:
    """At most `most` of `num_rows` rows, evenly spread: data files are often sorted by kind or by length."""
    wanted = set(even_indices(num_rows, most))
    picked = []
    for index, row in enumerate(rows):
        if index in wanted:
            picked.append(row)
    # neighbours of the whole job go to different groups, so that both groups are like the job
    order = np.random.default_rng(_SEED).permutation(len(picked))
    return [picked[i] for i in order]


def even_indices(number: int, most: int) -> list[int]:
    """At most `most` of the indices below `number`, the first and the last among them, evenly spread."""
    return sorted({int(index) for index in np.linspace(0, number - 1, min(most, number)).round()})


def decoding_steps(lengths: Sequence[int], slots: Slots) -> float:
    """Steps in which an engine decodes responses of these lengths (tokens), given in this order."""
    if not slots.refilled:
        return float(sum(max(lengths[i : i + slots.number]) for i in range(0, len(lengths), slots.number)))
    free_at = [0] * slots.number
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return float(max(free_at))


def fit_rates(measured: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds per step and per token from (steps, tokens, seconds) of each group, none of them negative."""
    steps, tokens, seconds = (np.array(values) for values in zip(*measured, strict=True))
    if steps.any() and len(measured) > 1:
        rates = np.linalg.lstsq(np.stack([steps, tokens], axis=1), seconds, rcond=None)[0]
        if (rates >= 0).all():
            return float(rates[0]), float(rates[1])
        if rates[1] < 0:  # the larger group was no slower: steps are all that costs
            return float(seconds.sum() / steps.sum()), 0.0
    return 0.0, float(seconds.sum() / tokens.sum())
