"""The terms of an objective: each says which statistics of the student it needs and turns them into unreduced losses.

To add a term, write its class here and name it in `make_terms`. A new divergence or preference form needs neither: it
is a row of the table in `losses.divergence` or `losses.preference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from dpkd.distill.batches.batch import Batch
from dpkd.distill.losses.cached_distributions import Tail, cached_logprobs
from dpkd.distill.losses.divergence import DIVERGENCES, cross_entropy_to, forward_kl, reverse_kl
from dpkd.distill.losses.policy_gradient import minillm_loss
from dpkd.distill.losses.preference import (
    PreferenceOptions,
    implicit_reward,
    sequence_preference_loss,
    sum_by_row,
    token_preference_loss,
)
from dpkd.distill.objectives.statistics import DivergenceFromTeacher, Statistic, target_logprob, token_pair
from dpkd.distill.options.train import TrainConfig


@dataclass(frozen=True)
class TermValues:
    """What a term makes of a batch: `loss` with a gradient, one value a position or a pair, and metrics without one.

    Each metric is averaged over its own length.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Term(Protocol):
    """A term of an objective. `source` is the part of a micro-batch that it reads: cached rows or the text corpus."""

    source: Literal["rows", "corpus"]

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics of the student's logits that it reads."""
        ...

    def fields(self, batch: Batch) -> dict[str, Tensor]:
        """Per-position inputs of its statistics that the batch itself does not have."""
        ...

    def count(self, batch: Batch) -> int:
        """How many values its loss has on `batch`."""
        ...

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues | None:
        """Its unreduced loss; None where `batch` lacks what it compares. `values` are the statistics and the fields."""
        ...


