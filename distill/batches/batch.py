"""From cached rows to tensors: pure collation, the label shift in one place, batches as a function of the step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from dpkd.teacher_cache.store.order import epoch_order
from dpkd.teacher_cache.store.schema import CachedRow

if TYPE_CHECKING:
    from dpkd.distill.batches.shared_prompts import SharedPrompts


@dataclass(frozen=True)
class TrainingRow:
    """A response to learn from, and at the sequence level the student's own beside it."""

    chosen: CachedRow
    rejected: CachedRow | None = None


class RowSource(Protocol):
    """Rows in groups that are read together."""

    @property
    def group_sizes(self) -> list[int]:
        """Rows in each group."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and response."""
        ...

    def row(self, group: int, index: int) -> TrainingRow:
        """One row."""
        ...

    def lengths_by_group(self) -> list[np.ndarray]:
        """Tokens of every row, prompt and response; of a pair, those of its longer sequence."""
        ...


@dataclass(frozen=True)
class Batch:
    """B sequences of prompt and response (right padded), T response positions over all of them.

    The first `num_chosen` sequences are the responses to learn from; rejected ones follow, pair for pair, where the
    objective compares. `unfinished_B` marks responses that ended by length. Position t predicts `target_T[t]` from the
    hidden state `predict_T[t]`, which stands one token before it. The `entry_*` tensors are the cached top of the
    teacher's distribution (ids padded with -1); they are None where the cache keeps none, as is `teacher_logprob_T`
    where the teacher never saw the row.
    """

    example_ids: list[str]
    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    row_T: Tensor
    predict_T: Tensor
    target_T: Tensor
    num_tokens_B: Tensor
    unfinished_B: Tensor
    num_chosen: int
    teacher_logprob_T: Tensor | None
    entry_ids_TK: Tensor | None
    entry_logprobs_TK: Tensor | None
    entry_counts_T: Tensor | None
    log_tail_T: Tensor | None

    @property
    def num_rows(self) -> int:
        """B, sequences."""
        return int(self.input_ids_BS.shape[0])

    @property
    def num_positions(self) -> int:
        """T, response tokens."""
        return int(self.target_T.shape[0])

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass of a step reads: rows, and text of the corpus where there is such a term.

    `shared` is how the student reads the rows of pairs where their prompts are shared.
    """

    rows: Batch
    corpus: Batch | None = None
    shared: SharedPrompts | None = None

    @property
    def num_positions(self) -> int:
        """Tokens that are learnt from."""
        return self.rows.num_positions + (0 if self.corpus is None else self.corpus.num_positions)

    def to(self, device: torch.device) -> Self:
        """The same micro-batch on `device`."""
        corpus = None if self.corpus is None else self.corpus.to(device)
        shared = None if self.shared is None else self.shared.to(device)
        return replace(self, rows=self.rows.to(device), corpus=corpus, shared=shared)


def collate(rows: Sequence[TrainingRow], *, with_distributions: bool) -> Batch:
    """Tensors of `rows`: every chosen response, then (where there are any) every rejected one.

    Distributions are those of the chosen responses: rejected ones have no entries, all mass in the remainder.
    """
    cached = [row.chosen for row in rows] + [row.rejected for row in rows if row.rejected is not None]
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in cached]
    input_ids = np.zeros((len(cached), max(lengths)), np.int64)
    mask = np.zeros_like(input_ids)
    for place, (row, length) in enumerate(zip(cached, lengths, strict=True)):
        input_ids[place, :length] = np.concatenate([row.prompt_ids, row.response_ids])
        mask[place, :length] = 1
    num_tokens = np.array([len(row.response_ids) for row in cached])
    # the state at position i predicts token i + 1: a response that starts at P is predicted from P - 1 on
    predict = [len(row.prompt_ids) - 1 + np.arange(len(row.response_ids)) for row in cached]
    has_teacher = all(len(row.response_logprobs) == len(row.response_ids) for row in cached)
    entries = (
        _entries([row.chosen for row in rows], int(num_tokens[len(rows) :].sum()))
        if with_distributions
        else (None, None, None, None)
    )
    return Batch(
        example_ids=[row.example_id for row in cached],
        input_ids_BS=torch.from_numpy(input_ids),
        attention_mask_BS=torch.from_numpy(mask),
        row_T=torch.from_numpy(np.repeat(np.arange(len(cached)), num_tokens)),
        predict_T=torch.from_numpy(np.concatenate(predict)),
        target_T=torch.from_numpy(np.concatenate([row.response_ids for row in cached]).astype(np.int64)),
        num_tokens_B=torch.from_numpy(num_tokens),
        unfinished_B=torch.tensor([row.finish_reason == "length" for row in cached]),
        num_chosen=len(rows),
        teacher_logprob_T=_tensor([row.response_logprobs for row in cached], np.float32) if has_teacher else None,
        entry_ids_TK=entries[0],
        entry_logprobs_TK=entries[1],
        entry_counts_T=entries[2],
        log_tail_T=entries[3],
    )


def _entries(rows: Sequence[CachedRow], num_bare: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries of `rows`, and of `num_bare` positions without any after them."""
    tops = [row.distributions for row in rows if row.distributions is not None]
    if len(tops) != len(rows):
        raise ValueError("a row without distributions")
    counts = np.concatenate([*(top.counts_T for top in tops), np.zeros(num_bare)]).astype(np.int64)
    kept_TK = np.arange(max(int(counts.max()), 1))[None, :] < counts[:, None]
    ids_TK = np.full(kept_TK.shape, -1, np.int64)
    logprobs_TK = np.full(kept_TK.shape, -np.inf, np.float32)
    ids_TK[kept_TK] = np.concatenate([top.ids_E for top in tops])
    logprobs_TK[kept_TK] = np.concatenate([top.logprobs_E for top in tops])
    remainder = _tensor([*(top.log_tail_T for top in tops), np.zeros(num_bare)], np.float32)
    return torch.from_numpy(ids_TK), torch.from_numpy(logprobs_TK), torch.from_numpy(counts), remainder


