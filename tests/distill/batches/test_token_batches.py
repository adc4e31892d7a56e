"""Batches by a token budget: every row once per epoch, within the budget, a pure function of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.core.errors import UserError
from dpkd.distill.batches.token_budget import TokenBatchOrder
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.setup import open_run

lengths = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=20)


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


@pytest.mark.parametrize(
    ("options", "sequences", "length"),
    [
        ({"objective": "reverse-kl"}, 1, lambda prompt, response: prompt + 30),
        ({"level": "sequence"}, 2, lambda prompt, response: prompt + max(response, 30)),
        ({"level": "sequence", "num_student_samples": 3, "pairing": "all"}, 6, lambda p, r: p + max(r, 30)),
        ({"level": "sequence", "num_student_samples": 3, "pairing": "best-vs-worst"}, 2, lambda p, r: p + max(r, 30)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_live_responses_count_with_the_length_that_they_may_have(
    toy_cache: Path, toy_student: Path, options: dict[str, Any], sequences: int, length: Callable[[int, int], int]
) -> None:
    """The cached responses have 12 tokens and samples may have 30: no micro-batch can exceed the budget."""
    config = TrainConfig(
        cache=str(toy_cache), student=str(toy_student), out=Path("out"), device="cpu", student_samples="live",
        teacher_url=("http://127.0.0.1:1",), sample_max_new_tokens=30, batch_tokens=1200, **options,
    )  # fmt: skip
    run = open_run(config)
    fullest = 0
    for step in range(run.steps):
        for indices in run.order.micro_batches_of(step):
            rows = [run.rows.row(*index).chosen for index in indices]
            longest = max(length(len(row.prompt_ids), len(row.response_ids)) for row in rows)
            fullest = max(fullest, len(rows) * longest * sequences)
    assert 600 < fullest <= 1200
