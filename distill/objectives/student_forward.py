"""The student at response positions: only those reach the LM head, in chunks, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpkd.core.errors import UserError


@dataclass(frozen=True)
class Positions:
    """A chunk of C positions with the student's logits over V places (float32), alive only while they are read.

    `fields` are the caller's tensors of these positions; `num_tokens` of the V places stand for a token, the others
    pad the vocabulary.
    """

    logits_CV: Float[Tensor, "C V"]
    log_sum_C: Float[Tensor, " C"]
    fields: Mapping[str, Tensor]
    num_tokens: int

    def logprob(self, token_C: Int[Tensor, " C"]) -> Float[Tensor, " C"]:
        """log q of one token a position (nats)."""
        return self.logits_CV.gather(1, token_C[:, None])[:, 0] - self.log_sum_C

    @torch.no_grad()
    def own_token(self, uniform_C: Float[Tensor, " C"] | None = None) -> Int[Tensor, " C"]:
        """The student's arg-max, or its draw at `uniform_C` (one number in [0, 1) a position) where given."""
        if uniform_C is None:
            return self._likeliest_C
        logits_CV = self.logits_CV.detach()[:, : self.num_tokens]
        cumulative_CV = torch.softmax(logits_CV, dim=1).cumsum(dim=1)
        drawn_C = uniform_C * cumulative_CV[:, -1]
        return torch.searchsorted(cumulative_CV, drawn_C[:, None], right=True)[:, 0].clamp(max=logits_CV.shape[1] - 1)

    @cached_property
    def _likeliest_C(self) -> Tensor:
        return self.logits_CV.detach()[:, : self.num_tokens].argmax(dim=1)

    @torch.no_grad()
    def entropy(self) -> Float[Tensor, " C"]:
        """Entropy of the student's distribution (nats)."""
        logits_CV, log_sum_C = self.logits_CV.detach(), self.log_sum_C.detach()
        share_CV = (logits_CV - log_sum_C[:, None]).exp_()
        return log_sum_C - torch.linalg.vecdot(share_CV, logits_CV)


#: What is kept of a chunk: tensors with one value a position.
Read = Callable[[Positions], dict[str, Tensor]]


def read_target(at: Positions) -> dict[str, Tensor]:
    """log q of the field `target`, the response's own token (nats)."""
    return {"target": at.logprob(at.fields["target"])}


class StudentScorer(nn.Module):
    """Wraps a causal language model so that its forward pass ends in values a position, never in full logits."""

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
        read: Read,
        position_ids_BS: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `read` makes of the logits at `(row_T, predict_T)`, over all T positions.

        The mask is [B, S] for right padding, or [B, 1, S, S] with `position_ids_BS` (`SharedPrompts`). `fields`
        hold one row a position and are cut into the same chunks. `read` may run twice on a chunk.
        """
        decoder = self.model.get_decoder()  # type: ignore[operator]
        positions = {} if position_ids_BS is None else {"position_ids": position_ids_BS}
        hidden_BSD = decoder(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False, **positions)[0]
        return self.read(hidden_BSD[row_T, predict_T], fields, read)

    def read(self, hidden_TD: Tensor, fields: dict[str, Tensor], read: Read) -> dict[str, Tensor]:
        """What `read` makes of the logits of hidden states, chunk by chunk."""
        chunk = self._logits_chunk
        # with one chunk the logits are kept for the backward pass; with more they are made again, chunk by chunk
        recompute = torch.is_grad_enabled() and hidden_TD.shape[0] > chunk
        parts: list[dict[str, Tensor]] = []
        for start in range(0, hidden_TD.shape[0], chunk):
            piece = slice(start, start + chunk)
            arguments = (hidden_TD[piece], {name: value[piece] for name, value in fields.items()}, read)
            if recompute:
                parts.append(checkpoint(self._read_chunk, *arguments, use_reentrant=False))
            else:
                parts.append(self._read_chunk(*arguments))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _read_chunk(self, hidden_CD: Tensor, fields: dict[str, Tensor], read: Read) -> dict[str, Tensor]:
        logits_CV = head_logits(self.model, hidden_CD).float()
        return read(Positions(logits_CV, torch.logsumexp(logits_CV, dim=1), fields, self._num_tokens))


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The model's logits from its last hidden states, with what its family does to them after the head."""
    logits: Tensor = model.get_output_embeddings()(hidden)  # type: ignore[operator]
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
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
