"""Decoding with a transformers model: padding, drawing tokens, and the loop over steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dpkd.teacher_cache.engines.engine import FinishReason, Sampling


def left_padded(sequences: Sequence[Sequence[int]], model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Ids and mask [B, longest] with the ends aligned, and positions without the padding where `model` takes them."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {name: value.to(device) for name, value in inputs.items()}


def draw_tokens(scores_BV: Tensor, uniform: Sequence[float], sampling: Sampling) -> Tensor:
    """One token per row: the arg-max at temperature 0, else the inverse cumulative distribution at `uniform`.

    The cumulative sum runs in vocabulary order. In rank order, near-ties would swap when another batching moves a
    logit by a rounding error, and the drawn tokens with them.

    Args:
        scores_BV: logits or log-probs.
        uniform: one number in [0, 1) per row.
    """
    if sampling.temperature == 0:
        return scores_BV.float().argmax(dim=1)
    probs_BV = torch.softmax(scores_BV.double() / sampling.temperature, dim=1)
    if sampling.top_p < 1:
        ranked_BV, order_BV = probs_BV.sort(dim=1, descending=True)
        # nucleus: a token stays when the mass before it is below top_p; the first one always does
        outside_BV = ranked_BV.cumsum(dim=1) - ranked_BV >= sampling.top_p
        probs_BV = probs_BV.masked_fill(torch.zeros_like(outside_BV).scatter(1, order_BV, outside_BV), 0.0)
    cumulative_BV = probs_BV.cumsum(dim=1)
    uniform_B = torch.tensor(uniform, dtype=torch.float64, device=probs_BV.device)
    token_B = torch.searchsorted(cumulative_BV, (uniform_B * cumulative_BV[:, -1])[:, None], right=True)[:, 0]
    return token_B.clamp(max=probs_BV.shape[1] - 1)


class Decoded(NamedTuple):
    """A drawn response: its ids with their stop token, their log-probs at temperature 1 (nats), and how it ended."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


def decode(
    forward: Callable[[dict[str, Any]], tuple[Tensor, Any]],
    inputs: dict[str, Any],
    seeds: Sequence[int],
    sampling: Sampling,
    on_step: Callable[[Tensor, Tensor, list[int]], None] | None = None,
) -> list[Decoded]:
    """Draw a response for every row of `inputs`.

    Every row has its own random numbers, so what it draws depends on its seed and not on the other rows.

    Args:
        forward: from a model's inputs to the scores of the next token [B, V] and the key-value cache.
        inputs: the prompts, as `left_padded` makes them.
        seeds: one per row.
        on_step: called at each step with the scores [b, V], the drawn tokens [b], and the b rows of `inputs` that they
            belong to. Finished rows leave the batch once they are half of it.
    """
    streams = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
    ids: list[list[int]] = [[] for _ in seeds]
    logprobs: list[list[float]] = [[] for _ in seeds]
    stopped: set[int] = set()
    running = list(range(len(seeds)))  # rows of the batch, in the order of the tensors' rows
    for _ in range(sampling.max_new_tokens):
        scores_BV, past = forward(inputs)
        token_B = draw_tokens(scores_BV, [streams[row].random() for row in running], sampling)
        if on_step is not None:
            on_step(scores_BV, token_B, running)
        drawn_B = scores_BV.float().gather(1, token_B[:, None])[:, 0] - scores_BV.float().logsumexp(dim=1)
        for row, token, logprob in zip(running, token_B.tolist(), drawn_B.tolist(), strict=True):
            if row not in stopped:
                ids[row].append(token)
                logprobs[row].append(logprob)
                if token in sampling.stop_token_ids:
                    stopped.add(row)
        if len(stopped) == len(seeds):
            break
        inputs = _next_inputs(inputs, token_B, past)
        kept = [index for index, row in enumerate(running) if row not in stopped]
        if 2 * len(kept) <= len(running):
            running = [running[index] for index in kept]
            inputs = _select_rows(inputs, torch.tensor(kept, device=token_B.device))
    return [Decoded(ids[row], logprobs[row], "stop" if row in stopped else "length") for row in range(len(seeds))]


def _next_inputs(inputs: dict[str, Any], token_B: Tensor, past: Any) -> dict[str, Any]:
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token_B)[:, None]], dim=1)
    following = {"input_ids": token_B[:, None], "attention_mask": mask, "past_key_values": past}
    if "position_ids" in inputs:
        following["position_ids"] = mask.sum(dim=1, keepdim=True) - 1
    return following


def _select_rows(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    inputs["past_key_values"].batch_select_indices(rows)
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}
