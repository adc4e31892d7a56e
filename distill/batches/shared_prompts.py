"""A pair as one sequence: the prompt once, then the chosen and the rejected response, hidden from each other.

The rejected response does not see the chosen one, and its positions start again after the prompt. Every log-prob is
that of two separate sequences, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from dpkd.core.errors import UserError, first_line
from dpkd.distill.batches.batch import SharedPrompts
from dpkd.distill.batches.collate import collate
from dpkd.distill.rows.row import TrainingRow
from dpkd.teacher_cache.store.rows import unscored_row


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


@torch.no_grad()
def check_sharing(model: nn.Module, name: str) -> None:
    """Raise `UserError` unless `model` gives a pair with a shared prompt the same hidden states as two sequences."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise _cannot_share(name, f"attention within a window of {window} tokens")
    device = next(model.parameters()).device
    prompt, chosen, rejected = [*range(1, 6)], [*range(6, 9)], [*range(9, 13)]
    rows = [TrainingRow(unscored_row(prompt, chosen), unscored_row(prompt, rejected))]
    batch, shared = collate(rows, with_distributions=False).to(device), share_prompts(rows).to(device)
    was_training = model.training
    model.eval()
    decoder = model.get_decoder()  # type: ignore[operator]
    apart_BSD = decoder(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False)[0]
    try:
        shared_BSD = decoder(
            input_ids=shared.input_ids_PS,
            attention_mask=shared.mask(),
            position_ids=shared.position_ids_PS,
            use_cache=False,
        )[0]
    except (TypeError, ValueError, RuntimeError) as error:
        raise _cannot_share(name, f"{type(error).__name__}: {first_line(error)[:120]}") from None
    finally:
        model.train(was_training)
    apart_TD = apart_BSD[batch.row_T, batch.predict_T]
    gap = float((shared_BSD[shared.row_T, shared.predict_T] - apart_TD).abs().max())
    if not gap <= 1e-3 * max(1.0, float(apart_TD.abs().max())):
        raise _cannot_share(name, f"hidden states that differ by {gap:.3g}")


def _cannot_share(name: str, found: str) -> UserError:
    return UserError(
        "this student cannot read a prompt once for two responses",
        found=found,
        expected="the hidden states of two separate sequences",
        where=name,
        advice="Leave out share_prompt",
    )
