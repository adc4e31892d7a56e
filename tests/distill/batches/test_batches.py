"""Collation by value: shift, masks, entries; and the order of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpkd.distill.batches.collate import collate
from dpkd.distill.batches.order import BatchOrder
from dpkd.distill.batches.prefetch import prefetched
from dpkd.distill.losses.cached_distributions import cached_logprobs
from dpkd.distill.rows.row import TrainingRow
from dpkd.teacher_cache.engines.engine import Distributions
from dpkd.teacher_cache.store.rows import CachedRow


def row(name: str, prompt: list[int], response: list[int], counts: list[int] | None = None) -> CachedRow:
    top = None
    if counts is not None:
        entries = sum(counts)
        top = Distributions(
            np.array(counts, np.int32),
            np.arange(10, 10 + entries, dtype=np.int32),
            -np.arange(1, 1 + entries, dtype=np.float32),
            np.full(len(counts), -2.0, np.float32),
        )
    logprobs = -np.arange(1, 1 + len(response), dtype=np.float32)
    return CachedRow(name, 0, "teacher", "stop", np.array(prompt), np.array(response), logprobs, top)


def test_each_position_is_one_before_its_target() -> None:
    batch = collate(
        [TrainingRow(row("a", [1, 2, 3], [4, 5])), TrainingRow(row("b", [6], [7, 8, 9]))], with_distributions=False
    )
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch.attention_mask_BS.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.row_T.tolist() == [0, 0, 1, 1, 1]
    assert batch.predict_T.tolist() == [2, 3, 0, 1, 2]
    assert batch.target_T.tolist() == [4, 5, 7, 8, 9]
    # the token after each predicting position is its target
    assert batch.input_ids_BS[batch.row_T, batch.predict_T + 1].tolist() == batch.target_T.tolist()
    assert batch.num_tokens_B.tolist() == [2, 3]
    assert batch.teacher_logprob_T is not None
    assert batch.teacher_logprob_T.tolist() == [-1, -2, -1, -2, -3]


def test_pairs_put_all_chosen_before_all_rejected() -> None:
    pairs = [
        TrainingRow(row("a", [1], [2]), row("a", [1], [3, 4])),
        TrainingRow(row("b", [5], [6]), row("b", [5], [7])),
    ]
    batch = collate(pairs, with_distributions=False)
    assert batch.target_T.tolist() == [2, 6, 3, 4, 7]
    assert batch.num_tokens_B.tolist() == [1, 1, 2, 1]


def test_entries_are_padded_with_no_token() -> None:
    batch = collate([TrainingRow(row("a", [1], [2, 3], counts=[2, 1]))], with_distributions=True)
    assert batch.entry_ids_TK is not None
    assert batch.entry_logprobs_TK is not None
    assert batch.entry_ids_TK.tolist() == [[10, 11], [12, -1]]
    assert batch.entry_logprobs_TK.tolist() == [[-1, -2], [-3, -np.inf]]
    with pytest.raises(ValueError, match="without distributions"):
        collate([TrainingRow(row("a", [1], [2]))], with_distributions=True)


def test_lookup_uses_entries_and_spreads_the_tail() -> None:
    ids = torch.tensor([[4, 7], [4, -1], [4, -1]])
    logprobs = torch.tensor([[-0.5, -1.0], [-0.1, -torch.inf], [-0.1, -torch.inf]])
    counts = torch.tensor([2, 1, 1])
    remainder = torch.log(torch.tensor([0.2, 0.1, 0.1]))
    found, miss = cached_logprobs(torch.tensor([7, 4, 9]), ids, logprobs, counts, remainder, vocab_size=11)
    assert miss.tolist() == [False, False, True]
    # a miss: a tenth of mass over the ten tokens that are not kept
    assert torch.allclose(found, torch.tensor([-1.0, -0.1, float(np.log(0.01))]), atol=1e-6)


def test_lookup_at_full_width_is_the_distribution() -> None:
    table = torch.log_softmax(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    ranked = table.sort(dim=1, descending=True)
    tokens = torch.tensor([0, 3, 8, 5, 1])
    found, miss = cached_logprobs(
        tokens, ranked.indices, ranked.values, torch.full((5,), 9), torch.full((5,), -torch.inf), vocab_size=9
    )
    assert not miss.any()
    assert torch.equal(found, table.gather(1, tokens[:, None])[:, 0])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 5))
def test_every_epoch_reads_every_row_once(sizes: list[int], batch_size: int, seed: int) -> None:
    order = BatchOrder(sizes, seed, batch_size)
    wanted = 3 * order.num_rows
    stream = [place for step in range(-(-wanted // batch_size)) for place in order.rows_of(step)][:wanted]
    everything = sorted((group, index) for group, size in enumerate(sizes) for index in range(size))
    for epoch in range(3):
        assert sorted(stream[epoch * order.num_rows : (epoch + 1) * order.num_rows]) == everything


def test_a_step_is_the_same_whatever_came_before() -> None:
    walked = BatchOrder([5, 6, 7], 3, 4)
    for step in range(9):
        walked.rows_of(step)
    assert walked.rows_of(9) == BatchOrder([5, 6, 7], 3, 4).rows_of(9)


def test_an_error_in_the_reader_comes_out_at_its_step() -> None:
    def make(step: int) -> list[object]:
        if step == 2:
            raise ValueError("bad row")
        return [step]

    stream = prefetched(make, range(5))  # type: ignore[arg-type]
    assert [next(stream), next(stream)] == [[0], [1]]
    with pytest.raises(ValueError, match="bad row"):
        next(stream)
