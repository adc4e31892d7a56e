"""Terms that read the student's own responses as samples: MiniLLM and DistiLLM-2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkd.distill.batches.batch import Batch
from dpkd.distill.losses.divergence import reverse_kl, skew_by_gap, skewed_forward_kl, skewed_reverse_kl
from dpkd.distill.losses.policy_gradient import minillm_loss
from dpkd.distill.losses.preference import sum_by_row
from dpkd.distill.objectives.statistics import (
    FunctionOfOutcomes,
    OutcomeLogprobs,
    Outcomes,
    Statistic,
    target_logprob,
)
from dpkd.distill.objectives.term import Term, TermValues


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Term):
    """MiniLLM's policy gradient on the student's own responses."""

    vocab_size: int
    clip: float
    length_normalize: bool

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (target_logprob, FunctionOfOutcomes("single_step", reverse_kl, Outcomes("bucket", self.vocab_size)))

    def count(self, batch: Batch) -> int:
        return 0 if batch.sampling_logprob_T is None else super().count(batch)

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues | None:
        if batch.sampling_logprob_T is None:  # validation rows, which the student did not draw
            return None
        assert batch.teacher_logprob_T is not None
        loss_T = minillm_loss(
            values["target"],
            batch.teacher_logprob_T,
            batch.sampling_logprob_T,
            batch.num_tokens_B,
            values["single_step"],
            clip=self.clip,
            length_normalize=self.length_normalize,
        )
        moved_T = ((values["target"].detach() - batch.sampling_logprob_T).exp() - 1).abs() > self.clip
        return TermValues(loss_T, {"clipped_share": moved_T.float()})


@dataclass(frozen=True, kw_only=True)
class Contrast(Term):
    """DistiLLM-2 (arXiv 2503.07067): skewed forward KL on the teacher's response, skewed reverse KL on the student's.

    One value a pair, (2 - b) of the first plus b of the second, each the mean over its response. b is 1, or with
    `schedule` rises from 1 to 1.5 over the first half of the run. The skew is `alpha`, or that of `skew_by_gap` where
    `anchors` has an anchor for the teacher's responses (the first) or for the student's (the second).

    # differs from the authors' code: the reverse KL is differentiated through its mixture too. Their schedule and their
    # skew by gap are switched off there
    """

    outcomes: Outcomes
    alpha: float
    anchors: tuple[float | None, float | None]
    schedule: bool

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (target_logprob, OutcomeLogprobs(self.outcomes))

    def count(self, batch: Batch) -> int:
        return batch.num_rows - batch.num_chosen

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues | None:
        pairs, row_T = batch.num_chosen, batch.row_T
        if batch.num_rows == pairs:  # validation rows without a student's response
            return None
        gap_B = self._gaps(values["target"].detach(), batch)
        skew_B = torch.full_like(gap_B, self.alpha)
        for rows, anchor in zip((slice(pairs), slice(pairs, None)), self.anchors, strict=True):
            if anchor is not None:
                skew_B[rows] = skew_by_gap(gap_B[rows], anchor, self.alpha)
        chosen_T, skew_T = row_T < pairs, skew_B[row_T]
        log_p_TN, log_q_TN = values["log_p"], values["log_q"]
        distance_T = torch.cat(
            [
                skewed_forward_kl(log_p_TN[chosen_T], log_q_TN[chosen_T], skew_T[chosen_T]),
                skewed_reverse_kl(log_p_TN[~chosen_T], log_q_TN[~chosen_T], skew_T[~chosen_T]),
            ]
        )
        distance_B = sum_by_row(distance_T, row_T, batch.num_rows) / batch.num_tokens_B
        weight = 1 + 0.5 * min(1.0, 2 * batch.progress) if self.schedule else 1.0
        loss_P = (2 - weight) * distance_B[:pairs] + weight * distance_B[pairs:]
        metrics = {"skew_gap_chosen": gap_B[:pairs], "skew_gap_rejected": gap_B[pairs:], "skew": skew_B}
        return TermValues(loss_P, metrics)

    def _gaps(self, student_T: Tensor, batch: Batch) -> Tensor:
        """By how much the model that a response is from finds its tokens likelier: a geometric mean of each row."""
        assert batch.teacher_logprob_T is not None
        student_B, teacher_B = (
            (sum_by_row(logs_T, batch.row_T, batch.num_rows) / batch.num_tokens_B).exp()
            for logs_T in (student_T, batch.teacher_logprob_T)
        )
        gap_B = teacher_B - student_B
        gap_B[batch.num_chosen :] *= -1
        return gap_B
