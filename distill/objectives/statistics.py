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


#: Values by name, one a position, of a chunk. It may run twice on the same chunk (gradient checkpointing).
Statistic = Callable[[Positions], dict[str, Tensor]]


def batch_fields(batch: Batch) -> dict[str, Tensor]:
    """The per-position inputs that a batch has: the response's tokens, and the cached distributions if it has any."""
    fields = {"target_id": batch.target_T}
    entries = {
        "entry_ids": batch.entry_ids_TK,
        "entry_logprobs": batch.entry_logprobs_TK,
        "entry_counts": batch.entry_counts_T,
        "log_tail": batch.log_tail_T,
    }
    return fields | {name: value for name, value in entries.items() if value is not None}


def target_logprob(at: Positions) -> dict[str, Tensor]:
    """`target`: log q of the response's token (nats)."""
    return {"target": at.logprob(at.fields["target_id"])}


def argmax_pair(at: Positions) -> dict[str, Tensor]:
    """`chosen`: log q of the teacher's most likely token; `rejected_id`, `rejected`: the student's, and its log q."""
    # entries are in rank order: the first is the teacher's arg-max
    chosen, rejected = at.logprob(at.fields["entry_ids"][:, 0]), at.logprob(at.argmax_C)
    return {"chosen": chosen, "rejected": rejected, "rejected_id": at.argmax_C}


@dataclass(frozen=True)
class Outcomes:
    """Teacher and student as log-distributions over the same outcomes at each position; how, says `tail` (`align`).

    `vocab_size` is the number of ids that the teacher's distribution is over. `temperature` is that of both sides
    among the kept entries.
    """

    tail: Tail
    vocab_size: int
    temperature: float = 1.0

    def __call__(self, at: Positions) -> tuple[Float[Tensor, "C N"], Float[Tensor, "C N"]]:
        """log p and log q, both normalised; log q is differentiable."""
        fields, logits_CV = at.fields, at.logits_CV
        if self.tail == "uniform" or fields["entry_ids"].shape[1] >= self.vocab_size:
            # ids that pad a wider student's vocabulary would be outcomes on which the teacher has no mass
            logits_CV = logits_CV[:, : self.vocab_size]
        entries = (fields["entry_ids"], fields["entry_logprobs"], fields["entry_counts"], fields["log_tail"])
        return align(logits_CV, *entries, self.tail, vocab_size=self.vocab_size, temperature=self.temperature)


@dataclass(frozen=True)
class FunctionOfOutcomes:
    """Value `name`: `function` of log p and log q over the outcomes at each position, such as a divergence."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    outcomes: Outcomes

    def __call__(self, at: Positions) -> dict[str, Tensor]:
        return {self.name: self.function(*self.outcomes(at))}


@dataclass(frozen=True)
class OutcomeLogprobs:
    """`log_p` and `log_q` over the outcomes at each position, [C, N]: for terms that need a whole response first."""

    outcomes: Outcomes

    def __call__(self, at: Positions) -> dict[str, Tensor]:
        log_p_CN, log_q_CN = self.outcomes(at)
        return {"log_p": log_p_CN, "log_q": log_q_CN}


@dataclass(frozen=True)
class DrawnOutcomes:
    """An outcome drawn from the teacher and one from the student at each position, by the fields `uniform_chosen` and
    `uniform_rejected`: log q of both (`chosen`, `rejected`), log p of both (`teacher_chosen`, `teacher_rejected`), and
    whether they are the `same`. The tail is one outcome that can be drawn.
    """

    outcomes: Outcomes

    def __call__(self, at: Positions) -> dict[str, Tensor]:
        log_p_CN, log_q_CN = self.outcomes(at)
        chosen_C1 = _draw(log_p_CN, at.fields["uniform_chosen"])
        rejected_C1 = _draw(log_q_CN.detach(), at.fields["uniform_rejected"])
        return {
            f"{side}{name}": logs_CN.gather(1, drawn_C1)[:, 0]
            for side, logs_CN in (("", log_q_CN), ("teacher_", log_p_CN))
            for name, drawn_C1 in (("chosen", chosen_C1), ("rejected", rejected_C1))
        } | {"same": (chosen_C1 == rejected_C1)[:, 0]}


def _draw(logs_CN: Tensor, uniform_C: Tensor) -> Tensor:
    cumulative_CN = logs_CN.exp().cumsum(dim=1)
    drawn_C1 = (uniform_C * cumulative_CN[:, -1])[:, None]
    index_C1 = torch.searchsorted(cumulative_CN, drawn_C1, right=True)
    # rounding must not reach an outcome without mass at the end
    last_C1 = (cumulative_CN < cumulative_CN[:, -1:]).sum(dim=1, keepdim=True)
    return torch.minimum(index_C1, last_C1)


def log_rest(logprobs_CK: Float[Tensor, "C K"]) -> Float[Tensor, " C"]:
    """Log of the mass outside some outcomes, at least 1e-7: float32 cannot tell less from 0 in a sum of 1."""
    return (1 - logprobs_CK.exp().sum(dim=1)).clamp(min=1e-7).log()


@torch.no_grad()
def distance_from_teacher(at: Positions) -> dict[str, Tensor]:
    """`kld`, KL(p || q), and `rkld`, KL(q || p), with the tail as one outcome: lower bounds of the full ones (nats).

    Neither is there without cached distributions.
    """
    if "entry_ids" not in at.fields:
        return {}
    ids_CK, log_p_CK = at.fields["entry_ids"], at.fields["entry_logprobs"]
    log_q_CK = at.logits_CV.gather(1, ids_CK.clamp(min=0)) - at.log_sum_C[:, None]
    log_q_CK = log_q_CK.masked_fill(ids_CK < 0, -torch.inf)
    # nothing is left where every token is kept
    log_tail_C = log_rest(log_q_CK).masked_fill(torch.isneginf(at.fields["log_tail"]), -torch.inf)
    # the stored logs are rounded, so their sum is a little off 1 and a divergence could come out below 0
    log_p_CN = torch.log_softmax(torch.cat([log_p_CK, at.fields["log_tail"][:, None]], dim=1), dim=1)
    log_q_CN = torch.log_softmax(torch.cat([log_q_CK, log_tail_C[:, None]], dim=1), dim=1)
    return {"kld": forward_kl(log_p_CN, log_q_CN), "rkld": reverse_kl(log_p_CN, log_q_CN)}


@torch.no_grad()
def entropy_and_agreement(at: Positions) -> dict[str, Tensor]:
    """`entropy` of the student (nats); with cached distributions also `top1_agreement`. Reads the whole vocabulary.

    `top1_agreement` is 1 where teacher and student have the same most likely token, else 0.
    """
    share_CV = (at.logits_CV - at.log_sum_C[:, None]).exp_()
    # a logit of -inf has no share: 0 x -inf would be NaN
    mean_C = torch.linalg.vecdot(share_CV, at.logits_CV.clamp(min=torch.finfo(at.logits_CV.dtype).min))
    values = {"entropy": at.log_sum_C - mean_C}
    if "entry_ids" in at.fields:
        values["top1_agreement"] = (at.argmax_C == at.fields["entry_ids"][:, 0]).float()
    return values
