"""From rows and blocks of text to tensors. The shift from a token to the state that predicts it happens here only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpkd.distill.batches.batch import Batch
from dpkd.distill.rows.row import TrainingRow
from dpkd.teacher_cache.store.rows import CachedRow


def collate(
    rows: Sequence[TrainingRow], *, with_distributions: bool, of_rejected: bool = False, progress: float = 0.0
) -> Batch:
    """Tensors of `rows`: all chosen responses, then all rejected ones.

    Rejected responses carry distributions only with `of_rejected`. Otherwise they have no entries, and all their mass
    is in the tail. `progress` is the share of the run's steps that are done.
    """
    cached = [row.chosen for row in rows] + [row.rejected for row in rows if row.rejected is not None]
    lengths = [row.num_tokens for row in cached]
    input_ids = np.zeros((len(cached), max(lengths)), np.int64)
    mask = np.zeros_like(input_ids)
    for index, (row, length) in enumerate(zip(cached, lengths, strict=True)):
        input_ids[index, :length] = row.sequence_ids()
        mask[index, :length] = 1
    num_tokens = np.array([len(row.response_ids) for row in cached])
    # the state at position i predicts token i + 1: a span that starts at P is predicted from P - 1 on
    predict = [row.places() - 1 for row in cached]
    has_teacher = all(len(row.response_logprobs) == len(row.response_ids) for row in cached)
    entries = {}
    if with_distributions:
        num_with = len(cached) if of_rejected else len(rows)
        entries = _entries(cached[:num_with], int(num_tokens[num_with:].sum()))
    sampling = [row.sampling_logprobs for row in cached if row.sampling_logprobs is not None]
    return Batch(
        example_ids=[row.example_id for row in cached],
        input_ids_BS=torch.from_numpy(input_ids),
        attention_mask_BS=torch.from_numpy(mask),
        row_T=torch.from_numpy(np.repeat(np.arange(len(cached)), num_tokens)),
        predict_T=torch.from_numpy(np.concatenate(predict)),
        target_T=_tensor([row.response_ids for row in cached], np.int64),
        num_tokens_B=torch.from_numpy(num_tokens),
        unfinished_B=torch.tensor([row.finish_reason == "length" for row in cached]),
        num_chosen=len(rows),
        teacher_logprob_T=_tensor([row.response_logprobs for row in cached], np.float32) if has_teacher else None,
        sampling_logprob_T=_tensor(sampling, np.float32) if len(sampling) == len(cached) else None,
        sampling_logprob_B=_sampling_of_pairs(rows),
        progress=progress,
        cache_B=_caches(rows),
        **entries,
    )


def _caches(rows: Sequence[TrainingRow]) -> Tensor | None:
    """The numbers of the rows' caches, of the chosen responses, then of the rejected ones."""
    numbers = [row.cache for row in [*rows, *(row for row in rows if row.rejected is not None)]]
    return None if None in numbers else torch.tensor(numbers)


def _sampling_of_pairs(rows: Sequence[TrainingRow]) -> Tensor | None:
    """log q0 of the chosen responses, then of the rejected ones; None if it is not known of all."""
    chosen, rejected = [], []
    for row in rows:
        drawn = row.rejected
        if drawn is None or drawn.sampling_logprobs is None or drawn.cached_sampling_logprob is None:
            return None
        chosen.append(drawn.cached_sampling_logprob)
        rejected.append(float(drawn.sampling_logprobs.sum(dtype=np.float64)))
    return torch.tensor([*chosen, *rejected], dtype=torch.float32)


def _entries(rows: Sequence[CachedRow], num_empty: int) -> dict[str, Tensor]:
    """The entries of `rows`, followed by `num_empty` positions without entries."""
    tops = [row.distributions for row in rows if row.distributions is not None]
    if len(tops) != len(rows):
        raise ValueError("a row without distributions")
    counts_T = np.concatenate([*(top.counts_T for top in tops), np.zeros(num_empty)]).astype(np.int64)
    kept_TK = np.arange(max(int(counts_T.max()), 1))[None, :] < counts_T[:, None]
    ids_TK = np.full(kept_TK.shape, -1, np.int64)
    logprobs_TK = np.full(kept_TK.shape, -np.inf, np.float32)
    ids_TK[kept_TK] = np.concatenate([top.ids_E for top in tops])
    logprobs_TK[kept_TK] = np.concatenate([top.logprobs_E for top in tops])
    return {
        "entry_ids_TK": torch.from_numpy(ids_TK),
        "entry_logprobs_TK": torch.from_numpy(logprobs_TK),
        "entry_counts_T": torch.from_numpy(counts_T),
        "log_tail_T": _tensor([*(top.log_tail_T for top in tops), np.zeros(num_empty)], np.float32),
    }


def _tensor(arrays: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype))


def collate_corpus(blocks_BS: np.ndarray, start: int = 0) -> Batch:
    """Tensors of whole blocks of text [B, S]: all tokens but the first are targets; `start` numbers the blocks."""
    num_rows, length = blocks_BS.shape
    targets = length - 1
    return Batch(
        example_ids=[f"block-{start + index}" for index in range(num_rows)],
        input_ids_BS=torch.from_numpy(blocks_BS.astype(np.int64)),
        attention_mask_BS=torch.ones((num_rows, length), dtype=torch.int64),
        row_T=torch.arange(num_rows).repeat_interleave(targets),
        predict_T=torch.arange(targets).repeat(num_rows),
        target_T=torch.from_numpy(blocks_BS[:, 1:].reshape(-1).astype(np.int64)),
        num_tokens_B=torch.full((num_rows,), targets),
        unfinished_B=torch.ones(num_rows, dtype=torch.bool),  # a block is cut off, it does not end
        num_chosen=num_rows,
    )
