"""Preferences as terms: between tokens at each position, or between whole responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dpkd.distill.batches.batch import Batch
from dpkd.distill.losses.cached_distributions import cached_logprobs
from dpkd.distill.losses.preference import (
    PreferenceOptions,
    all_pairs_preference_loss,
    implicit_reward,
    sequence_preference_loss,
    sum_by_row,
    token_preference_loss,
)
from dpkd.distill.objectives.statistics import DrawnOutcomes, FunctionOfOutcomes, Outcomes, Statistic, argmax_pair
from dpkd.distill.objectives.term import Term, TermValues


@dataclass(frozen=True, kw_only=True)
class AllPairs(Term):
    """DPKD at each position of the chosen responses, in expectation over all pairs of outcomes."""

    options: PreferenceOptions
    skew: float
    outcomes: Outcomes

    @property
    def needs(self) -> tuple[Statistic, ...]:
        beta, smoothing = self.options.beta, self.options.label_smoothing
        loss = partial(all_pairs_preference_loss, beta=beta, label_smoothing=smoothing, skew=self.skew)
        return (FunctionOfOutcomes("all_pairs", loss, self.outcomes),)

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        chosen_T = batch.row_T < batch.num_chosen
        # the expected rewards are the two divergences that every line has (the tail as one outcome)
        chosen, rejected = -self.options.beta * values["kld"][chosen_T], self.options.beta * values["rkld"][chosen_T]
        rewards = {"reward_chosen": chosen, "reward_rejected": rejected, "reward_margin": chosen - rejected}
        return TermValues(values["all_pairs"][chosen_T], rewards)


@dataclass(frozen=True, kw_only=True)
class DrawnPairs(Term):
    """A preference between an outcome drawn from the teacher and one drawn from the student, at each position."""

    form: str
    options: PreferenceOptions
    outcomes: Outcomes

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (DrawnOutcomes(self.outcomes),)

    def fields(self, batch: Batch) -> dict[str, Tensor]:
        """Numbers in [0, 1) for the two draws."""
        names, device = ("uniform_chosen", "uniform_rejected"), batch.target_T.device
        return {name: torch.rand(batch.num_positions).to(device) for name in names}

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        student_T = (values["chosen"], values["rejected"])
        teacher_T = (values["teacher_chosen"], values["teacher_rejected"])
        return _token_values(self.form, self.options, student_T, teacher_T, values["same"])


@dataclass(frozen=True, kw_only=True)
class ArgmaxPairs(Term):
    """The released code's preference between the most likely tokens of teacher and student at each position."""

    form: str
    options: PreferenceOptions
    vocab_size: int

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (argmax_pair,)

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        entries = (values["entry_ids"], values["entry_logprobs"], values["entry_counts"], values["log_tail"])
        teacher_rejected_T, miss_T = cached_logprobs(values["rejected_id"], *entries, self.vocab_size)
        teacher_T = (values["entry_logprobs"][:, 0], teacher_rejected_T)
        same_T = values["rejected_id"] == values["entry_ids"][:, 0]
        found = _token_values(self.form, self.options, (values["chosen"], values["rejected"]), teacher_T, same_T)
        return TermValues(found.loss, found.metrics | {"teacher_miss_rate": miss_T.float()})


def _token_values(
    form: str,
    options: PreferenceOptions,
    student_T: tuple[Tensor, Tensor],
    teacher_T: tuple[Tensor, Tensor],
    same_T: Tensor,
) -> TermValues:
    loss_T = token_preference_loss(form, *student_T, *teacher_T, options=options)
    chosen_T, rejected_T = (options.beta * (q_T.detach() - p_T) for q_T, p_T in zip(student_T, teacher_T, strict=True))
    return TermValues(loss_T, preference_metrics(chosen_T, rejected_T) | {"zero_gradient_share": same_T.float()})


@dataclass(frozen=True, kw_only=True)
class SequencePreference(Term):
    """The preference between the teacher's and the student's whole response (Eq. 9), one value a pair.

    With `offset`, the margin has log p/q0 of both responses, where q0 drew the student's.
    """

    form: str
    options: PreferenceOptions
    offset: bool

    def count(self, batch: Batch) -> int:
        return batch.num_rows - batch.num_chosen

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues | None:
        pairs = batch.num_chosen
        if batch.num_rows == pairs:  # validation rows without a student's response
            return None
        assert batch.teacher_logprob_T is not None
        student_B = sum_by_row(values["target"], batch.row_T, batch.num_rows)
        teacher_B = sum_by_row(batch.teacher_logprob_T, batch.row_T, batch.num_rows)
        num_B, beta = batch.num_tokens_B, self.options.beta
        of_pairs = [part for tensor in (student_B, teacher_B, num_B) for part in (tensor[:pairs], tensor[pairs:])]
        offset_B = None
        if self.offset:
            assert batch.sampling_logprob_B is not None
            odds_B = teacher_B - batch.sampling_logprob_B
            offset_B = odds_B[:pairs] - odds_B[pairs:]
        loss_B = sequence_preference_loss(self.form, *of_pairs, options=self.options, offset_B=offset_B)
        reward_B = implicit_reward(student_B.detach(), teacher_B, num_B, beta, self.options.length_normalize)
        sum_B = implicit_reward(student_B.detach(), teacher_B, num_B, beta, length_normalize=False)
        sums = {f"{name}_sum": value for name, value in preference_metrics(sum_B[:pairs], sum_B[pairs:]).items()}
        del sums["preference_accuracy_sum"]
        return TermValues(loss_B, preference_metrics(reward_B[:pairs], reward_B[pairs:]) | sums)


def preference_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Implicit rewards of both sides, their difference, and whether the chosen side has the larger one."""
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        "preference_accuracy": (chosen > rejected).float(),
    }
