"""The student's own responses, drawn while it trains and scored by the teacher's server (Algorithm 1 of the paper).

Steps are taken in blocks of `sample_every`: the responses of a block are drawn together, with one state of the weights.

    staleness 0   block b is drawn with the weights at its start, while training waits
    staleness 1   block b is drawn with the weights at the start of block b - 1, while that block trains; the first
                  block of a run with the weights that it starts from

One thread draws and has scored, block after block. A block is stored as soon as it is drawn, and again when it is
scored; training reads what was stored, so that a run which is taken up learns from the very same numbers. A block of
which the weights are gone is never drawn again: it is read back, or the run ends with an error.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
import torch
from torch import nn

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.distill.batches.order import RowOrder
from dpkd.distill.live.sampler import DrawCancelledError, Drawn, Sampler, open_sampler, sampling_of
from dpkd.distill.live.store import SampleStore
from dpkd.distill.live.teacher import TeacherService
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.columns import read_columns
from dpkd.distill.rows.row import RowSource, TrainingRow
from dpkd.distill.rows.sources import check_positions
from dpkd.teacher_cache.engines.engine import EngineResult, FailedRequest, GenerateRequest, ScoreRequest
from dpkd.teacher_cache.engines.server.pool import PATIENCE_S
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.schema import CachedRow, PlannedRow

#: How long a checkpoint waits for the scores of a block that is drawn, in seconds; without them it is scored again.
SETTLE_S = 30.0
_POLL_S = 0.2


def draw_seed(seed: int, example_id: str, sample: int, step: int) -> int:
    """Seed of one draw (63 bits): what is drawn for a row does not depend on its neighbours."""
    digest = hashlib.sha256(f"{seed}\0{example_id}\0{sample}\0{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class _Block:
    """The samples of some steps. `place_of` finds a planned row by (step, example id, sample number)."""

    first_step: int
    planned: list[PlannedRow]
    place_of: dict[tuple[int, str, int], int]
    drawn: list[Drawn] = field(default_factory=list)
    rows: list[CachedRow | None] | None = None
    error: BaseException | None = None
    is_drawn: bool = False

    @property
    def is_over(self) -> bool:
        return self.rows is not None or self.error is not None


class LiveRows:
    """Rows of a step with the student's responses, for one process of a run.

    Args:
        places_of: this process's (group, index) places of a step, those of all its forward passes in order.
        model: the model that is trained; its weights are read in `before_step`.
        patience_s: how long to wait while no server of the teacher answers, in seconds.

    Raises `UserError` when the server does not hold the cache's teacher.
    """

    def __init__(
        self,
        config: TrainConfig,
        cache: TeacherCache,
        rows: RowSource,
        student: ModelSource,
        model: nn.Module,
        device: torch.device,
        order: RowOrder,
        steps: int,
        places_of: Callable[[int], list[tuple[int, int]]],
        *,
        rank: int,
        is_main: bool,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._config, self._rows, self._student, self._model = config, rows, student, model
        self._steps, self._places_of, self._is_main = steps, places_of, is_main
        max_new_tokens = config.sample_max_new_tokens or int(cache.identities["generation"]["max_new_tokens"])
        longest = longest_prompt(cache) + max_new_tokens
        check_positions(longest, student.max_positions, where=f"{student.name}, with sample_max_new_tokens")
        self._store = SampleStore(config.out, rank, student)
        self._blocks: dict[int, _Block] = {}
        self._refreshed_at: int | None = None  # the step whose weights the sampler holds
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._failure: Exception | None = None
        self._service = TeacherService(
            cache, config.teacher_url, student, longest, config.teacher_tolerance, patience_s
        )
        try:
            sampling = sampling_of(config, student.stop_token_ids(), max_new_tokens)
            self._sampler: Sampler = open_sampler(config, student, model, device, sampling, longest)
        except BaseException:
            self._service.close()
            raise
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="live-samples")

    def before_step(self, step: int) -> None:
        """Begin the draws that are due with the weights as they are before `step`; the main thread calls it."""
        every, staleness = self._config.sample_every, self._config.staleness
        number, at_start = step // every, step % every == 0
        with self._changed:
            taken_up = not self._blocks
            for old in [held for held in self._blocks if held < number]:
                del self._blocks[old]
        if number not in self._blocks:
            # staleness 1 has drawn it a block earlier, but for the first block of all
            self._begin(number, step, may_draw=at_start and (staleness == 0 or step == 0))
        if staleness == 1 and (at_start or taken_up):
            self._begin(number + 1, step, may_draw=at_start)

    def _begin(self, number: int, step: int, *, may_draw: bool) -> None:
        """Have block `number` made by the worker: read back, scored, or drawn with the weights before `step`."""
        first_step = number * self._config.sample_every
        if first_step >= self._steps:
            return
        block = self._plan(first_step)
        if not self._store.is_drawn(first_step):
            if not may_draw:
                raise UserError(
                    "the student's samples are missing, and the weights that they were drawn with are gone",
                    found=f"no samples of steps {first_step} to {self._last_step(first_step)}",
                    where=self._config.out,
                    advice="Start again with another --out",
                )
            if self._refreshed_at != step:
                self._wait(lambda: all(held.is_drawn or held.is_over for held in self._blocks.values()))
                self._sampler.refresh(self._model)
                self._refreshed_at = step
        with self._changed:
            self._blocks[number] = block
            self._changed.notify_all()
        self._worker.submit(self._make, block)

    def _plan(self, first_step: int) -> _Block:
        """What has to be drawn for the steps of a block, each response once."""
        block = _Block(first_step, [], {})
        for step in range(first_step, self._last_step(first_step) + 1):
            for group, index in self._places_of(step):
                row = self._rows.row(group, index).chosen
                for sample in self._samples_of(row):
                    key = (step, row.example_id, sample)
                    if key in block.place_of:
                        continue
                    place = block.place_of[key] = len(block.planned)
                    ids = row.prompt_ids.tolist()
                    text = str(self._student.tokenizer.decode(ids))
                    seed = draw_seed(self._config.seed, row.example_id, sample, step)
                    block.planned.append(PlannedRow(place, row.example_id, sample, "student", text, ids, seed))
        return block

    def _last_step(self, first_step: int) -> int:
        return min(first_step + self._config.sample_every, self._steps) - 1

    def _samples_of(self, row: CachedRow) -> Sequence[int]:
        """Numbers of the samples that stand beside a row of the cache."""
        number = self._config.num_student_samples
        return [row.sample % number] if self._config.pairing == "index" else range(number)

    def rows(self, step: int, places: Sequence[tuple[int, int]]) -> list[TrainingRow]:
        """The rows of `places` with the student's responses of `step`; waits until they are there.

        A response that the teacher could not score makes no row. Raises `UserError` when none of `places` has one, or
        when the samples cannot be made, and `KeyboardInterrupt` after `cancel`.
        """
        number = step // self._config.sample_every
        with self._changed:
            self._wait(lambda: number in self._blocks and self._blocks[number].is_over)
            block = self._blocks[number]
        if block.error is not None:
            raise block.error
        assert block.rows is not None
        found: list[TrainingRow] = []
        for group, index in places:
            cached = self._rows.row(group, index).chosen
            at = [block.place_of[step, cached.example_id, sample] for sample in self._samples_of(cached)]
            samples = [row for row in (block.rows[place] for place in at) if row is not None]
            if samples and self._config.pairing == "best-vs-worst":
                samples = [min(samples, key=_mean_logprob)]
            paired = self._config.needs_pairs
            found += [TrainingRow(cached, row) if paired else TrainingRow(row) for row in samples]
        if not found:
            raise UserError(
                f"the teacher could score none of the student's responses of step {step + 1}",
                where=self._config.out,
                advice="Look at what the server says of them",
            )
        return found

    def settle(self) -> None:
        """Before a checkpoint: return once every block that was begun is stored as it was drawn.

        The scores of these blocks are waited for too, `SETTLE_S` seconds at most: a server that is away must not keep
        a checkpoint from being written, and a block is scored when the run goes on.
        """
        newer = [] if self._config.staleness == 0 else [*self._blocks.values()]
        deadline_s = time.monotonic() + SETTLE_S
        self._wait(lambda: all(block.is_drawn or block.is_over for block in newer))
        self._wait(lambda: all(block.is_over for block in newer) or time.monotonic() > deadline_s)

    def cancel(self) -> None:
        """End every wait; any thread may call it."""
        self._cancelled.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give up what is under way and leave the servers."""
        self.cancel()
        self._service.close()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._sampler.close()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Return once `ready`; raises `KeyboardInterrupt` when the run is given up."""
        with self._changed:
            # in short turns, so that a second Ctrl-C of the person comes through
            while not ready():
                if self._cancelled.is_set():
                    raise KeyboardInterrupt
                self._changed.wait(_POLL_S)

    def _make(self, block: _Block) -> None:
        """Draw a block and have it scored, or as much of that as is not done; on the worker."""
        try:
            if (rows := self._store.scored(block.first_step, block.planned)) is None:
                self._draw_and_score(block)
                rows = self._store.scored(block.first_step, block.planned)
            block.rows = rows
        except BaseException as error:  # handed to whoever asks for the block's rows
            block.error = KeyboardInterrupt() if self._cancelled.is_set() else error
        with self._changed:
            self._changed.notify_all()

    def _draw_and_score(self, block: _Block) -> None:
        answers: dict[int, EngineResult | FailedRequest] = {}
        requests = self._requests(block)
        try:
            if self._failure is not None:
                raise self._failure
            for answer in self._service.score(requests):
                answers[answer.index] = answer
        except Exception as error:
            if not self._cancelled.is_set():
                # the teacher is lost; what these weights draw is kept, so that a checkpoint can be gone on from
                self._failure = error
                for _ in requests:
                    pass
            raise
        failed = [answer for answer in answers.values() if isinstance(answer, FailedRequest)]
        if failed and self._is_main:
            say(f"the teacher cannot score {len(failed)} of {len(answers)} responses, such as: {failed[0].reason}")
        self._store.keep_scored(block.first_step, block.planned, block.drawn, answers)

    def _requests(self, block: _Block) -> Iterator[ScoreRequest]:
        """What is to be scored, as it is drawn; the block is stored when all of it is."""
        held = self._store.drawn(block.first_step, block.planned)
        drawn = self._draw(block) if held is None else held
        for response in drawn:
            block.drawn.append(response)
            if self._cancelled.is_set():
                raise DrawCancelledError
            prompt_ids = block.planned[response.index].prompt_ids
            yield ScoreRequest(response.index, prompt_ids, response.response_ids.tolist())
        if held is None:
            self._store.keep_drawn(block.first_step, block.planned, block.drawn)
        block.is_drawn = True
        with self._changed:
            self._changed.notify_all()

    def _draw(self, block: _Block) -> Iterator[Drawn]:
        requests = [GenerateRequest(plan.index, plan.prompt_ids, plan.seed) for plan in block.planned]
        return self._sampler.draw(requests, self._cancelled)


def longest_prompt(cache: TeacherCache) -> int:
    """Tokens of the cache's longest prompt; reads the prompts once."""
    lengths = (
        pc.list_value_length(read_columns(cache.folder, record, ["prompt_ids"])["prompt_ids"])
        for record in cache.shards()
    )
    return max(int(pc.max(column).as_py() or 0) for column in lengths)


def _mean_logprob(row: CachedRow) -> float:
    """Teacher log-prob a token, in nats."""
    return float(np.mean(row.response_logprobs))
