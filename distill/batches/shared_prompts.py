"""A pair's prompt once instead of twice: prompt, chosen and rejected response in one sequence, masked from each other.

The rejected response does not see the chosen one, and its positions start again after the prompt, so that every
log-prob is the one of two sequences of their own, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import Batch, TrainingRow, collate
from dpkd.teacher_cache.store.schema import unscored_row

_PROBE_TOKENS = (5, 3, 4)  # of prompt, chosen and rejected response in `check_sharing`


@dataclass(frozen=True)
class SharedPrompts:
    """P pairs as P sequences, right padded. Response position t of the batch (chosen ones first, then rejected ones) is
    predicted from the hidden state `(row_T[t], predict_T[t])`.
    """

    input_ids_PS: Tensor
    position_ids_PS: Tensor
    prompt_P: Tensor
    chosen_P: Tensor
    length_P: Tensor
    row_T: Tensor
    predict_T: Tensor

    def mask(self) -> Tensor:
        """[P, 1, S, S], true where a query (third dimension) sees a key; padding sees itself alone."""
        place_S = torch.arange(self.input_ids_PS.shape[1], device=self.input_ids_PS.device)
        query, key = place_S[None, :, None], place_S[None, None, :]
        prompt, chosen, length = (value[:, None, None] for value in (self.prompt_P, self.chosen_P, self.length_P))
        hidden = (query >= prompt + chosen) & (key >= prompt) & (key < prompt + chosen)
        inside = (query < length) & (key < length)
        return ((key <= query) & inside & ~hidden | (key == query))[:, None]

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return replace(self, **{item.name: getattr(self, item.name).to(device) for item in fields(self)})


def share_prompts(rows: Sequence[TrainingRow]) -> SharedPrompts:
    """The sequences of `rows`, each with a rejected response to its chosen one's prompt."""
    parts = []
    for row in rows:
        assert row.rejected is not None
        assert np.array_equal(row.chosen.prompt_ids, row.rejected.prompt_ids), row.chosen.example_id
        parts.append((row.chosen.prompt_ids, row.chosen.response_ids, row.rejected.response_ids))
    prompt_P, chosen_P, rejected_P = (np.array([len(part) for part in column]) for column in zip(*parts, strict=True))
    length_P = prompt_P + chosen_P + rejected_P
    place_PS = np.broadcast_to(np.arange(int(length_P.max())), (len(parts), int(length_P.max())))
    input_ids_PS = np.zeros(place_PS.shape, np.int64)
    for place, ids in enumerate(parts):
        input_ids_PS[place, : length_P[place]] = np.concatenate(ids)
    start_P = prompt_P + chosen_P
    position_PS = np.where(place_PS >= start_P[:, None], place_PS - chosen_P[:, None], place_PS)
    position_PS = np.where(place_PS < length_P[:, None], position_PS, 0)
    # both responses' first tokens are predicted from the prompt's last
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
    """Raise `UserError` unless the model gives a shared prompt the hidden states that two sequences have."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise _refused(name, f"attention within a window of {window} tokens")
    device = next(model.parameters()).device
    row = _probe_row()
    batch, shared = collate([row], with_distributions=False).to(device), share_prompts([row]).to(device)
    was_training = model.training
    model.eval()
    decoder = model.get_decoder()  # type: ignore[operator]
    apart_TD = _states(decoder, batch)
    try:
        together_BSD = decoder(
            input_ids=shared.input_ids_PS,
            attention_mask=shared.mask(),
            position_ids=shared.position_ids_PS,
            use_cache=False,
        )[0]
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(name, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
    finally:
        model.train(was_training)
    gap = float((together_BSD[shared.row_T, shared.predict_T] - apart_TD).abs().max())
    if not gap <= 1e-3 * max(1.0, float(apart_TD.abs().max())):
        raise _refused(name, f"hidden states off by {gap:.3g}")


def _states(decoder: nn.Module, batch: Batch) -> Tensor:
    hidden_BSD: Tensor = decoder(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False)[
        0
    ]
    return hidden_BSD[batch.row_T, batch.predict_T]


def _probe_row() -> TrainingRow:
    ids = np.split(np.arange(1, sum(_PROBE_TOKENS) + 1), np.cumsum(_PROBE_TOKENS)[:-1])
    return TrainingRow(unscored_row(ids[0], ids[1]), unscored_row(ids[0], ids[2]))


def _refused(name: str, found: str) -> UserError:
    return UserError(
        "the student cannot read a prompt once for two responses",
        found=found,
        expected="the hidden states of two sequences",
        where=name,
        advice="Leave share_prompt out",
    )
