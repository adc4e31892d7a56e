"""What is read from the student's logits at each response position, for the terms of an objective and for its log."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dpkd.distill.batches.batch import Batch
from dpkd.distill.objectives.divergence import align, cross_entropy_to, divergence, forward_kl, reverse_kl
from dpkd.distill.objectives.student_forward import Positions
from dpkd.distill.options.train import TrainConfig

_SMALLEST_MASS = 1e-7  # what float32 can tell from 0 beside a sum of 1


def distribution_fields(batch: Batch) -> dict[str, Tensor]:
    """The cached distributions of `batch` by name; nothing where it carries none."""
    if batch.entry_ids_TK is None:
        return {}
    assert batch.entry_logprobs_TK is not None
    assert batch.entry_counts_T is not None
    assert batch.log_tail_T is not None
    return {
        "entry_ids": batch.entry_ids_TK,
        "entry_logprobs": batch.entry_logprobs_TK,
        "entry_counts": batch.entry_counts_T,
        "log_tail": batch.log_tail_T,
    }


class Reading:
    """Reads what the terms `names` of `config` need: see `StudentScorer.forward`.

    Values (nats, one a position): `target`, log q of the response's token; `chosen` and `own`, log q of the field
    `chosen` and of the student's own token `own_id` (its arg-max, or its draw at the field `uniform`); `kd`, the
    divergence from the cached distribution; `single_step`, the exact reverse KL that minillm adds.
    """

    def __init__(self, config: TrainConfig, vocab_size: int, names: frozenset[str]) -> None:
        self._config, self._vocab_size, self._names = config, vocab_size, names

    def __call__(self, at: Positions) -> dict[str, Tensor]:
        """The values at the chunk of positions `at`."""
        values = {"target": at.logprob(at.fields["target"])}
        if "chosen" in at.fields:
            own_C = at.own_token(at.fields.get("uniform"))
            values |= {"chosen": at.logprob(at.fields["chosen"]), "own": at.logprob(own_C), "own_id": own_C}
        if "kd" in self._names:
            values["kd"] = self._divergence(at)
        if "minillm" in self._names:
            log_p_CN, log_q_CN = self._aligned(at, "remainder")
            values["single_step"] = reverse_kl(log_p_CN, log_q_CN)
        return values | measured(at)

    def _divergence(self, at: Positions) -> Tensor:
        config = self._config
        log_p_CN, log_q_CN = self._aligned(at, "remainder" if config.tail == "bucket" else config.tail)
        if config.objective == "kd":
            return cross_entropy_to(log_p_CN, log_q_CN)
        # a preference with a divergence beside it takes the forward one
        return divergence(
            config.divergence,
            log_p_CN,
            log_q_CN,
            jsd_beta=config.jsd_beta,
            akl_mu=config.akl_mu,
            skew_alpha=config.skew_alpha,
            last_is_remainder=config.tail == "bucket",
        )

    def _aligned(self, at: Positions, outside: str) -> tuple[Tensor, Tensor]:
        fields, logits_CV = at.fields, at.logits_CV
        if outside == "uniform" or fields["entry_ids"].shape[1] >= self._vocab_size:
            # a wider student's padding would be an outcome on which the teacher has no mass, not a share of the rest
            logits_CV = logits_CV[:, : self._vocab_size]
        return align(
            logits_CV,
            fields["entry_ids"],
            fields["entry_logprobs"],
            fields["entry_counts"],
            fields["log_tail"],
            outside,  # type: ignore[arg-type]
            vocab_size=self._vocab_size,
        )


@torch.no_grad()
def measured(at: Positions) -> dict[str, Float[Tensor, " C"]]:
    """What the log shows of each position: the student's entropy; with cached distributions KL(p || q) and KL(q || p).

    The divergences take the tokens outside the kept entries as one bucket, so they are lower bounds of the true ones.
    `agrees` is 1 where the student's likeliest token is the teacher's.
    """
    values = {"entropy": at.entropy()}
    if "entry_ids" not in at.fields:
        return values
    ids_CK, log_p_CK = at.fields["entry_ids"], at.fields["entry_logprobs"]
    log_q_CK = at.logits_CV.gather(1, ids_CK.clamp(min=0)) - at.log_sum_C[:, None]
    log_q_CK = log_q_CK.masked_fill(ids_CK < 0, -torch.inf)
    rest_C = (1 - log_q_CK.exp().sum(dim=1)).clamp(min=_SMALLEST_MASS).log()
    rest_C = rest_C.masked_fill(torch.isneginf(at.fields["log_tail"]), -torch.inf)  # every token is an entry
    # the grid of the stored logs leaves a sum a little off 1, and a divergence could come out below 0
    log_p_CN = torch.log_softmax(torch.cat([log_p_CK, at.fields["log_tail"][:, None]], dim=1), dim=1)
    log_q_CN = torch.log_softmax(torch.cat([log_q_CK, rest_C[:, None]], dim=1), dim=1)
    values["kld"] = forward_kl(log_p_CN, log_q_CN)
    values["rkld"] = reverse_kl(log_p_CN, log_q_CN)
    values["agrees"] = (at.own_token() == ids_CK[:, 0]).float()
    return values
