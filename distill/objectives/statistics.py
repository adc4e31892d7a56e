"""Per-token statistics of the student's logits: what the terms of an objective and its metrics are computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpkd.distill.batches.batch import Batch
from dpkd.distill.losses.cached_distributions import Tail, align
from dpkd.distill.losses.divergence import forward_kl, reverse_kl

_SMALLEST_MASS = 1e-7  # below this, float32 cannot tell a mass from 0 in a sum of 1


@dataclass(frozen=True)
class Positions:
    """A chunk of C response positions with the student's logits over V ids (float32), in memory only while it is read.

    `fields` are per-position inputs by name (see `batch_fields`). Only the first `num_tokens` of the V logits belong to
    a token; the others pad the vocabulary.
    """

    logits_CV: Float[Tensor, "C V"]
    log_sum_C: Float[Tensor, " C"]
    fields: Mapping[str, Tensor]
    num_tokens: int

    def logprob(self, token_C: Int[Tensor, " C"]) -> Float[Tensor, " C"]:
        """log q of one token a position (nats)."""
        return self.logits_CV.gather(1, token_C[:, None])[:, 0] - self.log_sum_C

    @cached_property
    @torch.no_grad()
    def argmax_C(self) -> Int[Tensor, " C"]:
        """The student's most likely token."""
        return self.logits_CV.detach()[:, : self.num_tokens].argmax(dim=1)

    @torch.no_grad()
    def draw(self, uniform_C: Float[Tensor, " C"]) -> Int[Tensor, " C"]:
        """A token drawn from the student at each position by inversion, given one number in [0, 1) a position."""
        cumulative_CV = torch.softmax(self.logits_CV.detach()[:, : self.num_tokens], dim=1).cumsum(dim=1)
        drawn_C = uniform_C * cumulative_CV[:, -1]
        return torch.searchsorted(cumulative_CV, drawn_C[:, None], right=True)[:, 0].clamp(max=self.num_tokens - 1)

    @torch.no_grad()
    def entropy(self) -> Float[Tensor, " C"]:
        """Entropy of the student's distribution (nats)."""
        logits_CV, log_sum_C = self.logits_CV.detach(), self.log_sum_C.detach()
        share_CV = (logits_CV - log_sum_C[:, None]).exp_()
        return log_sum_C - torch.linalg.vecdot(share_CV, logits_CV)


#: Values by name, one a position, of a chunk. It may run twice on the same chunk (gradient checkpointing).
Statistic = Callable[[Positions], dict[str, Tensor]]


def batch_fields(batch: Batch) -> dict[str, Tensor]:
    """The per-position inputs that a batch has: the response's tokens, and the cached distributions if it has any."""
    fields = {"target_id": batch.target_T}
    if batch.entry_ids_TK is not None:
        assert batch.entry_logprobs_TK is not None
        assert batch.entry_counts_T is not None
        assert batch.log_tail_T is not None
        fields |= {
            "entry_ids": batch.entry_ids_TK,
            "entry_logprobs": batch.entry_logprobs_TK,
            "entry_counts": batch.entry_counts_T,
            "log_tail": batch.log_tail_T,
        }
    return fields


def target_logprob(at: Positions) -> dict[str, Tensor]:
    """`target`: log q of the response's token (nats)."""
    return {"target": at.logprob(at.fields["target_id"])}


def token_pair(at: Positions) -> dict[str, Tensor]:
    """`chosen`: log q of the field `chosen_id`; `rejected_id`, `rejected`: the student's token and its log q (nats).

    The student's token is its arg-max, or a draw if there is a field `uniform`.
    """
    uniform_C = at.fields.get("uniform")
    rejected_C = at.argmax_C if uniform_C is None else at.draw(uniform_C)
    chosen, rejected = at.logprob(at.fields["chosen_id"]), at.logprob(rejected_C)
    return {"chosen": chosen, "rejected": rejected, "rejected_id": rejected_C}


@dataclass(frozen=True)
class DivergenceFromTeacher:
    """Value `name`: the divergence between the cached distribution and the student's, at each position.

    `vocab_size` is the number of ids that the teacher's distribution is over.
    """

    name: str
    divergence: Callable[[Tensor, Tensor], Tensor]
    tail: Tail
    vocab_size: int

    def __call__(self, at: Positions) -> dict[str, Tensor]:
        """The divergence over the outcomes that `tail` makes (see `align`)."""
        fields, logits_CV = at.fields, at.logits_CV
        if self.tail == "uniform" or fields["entry_ids"].shape[1] >= self.vocab_size:
            # ids that pad a wider student's vocabulary would be outcomes on which the teacher has no mass
            logits_CV = logits_CV[:, : self.vocab_size]
        entries = (fields["entry_ids"], fields["entry_logprobs"], fields["entry_counts"], fields["log_tail"])
        log_p_CN, log_q_CN = align(logits_CV, *entries, self.tail, vocab_size=self.vocab_size)
        return {self.name: self.divergence(log_p_CN, log_q_CN)}


@torch.no_grad()
def distance_from_teacher(at: Positions) -> dict[str, Tensor]:
    """`entropy` of the student (nats); with cached distributions also `kld`, `rkld` and `top1_agreement`.

    `kld` is KL(p || q) and `rkld` KL(q || p) with the tail as one outcome: lower bounds of the full ones (nats).
    `top1_agreement` is 1 where teacher and student have the same most likely token, else 0.
    """
    values = {"entropy": at.entropy()}
    if "entry_ids" not in at.fields:
        return values
    ids_CK, log_p_CK = at.fields["entry_ids"], at.fields["entry_logprobs"]
    log_q_CK = at.logits_CV.gather(1, ids_CK.clamp(min=0)) - at.log_sum_C[:, None]
    log_q_CK = log_q_CK.masked_fill(ids_CK < 0, -torch.inf)
    log_tail_C = (1 - log_q_CK.exp().sum(dim=1)).clamp(min=_SMALLEST_MASS).log()
    log_tail_C = log_tail_C.masked_fill(torch.isneginf(at.fields["log_tail"]), -torch.inf)  # every token is kept
    # the stored logs are rounded, so their sum is a little off 1 and a divergence could come out below 0
    log_p_CN = torch.log_softmax(torch.cat([log_p_CK, at.fields["log_tail"][:, None]], dim=1), dim=1)
    log_q_CN = torch.log_softmax(torch.cat([log_q_CK, log_tail_C[:, None]], dim=1), dim=1)
    agreement = (at.argmax_C == ids_CK[:, 0]).float()
    return values | {
        "kld": forward_kl(log_p_CN, log_q_CN),
        "rkld": reverse_kl(log_p_CN, log_q_CN),
        "top1_agreement": agreement,
    }