@dataclass(frozen=True)
class _PositionTerm:
    """A term with one value a position of the chosen responses."""

    source: Literal["rows", "corpus"] = "rows"

    def fields(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def count(self, batch: Batch) -> int:
        return int(batch.num_tokens_B[: batch.num_chosen].sum())


@dataclass(frozen=True)
class CrossEntropy(_PositionTerm):
    """-log q of the tokens of the chosen responses, or of the corpus (the paper's L_pt)."""

    needs = (target_logprob,)

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        return TermValues(-values["target"][batch.row_T < batch.num_chosen])


@dataclass(frozen=True, kw_only=True)
class Divergence(_PositionTerm):
    """A divergence from the cached distribution at each position of the chosen responses."""

    divergence: Callable[[Tensor, Tensor], Tensor]
    tail: Tail
    vocab_size: int

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (DivergenceFromTeacher("divergence", self.divergence, self.tail, self.vocab_size),)

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        return TermValues(values["divergence"][batch.row_T < batch.num_chosen])


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(_PositionTerm):
    """MiniLLM's policy gradient on the student's own responses."""

    vocab_size: int
    length_normalize: bool

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (target_logprob, DivergenceFromTeacher("single_step", reverse_kl, "bucket", self.vocab_size))

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        assert batch.teacher_logprob_T is not None
        loss_T = minillm_loss(
            values["target"],
            batch.teacher_logprob_T,
            batch.row_T,
            batch.num_tokens_B,
            values["single_step"],
            length_normalize=self.length_normalize,
        )
        return TermValues(loss_T)


@dataclass(frozen=True, kw_only=True)
class TokenPreference(_PositionTerm):
    """The preference between a token of the teacher and one of the student at each position (the released code)."""

    form: str
    options: PreferenceOptions
    teacher_token: Literal["argmax", "response", "sample"]
    student_token: Literal["argmax", "sample"]
    vocab_size: int

    needs = (token_pair,)

    def fields(self, batch: Batch) -> dict[str, Tensor]:
        """`chosen_id` and `teacher_chosen`: the teacher's token and its log p; `uniform`: for the student's draw."""
        assert batch.entry_ids_TK is not None
        assert batch.entry_logprobs_TK is not None
        if self.teacher_token == "response":
            assert batch.teacher_logprob_T is not None
            fields = {"chosen_id": batch.target_T, "teacher_chosen": batch.teacher_logprob_T}
        else:
            # entries are in rank order: the first is the teacher's arg-max
            index_T = torch.zeros_like(batch.target_T)
            if self.teacher_token == "sample":
                cumulative_TK = batch.entry_logprobs_TK.exp().cumsum(dim=1)
                drawn_T = torch.rand(batch.num_positions).to(cumulative_TK.device) * cumulative_TK[:, -1]
                index_T = torch.searchsorted(cumulative_TK, drawn_T[:, None], right=True)[:, 0]
                index_T = torch.minimum(index_T, cast(Tensor, batch.entry_counts_T) - 1)
            fields = {
                "chosen_id": batch.entry_ids_TK.gather(1, index_T[:, None])[:, 0],
                "teacher_chosen": batch.entry_logprobs_TK.gather(1, index_T[:, None])[:, 0],
            }
        if self.student_token == "sample":
            fields["uniform"] = torch.rand(batch.num_positions).to(batch.target_T.device)
        return fields

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        entries = (batch.entry_ids_TK, batch.entry_logprobs_TK, batch.entry_counts_T, batch.log_tail_T)
        teacher_rejected_T, miss_T = cached_logprobs(
            values["rejected_id"], *(cast(Tensor, tensor) for tensor in entries), self.vocab_size
        )
        student_T, teacher_T = (values["chosen"], values["rejected"]), (values["teacher_chosen"], teacher_rejected_T)
        loss_T = token_preference_loss(self.form, *student_T, *teacher_T, options=self.options)
        chosen_T, rejected_T = (
            self.options.beta * (q_T.detach() - p_T) for q_T, p_T in zip(student_T, teacher_T, strict=True)
        )
        metrics = preference_metrics(chosen_T, rejected_T) | {
            "teacher_miss_rate": miss_T.float(),
            "zero_gradient_share": (values["rejected_id"] == values["chosen_id"]).float(),
        }
        return TermValues(loss_T, metrics)


@dataclass(frozen=True)
class SequencePreference:
    """The preference between the teacher's and the student's whole response (Eq. 9), one value a pair."""

    form: str
    options: PreferenceOptions
    source: Literal["rows", "corpus"] = "rows"

    needs = (target_logprob,)

    def fields(self, batch: Batch) -> dict[str, Tensor]:
        return {}

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
        loss_B = sequence_preference_loss(self.form, *of_pairs, options=self.options)
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


def make_terms(config: TrainConfig, vocab_size: int) -> dict[str, Term]:
    """The terms that `config` weighs, by name; `vocab_size` is the number of ids that teacher and student share."""
    options = PreferenceOptions(
        beta=config.beta,
        gamma=config.gamma,
        dpop_lambda=config.dpop_lambda,
        label_smoothing=config.label_smoothing,
        length_normalize=config.length_normalize,
    )

    def preference() -> Term:
        if config.needs_pairs:
            return SequencePreference(config.objective, options)
        tokens = (config.teacher_token, config.student_token)
        return TokenPreference(
            form=config.objective, options=options, teacher_token=tokens[0], student_token=tokens[1],
            vocab_size=vocab_size,
        )  # fmt: skip

    def divergence() -> Term:
        # with another objective than a divergence, the `kd` term is the forward KL; of `kd`, the cross-entropy H(p, q)
        function: Callable[[Tensor, Tensor], Tensor] = forward_kl
        if config.objective == "kd":
            function = cross_entropy_to
        elif config.objective in DIVERGENCES:
            function = DIVERGENCES[config.objective].bind(config)
        return Divergence(divergence=function, tail=config.tail, vocab_size=vocab_size)

    makers: dict[str, Callable[[], Term]] = {
        "dpkd": preference,
        "sft": CrossEntropy,
        "kd": divergence,
        "lm": lambda: CrossEntropy("corpus"),
        "minillm": lambda: PolicyGradient(vocab_size=vocab_size, length_normalize=config.length_normalize),
    }
    return {name: makers[name]() for name in config.weights}
