"""A pair as one sequence: the prompt once, then the chosen and the rejected response, hidden from each other.

The rejected response does not see the chosen one, and its positions start again after the prompt. Every log-prob is
that of two separate sequences, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dpkd.distill.batches.batch import SharedPrompts
from dpkd.distill.rows.row import TrainingRow


def share_prompts(rows: Sequence[TrainingRow]) -> SharedPrompts:
    """The sequences of `rows`, whose rejected responses must answer the same prompt as the chosen ones."""
    parts = []
    for row in rows:
        assert row.rejected is not None
        assert np.array_equal(row.chosen.prompt_ids, row.rejected.prompt_ids), row.chosen.example_id
        parts.append((row.chosen.prompt_ids, row.chosen.response_ids, row.rejected.response_ids))
    prompt_P, chosen_P, rejected_P = (np.array([len(ids) for ids in column]) for column in zip(*parts, strict=True))
    start_P = prompt_P + chosen_P  # of the rejected responses
    length_P = start_P + rejected_P
    index_PS = np.broadcast_to(np.arange(int(length_P.max())), (len(parts), int(length_P.max())))
    input_ids_PS = np.zeros(index_PS.shape, np.int64)
    for index, ids in enumerate(parts):
        input_ids_PS[index, : length_P[index]] = np.concatenate(ids)
    position_PS = np.where(index_PS >= start_P[:, None], index_PS - chosen_P[:, None], index_PS)
    position_PS = np.where(index_PS < length_P[:, None], position_PS, 0)
    # the first token of both responses is predicted from the prompt's last token
    chosen = [prompt - 1 + np.arange(num) for prompt, num in zip(prompt_P, chosen_P, strict=True)]
    rejected = [
        np.concatenate([[prompt - 1], start + np.arange(num - 1)])
        for prompt, start, num in zip(prompt_P, start_P, rejected_P, strict=True)
    ]
    rows_P = np.arange(len(parts))
    return SharedPrompts(
        input_ids_PS=torch.from_numpy(input_ids_PS),
        position_ids_PS=torch.from_numpy(position_PS),
        prompt_P=torch.from_numpy(prompt_P),
        chosen_P=torch.from_numpy(chosen_P),
        length_P=torch.from_numpy(length_P),
        row_T=torch.from_numpy(np.concatenate([np.repeat(rows_P, chosen_P), np.repeat(rows_P, rejected_P)])),
        predict_T=torch.from_numpy(np.concatenate([*chosen, *rejected]).astype(np.int64)),
    )