def _tensor(parts: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype))


def cut(rows: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """`rows` in parts of `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class RowOrder(Protocol):
    """Which rows a step reads."""

    num_rows: int

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of the first row of `step`."""
        ...

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """(group, row) of every row of the global batch of `step` (from 0)."""
        ...

    def passes_of(self, step: int) -> list[list[tuple[int, int]]]:
        """The same rows by forward pass, over accumulation and ranks: rank r of R takes every R-th from the r-th on."""
        ...


class BatchOrder:
    """Which rows a step reads: epochs follow each other without a break, each a permutation of every row.

    A pure function of (seed, step, batch sizes): resuming needs the step alone, and a global batch holds the same rows
    whatever the number of ranks.
    """

    def __init__(
        self, group_sizes: Sequence[int], seed: int, global_batch_size: int, batch_size: int | None = None
    ) -> None:
        self._group_sizes, self._seed, self._global_batch_size = list(group_sizes), seed, global_batch_size
        self._batch_size = batch_size or global_batch_size
        self.num_rows = sum(group_sizes)
        self._held = (-1, np.zeros((0, 2), np.int64))  # one value: two threads ask for rows

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of the first row of `step`."""
        return step * self._global_batch_size // self.num_rows

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """(group, row) of every row of the global batch of `step` (from 0)."""
        start = step * self._global_batch_size
        return [self._place(index) for index in range(start, start + self._global_batch_size)]

    def passes_of(self, step: int) -> list[list[tuple[int, int]]]:
        """See `RowOrder`."""
        return cut(self.rows_of(step), self._batch_size)

    def _place(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self.num_rows)
        held, order = self._held
        if epoch != held:
            order = epoch_order(self._group_sizes, self._seed, epoch)
            self._held = epoch, order
        group, row = order[place]
        return int(group), int(row)


_T = TypeVar("_T")


def prefetched(
    make: Callable[[int], _T],
    steps: range,
    depth: int = 2,
    give_up: Callable[[], bool] = lambda: False,
    on_close: Callable[[], None] = lambda: None,
) -> Generator[_T, None, None]:
    """`make(step)` for every step, `depth` steps ahead on a thread; an error comes out where its batch would have.

    It ends early when `give_up` turns true while it waits for a batch. `on_close` is called to end a `make` under way.
    """
    ready: queue.Queue[_T | BaseException] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def hand_over(item: _T | BaseException) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for step in steps:
                if stopped.is_set():
                    return
                hand_over(make(step))
        except BaseException as error:  # handed to the consumer, which raises it
            hand_over(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item = _take(ready, give_up)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        on_close()
        thread.join()


def _take(ready: queue.Queue[_T | BaseException], give_up: Callable[[], bool]) -> _T | BaseException | None:
    while True:
        try:
            return ready.get(timeout=0.2)
        except queue.Empty:
            if give_up():
                return None
