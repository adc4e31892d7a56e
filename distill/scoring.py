"""The student's log-probs at response positions: only those reach the LM head, in chunks, in float32."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpkd.teacher_cache.errors import UserError

StudentToken = Literal["argmax", "sample"]


class TokenScores(NamedTuple):
    """At each of T response positions: log q of the target, and of a chosen and of the student's own token if asked.

    `own_T` is the student's own token; the last three are empty when no chosen tokens were given.
    """

    target_T: Tensor
    chosen_T: Tensor
    own_logprob_T: Tensor
    own_T: Tensor


class StudentScorer(nn.Module):
    """Wraps a causal language model so that its forward pass ends in log-probs of tokens, never in full logits."""

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
        target_T: Tensor,
        chosen_T: Tensor | None = None,
        uniform_T: Tensor | None = None,
    ) -> TokenScores:
        """Score `target_T`; with `chosen_T` also those tokens and the student's own.

        The student's own token is its arg-max, or drawn at `uniform_T` (one number in [0, 1) a position) where given.
        """
        decoder = self.model.get_decoder()  # type: ignore[operator]
        hidden_BSD = decoder(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False)[0]
        hidden_TD = hidden_BSD[row_T, predict_T]
        chunk = self._logits_chunk
        # with one chunk the logits are kept for the backward pass; with more they are made again, chunk by chunk
        recompute = torch.is_grad_enabled() and hidden_TD.shape[0] > chunk
        parts = []
        for start in range(0, hidden_TD.shape[0], chunk):
            piece = slice(start, start + chunk)
            arguments = (
                hidden_TD[piece],
                target_T[piece],
                None if chosen_T is None else chosen_T[piece],
                None if uniform_T is None else uniform_T[piece],
            )
            if recompute:
                parts.append(checkpoint(self._score_chunk, *arguments, use_reentrant=False))
            else:
                parts.append(self._score_chunk(*arguments))
        return TokenScores(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _score_chunk(
        self, hidden_CD: Tensor, target_C: Tensor, chosen_C: Tensor | None, uniform_C: Tensor | None
    ) -> TokenScores:
        logits_CV = head_logits(self.model, hidden_CD).float()
        log_sum_C = torch.logsumexp(logits_CV, dim=1)

        def logprob(token_C: Tensor) -> Tensor:
            return logits_CV.gather(1, token_C[:, None])[:, 0] - log_sum_C

        if chosen_C is None:
            nothing = hidden_CD.new_zeros(0, dtype=torch.float32)
            return TokenScores(logprob(target_C), nothing, nothing, nothing.long())
        with torch.no_grad():
            # a padded vocabulary has places that no token stands for
            own_C = _own_token(logits_CV.detach()[:, : self._num_tokens], uniform_C)
        return TokenScores(logprob(target_C), logprob(chosen_C), logprob(own_C), own_C)


def _own_token(logits_CV: Tensor, uniform_C: Tensor | None) -> Tensor:
    if uniform_C is None:
        return logits_CV.argmax(dim=1)
    cumulative_CV = torch.softmax(logits_CV, dim=1).cumsum(dim=1)
    drawn_C = uniform_C * cumulative_CV[:, -1]
    return torch.searchsorted(cumulative_CV, drawn_C[:, None], right=True)[:, 0].clamp(max=logits_CV.shape[1] - 1)


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
