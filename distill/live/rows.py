"""The student's own responses, drawn while it trains and scored by the teacher's servers (Algorithm 1 of the paper).

Steps are grouped into blocks of `sample_every`. All responses of a block are drawn with the same weights:

    staleness 0   block b is drawn with the weights at its start, while training waits
    staleness 1   block b is drawn with the weights at the start of block b - 1, while that block trains; the first
                  block of a run is drawn with the initial weights

One thread draws and scores block after block. A block is stored when it is drawn, and again when it is scored. Training
reads the stored block, so that a run that resumes learns from the same numbers. A block whose weights are gone is never
drawn again: it is read from disk, or the run ends with an error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import torch
from torch import nn

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.distill.live.blocks import Block, plan_block, samples_of
from dpkd.distill.live.sampler import open_sampler
from dpkd.distill.live.store import SampleStore
from dpkd.distill.live.teacher import TeacherServers
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.columns import longest_prompts
from dpkd.distill.rows.row import RowIndex, RowSource, TrainingRow
from dpkd.distill.rows.sources import check_positions, longest_sample
from dpkd.distill.rows.views import MixedRows
from dpkd.teacher_cache.engines.engine import EngineResult, FailedRequest, GenerateRequest, ScoreRequest
from dpkd.teacher_cache.engines.server.pool import PATIENCE_S
from dpkd.teacher_cache.engines.top_k import answer_problem
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.tables import mean_logprobs

#: how long a checkpoint waits for the scores of a drawn block, in seconds; unscored blocks are scored on resuming
SETTLE_S = 30.0
_POLL_S = 0.2


class LiveRows:
    """Rows of a step with the student's responses, for one rank of a run.

    Args:
        rows_of: the rows of a step that this rank reads, over its micro-batches in order.
        steps: number of steps of the run.
        model: the model in training; `before_step` reads its weights.
        patience_s: how long to wait while no teacher server answers, in seconds.

    Raises `UserError` when the servers do not run the cache's teacher, or when responses would not fit the student.
    """

    def __init__(
        self,
        config: TrainConfig,
        cache: TeacherCache,
        rows: RowSource,
        student: ModelSource,
        model: nn.Module,
        device: torch.device,
        steps: int,
        rows_of: Callable[[int], list[RowIndex]],
        *,
        rank: int,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._config, self._rows, self._student, self._model = config, rows, student, model
        self._steps, self._rows_of, self._rank = steps, rows_of, rank
        max_new_tokens = longest_sample(cache, config)
        prompts = longest_prompts(cache.folder, cache.shards())
        longest, longest_of_teacher = (prompt + max_new_tokens for prompt in prompts)
        check_positions(longest, student.max_positions, where=f"{student.name}, with sample_max_new_tokens")
        self._store = SampleStore(config.out, rank, student)
        self._blocks: dict[int, Block] = {}
        self._refreshed_at: int | None = None  # the step whose weights the sampler has
        self._changed = threading.Condition()
        self._released, self._cancelled = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._teacher = TeacherServers(
            cache, config.teacher_url, student, longest_of_teacher, config.teacher_tolerance, patience_s
        )
        try:
            self._sampler = open_sampler(config, student, model, device, max_new_tokens, longest)
        except BaseException:
            self._teacher.close()
            raise
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="live-samples")

    def before_step(self, step: int) -> None:
        """Begin the draws that are due with the weights before `step`. To be called by the main thread.

        Raises `UserError` when a block is missing whose weights are gone.
        """
        every, staleness = self._config.sample_every, self._config.staleness
        number, starts_block = step // every, step % every == 0
        with self._changed:
            is_first = not self._blocks  # step of this process
            self._blocks = {other: block for other, block in self._blocks.items() if other >= number}
        if number not in self._blocks:
            # with staleness 1 it was begun a block earlier, except for the first block of a run
            self._begin(number, step, may_draw=starts_block and (staleness == 0 or step == 0))
        if staleness == 1 and (starts_block or is_first):
            self._begin(number + 1, step, may_draw=starts_block)

    def _begin(self, number: int, step: int, *, may_draw: bool) -> None:
        """Hand block `number` to the worker, to be read from disk, scored, or drawn with the weights before `step`."""
        first_step = number * self._config.sample_every
        if first_step >= self._steps:
            return
        steps = range(first_step, min(first_step + self._config.sample_every, self._steps))
        sampled = {other: filter(self._is_sampled, self._rows_of(other)) for other in steps}
        block = plan_block(sampled, self._rows, self._student, self._config)
        if not block.planned:  # with `mix`, steps may read no response of the student
            block.rows = []
        elif not self._store.is_drawn(first_step, block.planned):
            if not may_draw:
                raise UserError(
                    "the student's samples are missing, and the weights that drew them are gone",
                    found=f"no samples of steps {first_step} to {steps[-1]}",
                    where=self._config.out,
                    advice="Resume with as many processes as the run was started with, or choose another --out",
                )
            if self._refreshed_at != step:
                self._wait(lambda: all(other.is_settled for other in self._blocks.values()))
                self._sampler.refresh(self._model)
                self._refreshed_at = step
        with self._changed:
            self._blocks[number] = block
            self._changed.notify_all()
        if block.planned:
            self._worker.submit(self._make, block)

    def rows(self, step: int, row_indices: Sequence[RowIndex]) -> list[TrainingRow]:
        """The rows `row_indices`, those with the student's responses of `step` first; waits until these are scored.

        A response that the teacher could not score gives no row. Raises `UserError` when no row is left or the samples
        cannot be made, and `KeyboardInterrupt` after `release`.
        """
        sampled = [row_index for row_index in row_indices if self._is_sampled(row_index)]
        rows = self._sampled_rows(step, sampled) if sampled else []
        rows += [self._rows.row(*row_index) for row_index in row_indices if not self._is_sampled(row_index)]
        if not rows:
            raise UserError(
                f"the teacher could score none of the student's responses of step {step + 1}",
                where=self._config.out,
                advice="The reasons are in the messages above and in the servers' logs",
            )
        return rows

    def _is_sampled(self, row_index: RowIndex) -> bool:
        """Whether the student answers the prompt of a row: with `mix`, that of some rows only."""
        return not isinstance(self._rows, MixedRows) or self._rows.is_students(row_index)

    def _sampled_rows(self, step: int, row_indices: Sequence[RowIndex]) -> list[TrainingRow]:
        number = step // self._config.sample_every
        with self._changed:
            self._wait(lambda: number in self._blocks and self._blocks[number].is_over, until=self._released)
            block = self._blocks[number]
        if block.error is not None:
            raise block.error
        assert block.rows is not None
        rows: list[TrainingRow] = []
        for row_index in row_indices:
            cached = self._rows.row(*row_index).chosen
            indices = [block.index_of[step, cached.example_id, sample] for sample in samples_of(cached, self._config)]
            samples = [row for row in (block.rows[index] for index in indices) if row is not None]
            if samples and self._config.pairing == "best-vs-worst":
                scores = pa.table({"response_logprobs": [row.response_logprobs for row in samples]})
                samples = [samples[int(mean_logprobs(scores, ends_known=True).argmin())]]
            rows += [TrainingRow(cached, row) if self._config.needs_pairs else TrainingRow(row) for row in samples]
        return rows

    def settle(self) -> None:
        """Before a checkpoint: wait until every block that was begun is stored as drawn.

        Also waits for scores, but no longer than `SETTLE_S` seconds: a checkpoint must not depend on the servers.
        """
        newer = [] if self._config.staleness == 0 else [*self._blocks.values()]
        deadline_s = time.monotonic() + SETTLE_S
        self._wait(lambda: all(block.is_settled for block in newer))
        self._wait(lambda: all(block.is_over for block in newer) or time.monotonic() > deadline_s)

    def release(self) -> None:
        """End every wait for rows; any thread may call it. Drawing continues: a checkpoint waits for it (`settle`)."""
        self._released.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give up running work and leave the servers."""
        self._cancelled.set()
        self.release()
        self._teacher.close()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._sampler.close()

    def _wait(self, ready: Callable[[], bool], until: threading.Event | None = None) -> None:
        """Return once `ready`; raises `KeyboardInterrupt` once `until` is set, or after `close`."""
        with self._changed:
            while not ready():
                if self._cancelled.is_set() or (until is not None and until.is_set()):
                    raise KeyboardInterrupt
                self._changed.wait(_POLL_S)  # with a timeout, so that a second Ctrl-C gets through

    def _make(self, block: Block) -> None:
        """Draw and score a block, as far as this is not done yet; runs on the worker."""
        try:
            if (rows := self._store.scored(block.steps[0], block.planned)) is None:
                self._draw_and_score(block)
                rows = self._store.scored(block.steps[0], block.planned)
            block.rows = rows
        except BaseException as error:  # raised by `rows`
            block.error = KeyboardInterrupt() if self._cancelled.is_set() else error
        with self._changed:
            self._changed.notify_all()

    def _draw_and_score(self, block: Block) -> None:
        requests = self._requests(block)
        try:
            if self._failure is not None:
                raise self._failure
            answers = {answer.index: _checked(answer) for answer in self._teacher.score(requests)}
        except Exception as error:
            if not self._cancelled.is_set():
                # the servers are lost: finish drawing with these weights, so that the run can resume
                self._failure = error
                for _ in requests:
                    pass
            raise
        failed = [answer for answer in answers.values() if isinstance(answer, FailedRequest)]
        if failed and self._rank == 0:
            say(f"the teacher cannot score {len(failed)} of {len(answers)} responses; the first: {failed[0].reason}")
        self._store.keep_scored(block.steps[0], block.planned, block.drawn, answers)

    def _requests(self, block: Block) -> Iterator[ScoreRequest]:
        """Responses to be scored, as they are drawn; stores the block once all are drawn."""
        stored = self._store.drawn(block.steps[0], block.planned)
        if stored is None:
            requests = [GenerateRequest(plan.index, plan.prompt_ids, plan.seed) for plan in block.planned]
            responses = self._sampler.draw(requests, self._cancelled)
        else:
            responses = iter(stored)
        for response in responses:
            block.drawn.append(response)
            if self._cancelled.is_set():
                raise KeyboardInterrupt
            prompt_ids = block.planned[response.index].asked_ids
            yield ScoreRequest(response.index, prompt_ids, response.response_ids.tolist())
        if stored is None:
            self._store.keep_drawn(block.steps[0], block.planned, block.drawn)
        block.is_drawn = True
        with self._changed:
            self._changed.notify_all()


def _checked(answer: EngineResult | FailedRequest) -> EngineResult | FailedRequest:
    """A response that is impossible for the teacher is a failed request."""
    problem = answer_problem(answer) if isinstance(answer, EngineResult) else None
    return answer if problem is None else FailedRequest(answer.index, problem)
