"""How tokens are drawn from logits."""

from __future__ import annotations

import torch

from dpkd.teacher_cache.engines.decoding import draw_tokens
from dpkd.teacher_cache.engines.engine import Sampling


def test_a_token_is_the_inverse_cumulative_distribution_at_its_number() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]] * 5))
    numbers = [0.0, 0.19, 0.21, 0.69, 0.999]
    assert draw_tokens(logits, numbers, Sampling(1.0, 1.0, 1, ())).tolist() == [0, 0, 1, 1, 2]
    # the nucleus of 0.6 is {1, 2}, which share 0.625 and 0.375 of it
    assert draw_tokens(logits, numbers, Sampling(1.0, 0.6, 1, ())).tolist() == [1, 1, 1, 2, 2]
    # temperature 0.5 squares the probabilities: 4, 25 and 9 of 38
    assert draw_tokens(logits, numbers, Sampling(0.5, 1.0, 1, ())).tolist() == [0, 1, 1, 1, 2]
    assert draw_tokens(logits, numbers, Sampling(0.0, 1.0, 1, ())).tolist() == [1] * 5
