"""Batches by a token budget: every row once per epoch, within the budget, a pure function of the step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.core.errors import UserError
from dpkd.distill.batches.token_budget import TokenBatchOrder

lengths = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=30), min_size=1, max_size=6)


def make(groups: list[list[int]], seed: int = 0, budget: int = 120, passes: int = 1, sequences: int = 1):  # type: ignore[no-untyped-def]
    return TokenBatchOrder(
        [np.array(group) for group in groups], seed, budget=budget, sequences=sequences, micro_batches_per_step=passes
    )


@settings(deadline=None)
@given(lengths, st.integers(0, 5), st.sampled_from([1, 2]))
def test_every_row_once_an_epoch_and_no_micro_batch_above_the_budget(
    groups: list[list[int]], seed: int, sequences: int
) -> None:
    order = make(groups, seed, sequences=sequences)
    everything = {(group, row) for group, rows in enumerate(groups) for row in range(len(rows))}
    step = 0
    for epoch in range(3):
        seen: Counter[tuple[int, int]] = Counter()
        while order.epoch_of(step) == epoch:
            (rows,) = order.micro_batches_of(step)
            assert len(rows) * max(groups[group][row] for group, row in rows) * sequences <= 120
            seen.update(rows)
            step += 1
        assert seen == Counter(everything)
        assert order.num_steps(epoch + 1) == step


@settings(deadline=None)
@given(lengths, st.integers(1, 4), st.integers(0, 20))
def test_a_step_needs_no_step_before_it_and_ranks_share_the_same_passes(
    groups: list[list[int]], passes: int, step: int
) -> None:
    walked = make(groups, passes=passes)
    for before in range(step):
        walked.micro_batches_of(before)
    assert walked.micro_batches_of(step) == make(groups, passes=passes).micro_batches_of(step)
    singly = make(groups)
    assert walked.micro_batches_of(step) == [
        singly.micro_batches_of(step * passes + place)[0] for place in range(passes)
    ]


def test_micro_batches_have_rows_of_similar_length_in_random_order() -> None:
    random = np.random.default_rng(0)
    groups = [random.integers(20, 400, 128).tolist() for _ in range(8)]
    order = make(groups, budget=3200)
    steps = range(order.num_steps(1))
    padded = used = 0
    longest = []
    for step in steps:
        found = [groups[group][row] for rows in order.micro_batches_of(step) for group, row in rows]
        padded += len(found) * max(found)
        used += sum(found)
        longest.append(max(found))
    assert used / padded > 0.95
    assert longest != sorted(longest)


def test_a_row_above_the_budget_is_refused_before_the_first_step() -> None:
    with pytest.raises(UserError, match="longest row does not fit into a micro-batch: found 121 tokens, expected at"):
        make([[5, 121]])
    with pytest.raises(UserError, match="122 tokens for a pair"):
        make([[5, 61]], sequences=2)
