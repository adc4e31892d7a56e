"""Inputs of a transformers model that decodes a batch: left padding, and the step after a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def left_padded(
    sequences: Sequence[Sequence[int]], device: torch.device | str, *, takes_positions: bool
) -> dict[str, Any]:
    """Ids and mask [B, longest], the ends lined up; with `takes_positions` also the places without the padding."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_positions:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {name: value.to(device) for name, value in inputs.items()}


def next_inputs(inputs: dict[str, Any], token_B: Tensor, past: Any) -> dict[str, Any]:
    """What follows `inputs` once `token_B` is chosen; `past` is the model's key-value cache."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token_B)[:, None]], dim=1)
    following = {"input_ids": token_B[:, None], "attention_mask": mask, "past_key_values": past}
    if "position_ids" in inputs:
        following["position_ids"] = mask.sum(dim=1, keepdim=True) - 1
    return following
