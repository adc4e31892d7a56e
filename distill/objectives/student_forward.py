"""The student at response positions: only those reach the LM head, in chunks, in float32; what it must be for that."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpkd.core.errors import UserError, first_line
from dpkd.distill.batches.collate import collate
from dpkd.distill.batches.shared_prompts import share_prompts
from dpkd.distill.objectives.statistics import Positions, Statistic
from dpkd.distill.rows.row import TrainingRow
from dpkd.teacher_cache.store.rows import unscored_row


class StudentScorer(nn.Module):
    """Wraps a causal language model so that its forward pass ends in statistics a position, never in full logits."""

    def __init__(self, model: nn.Module, *, num_tokens: int, logits_chunk: int = 1024) -> None:
        super().__init__()
        self.model = model
        self._num_tokens = num_tokens
        self._logits_chunk = logits_chunk

    def forward(
        self,
        input_ids_BS: Tensor,
        row_T: Tensor,
        predict_T: Tensor,
        fields: dict[str, Tensor],
        statistics: Sequence[Statistic],
        attention_mask_B1SS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The values of `statistics` at the T positions of `hidden_at`.

        `fields` have one row a position and are cut into the same chunks.
        """
        hidden_TD = hidden_at(self.model, input_ids_BS, row_T, predict_T, attention_mask_B1SS, position_ids_BS)
        return self.evaluate(hidden_TD, fields, statistics)

    def evaluate(
        self, hidden_TD: Tensor, fields: dict[str, Tensor], statistics: Sequence[Statistic]
    ) -> dict[str, Tensor]:
        """The values of `statistics` on the logits of hidden states, chunk by chunk."""
        chunk = self._logits_chunk
        # with one chunk the logits are kept for the backward pass; with more they are computed again, chunk by chunk
        recompute = torch.is_grad_enabled() and hidden_TD.shape[0] > chunk
        evaluate = partial(checkpoint, self._evaluate_chunk, use_reentrant=False) if recompute else self._evaluate_chunk
        parts: list[dict[str, Tensor]] = []
        for start in range(0, hidden_TD.shape[0], chunk):
            piece = slice(start, start + chunk)
            parts.append(evaluate(hidden_TD[piece], {name: value[piece] for name, value in fields.items()}, statistics))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _evaluate_chunk(
        self, hidden_CD: Tensor, fields: dict[str, Tensor], statistics: Sequence[Statistic]
    ) -> dict[str, Tensor]:
        # under autocast the head would round its logits to bfloat16, up to 0.1 nats, and a sum over pairs its terms
        with torch.autocast(hidden_CD.device.type, enabled=False):
            logits_CV = head_logits(self.model, hidden_CD).float()
            at = Positions(logits_CV, torch.logsumexp(logits_CV, dim=1), fields, self._num_tokens)
            return {name: value for statistic in statistics for name, value in statistic(at).items()}


def hidden_at(
    model: nn.Module,
    input_ids_BS: Tensor,
    row_T: Tensor,
    predict_T: Tensor,
    attention_mask_B1SS: Tensor | None = None,
    position_ids_BS: Tensor | None = None,
) -> Tensor:
    """The model's last hidden states [T, D] at the positions `(row_T, predict_T)`.

    Mask and position ids are for shared prompts (`SharedPrompts`). Sequences that are padded on the right need neither:
    no token attends to what follows it. Without a mask the attention's fast kernels run, and no layer keeps one.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    shared = {}
    if attention_mask_B1SS is not None:
        shared = {"attention_mask": attention_mask_B1SS, "position_ids": position_ids_BS}
    hidden_BSD = decoder(input_ids=input_ids_BS, use_cache=False, **shared)[0]
    hidden_TD: Tensor = hidden_BSD[row_T, predict_T]
    return hidden_TD


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The model's logits from its last hidden states, with what its family does to them after the head.

    In the number type of the head's weights.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    logits: Tensor = head(hidden.to(head.weight.dtype))
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_head(model: nn.Module, name: str) -> None:
    """Raise `UserError` unless our way to logits is the model's own on a few tokens: its head, padding not masked."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0  # three tokens of padding
    was_training = model.training
    model.eval()
    theirs = model(input_ids=ids, attention_mask=mask).logits.float()[mask.bool()]
    if not bool(theirs.isfinite().all()):
        raise UserError(
            "the student's logits are not numbers before the first step",
            found="NaN or infinity",
            expected="finite logits",
            where=name,
            advice="Give a checkpoint whose weights are finite",
        )
    hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0]  # type: ignore[operator]
    ours = head_logits(model, hidden).float()[mask.bool()]
    model.train(was_training)
    gap = float((ours - theirs).abs().max())
    if not gap <= 1e-3 * max(1.0, float(theirs.abs().max())):
        raise UserError(
            "the student's architecture changes its logits in a way that is not known here",
            found=f"logits off by {gap:.3g}",
            expected="equal logits",
            where=name,
            advice="Please report the model's architecture",
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
    was_training = model.training
    model.eval()
    apart_TD = hidden_at(model, **collate(rows, with_distributions=False).to(device).sequences)
    try:
        shared_TD = hidden_at(model, **share_prompts(rows).to(device).sequences)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _cannot_share(name, f"{type(error).__name__}: {first_line(error)[:120]}") from None
    finally:
        model.train(was_training)
    gap = float((shared_TD - apart_TD).abs().max())
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
