"""The student at response positions: only those reach the LM head, in chunks, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpkd.core.errors import UserError
from dpkd.distill.objectives.statistics import Positions, Statistic


class StudentScorer(nn.Module):
    """Wraps a causal language model so that its forward pass ends in statistics a position, never in full logits."""

    def __init__(self, model: nn.Module, *, num_tokens: int, logits_chunk: int) -> None:
        super().__init__()
        self.model = model
        self._num_tokens = num_tokens
        self._logits_chunk = logits_chunk

    def forward(
        self,
        input_ids_BS: Tensor,
        attention_mask_BS: Tensor,
        row_T: Tensor,
        predict_T: Tensor,
        fields: dict[str, Tensor],
        statistics: Sequence[Statistic],
        position_ids_BS: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The values of `statistics` at the T positions `(row_T, predict_T)`.

        The mask is [B, S] for right padding, or [B, 1, S, S] with `position_ids_BS` (`SharedPrompts`). `fields` have
        one row a position and are cut into the same chunks.
        """
        decoder = self.model.get_decoder()  # type: ignore[operator]
        positions = {} if position_ids_BS is None else {"position_ids": position_ids_BS}
        hidden_BSD = decoder(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False, **positions)[0]
        return self.evaluate(hidden_BSD[row_T, predict_T], fields, statistics)

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
        # under autocast the head would round its logits to bfloat16: up to 0.1 nats
        with torch.autocast(hidden_CD.device.type, enabled=False):
            logits_CV = head_logits(self.model, hidden_CD).float()
        at = Positions(logits_CV, torch.logsumexp(logits_CV, dim=1), fields, self._num_tokens)
        return {name: value for statistic in statistics for name, value in statistic(at).items()}


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
    """Raise `UserError` unless our way from hidden states to logits is the model's own, on a few tokens."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)[None]
    was_training = model.training
    model.eval()
    theirs = model(input_ids=ids).logits.float()
    if not bool(theirs.isfinite().all()):
        raise UserError(
            "the student's logits are not numbers before the first step",
            found="NaN or infinity",
            expected="finite logits",
            where=name,
            advice="Give a checkpoint whose weights are finite",
        )
    hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0]  # type: ignore[operator]
    ours = head_logits(model, hidden).float()
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
