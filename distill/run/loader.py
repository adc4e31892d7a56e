"""What each step reads on one rank: rows in order, the student's live responses, text of the corpus."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NoReturn, Self

import torch
from accelerate import Accelerator

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import MicroBatch, cut_entries
from dpkd.distill.batches.collate import collate, collate_corpus
from dpkd.distill.batches.prefetch import prefetched
from dpkd.distill.batches.shared_prompts import share_prompts
from dpkd.distill.rows.following import FollowedRows
from dpkd.distill.rows.row import RowIndex
from dpkd.distill.rows.vocabulary import check_corpus
from dpkd.distill.run.interrupts import Interrupts
from dpkd.distill.run.ranks import all_reduce_sums, on_all_ranks, raise_first
from dpkd.distill.run.setup import Run

if TYPE_CHECKING:
    from dpkd.distill.live.rows import LiveRows


class StepLoader:
    """The micro-batches of each step from `first` on, read ahead on a thread.

    They are a pure function of the step, except for responses that `model` samples live. Every rank calls each method.
    """

    def __init__(
        self, run: Run, accelerator: Accelerator, model: torch.nn.Module, first: int, interrupts: Interrupts
    ) -> None:
        self._run, self._accelerator, self._interrupts = run, accelerator, interrupts
        self._error: UserError | None = None
        self.wait_s = 0.0  # how long the last step waited for its micro-batches
        self._stack = contextlib.ExitStack()
        self._live: LiveRows | None = None
        self._followed = run.rows if isinstance(run.rows, FollowedRows) else None
        if self._followed is not None:
            self._followed.start(run.config.out, leader=accelerator.is_main_process)
        if run.config.student_samples == "live":
            self._live = _open_live(run, accelerator, model)
            self._stack.callback(self._live.close)
        steps = range(first, run.steps)
        self._batches = prefetched(
            self.micro_batches, steps, should_stop=lambda: interrupts.should_stop, on_close=self._release
        )
        self._stack.callback(self._batches.close)

    def next(self, step: int) -> list[MicroBatch] | None:
        """The micro-batches of `step`; None on every rank if one of them was interrupted or found no more rows."""
        started_s = time.perf_counter()
        micro_batches = None
        try:
            if self._live is not None:
                self._live.before_step(step)
            micro_batches = next(self._batches, None)
        except UserError as error:
            self._error = error
        reasons = {"interrupts": int(self._interrupts.should_stop), "ends": int(micro_batches is None)}
        stops = any(all_reduce_sums(self._accelerator, [reasons]).values())
        self.wait_s = time.perf_counter() - started_s
        return None if stops else micro_batches

    def raise_reason(self) -> NoReturn:
        """Raise why `next` gave None: the first rank's error, or else `KeyboardInterrupt`."""
        raise_first(self._accelerator, self._error)
        raise KeyboardInterrupt

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What this rank's forward passes of `step` read, without reading ahead."""
        run, ranks, rank = self._run, self._accelerator.num_processes, self._accelerator.process_index
        micro_batches = []
        for number, indices in enumerate(run.order.micro_batches_of(step)[rank::ranks]):
            rows = self._live.rows(step, indices) if self._live else [run.rows.row(*index) for index in indices]
            corpus = None
            if run.corpus is not None:
                size = run.config.batch_size
                block = step * run.config.gradient_accumulation_steps + number
                start = (block * ranks + rank) * size
                blocks_BS = run.corpus.blocks(start, size)
                check_corpus(run.student, blocks_BS, run.corpus.identity["name"])
                corpus = collate_corpus(blocks_BS, start)
            shared = share_prompts(rows) if run.config.share_prompt else None
            whole = collate(
                rows,
                with_distributions=run.has_distributions,
                of_rejected=run.config.contrasts,
                progress=step / run.steps,
            )
            batch = cut_entries(whole, run.config.top_k, run.config.top_mass)
            micro_batches.append(MicroBatch(batch, corpus, shared))
        return micro_batches

    def settle(self) -> None:
        """Before a checkpoint: store the samples that a resumed run could not draw again."""
        if self._live is not None:
            self._live.settle()

    def wait_for_end_of_cache(self) -> None:
        """A followed cache may still be written after the last step; its end says whether all of it was sound."""
        if (rows := self._followed) is not None:
            interrupts = self._interrupts
            on_all_ranks(self._accelerator, lambda: rows.wait_for(None, should_stop=lambda: interrupts.should_stop))

    def sync_followed_shards(self) -> bool:
        """Collective: every rank calls it. Look for new shards of a followed cache; whether it is still being written.

        Rank zero appends new shards to the run's `followed.jsonl`, and the other ranks read them there. True on all
        ranks if one of them has not seen the end of the cache; False for rows of anything else. A `UserError` of one
        rank ends all.
        """
        if (rows := self._followed) is None:
            return False
        finished = on_all_ranks(self._accelerator, rows.take_new_shards)
        return bool(all_reduce_sums(self._accelerator, [{"growing": int(not finished)}])["growing"])

    def _release(self) -> None:
        """End a wait for rows, whatever they come from. What the student is drawing is still to be stored."""
        if self._followed is not None:
            self._followed.cancel()
        if self._live is not None:
            self._live.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _open_live(run: Run, accelerator: Accelerator, model: torch.nn.Module) -> LiveRows:
    """Responses that the student samples while it trains; `UserError` for a server without the cache's teacher."""
    from dpkd.distill.live.rows import LiveRows

    (cache,) = run.caches  # the config's own check
    assert cache.finished is not None
    ranks, rank = accelerator.num_processes, accelerator.process_index

    def rows_of(step: int) -> list[RowIndex]:
        return [index for part in run.order.micro_batches_of(step)[rank::ranks] for index in part]

    made_of = (run.config, cache.finished, run.rows, run.student)
    return LiveRows(*made_of, model, accelerator.device, run.steps, rows_of, rank=rank)
