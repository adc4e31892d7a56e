"""What a step minimises: terms with weights, each a sum with the count that it is divided by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpkd.distill.batches import Batch
from dpkd.distill.config import TrainConfig
from dpkd.distill.losses import cross_entropy, dpkd_sequence_loss, dpkd_token_loss, implicit_reward, sum_by_row
from dpkd.distill.scoring import TokenScores
from dpkd.distill.teacher_lookup import cached_logprobs

Score = Callable[..., TokenScores]


@dataclass
class StepSums:
    """Sums over a batch. `terms` are differentiable; `metrics` are (sum, count) without gradient."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


class Objective:
    """The objective that a config names, over the positions (or pairs) of a whole step.

    `term_counts` says by how many each term's sum is divided: all response positions of the step for `sft` and the
    token level (the released code's mean), all pairs of the step for the sequence level (Algorithm 1's mean).
    """

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        self._config, self._vocab_size = config, vocab_size
        preference = config.objective == "dpkd"
        self.weights: dict[str, float] = {}
        if preference:
            self.weights["dpkd"] = config.dpkd_weight
        if not preference or config.sft_weight:
            self.weights["sft"] = config.sft_weight if preference else 1.0
        self.needs_distributions = preference and config.level == "token"
        self.needs_pairs = preference and config.level == "sequence"

    def term_counts(self, batch: Batch) -> dict[str, int]:
        """How many positions or pairs of `batch` enter each term."""
        chosen_rows = batch.num_rows // 2 if self.needs_pairs else batch.num_rows
        chosen_positions = int(batch.num_tokens_B[:chosen_rows].sum())
        counts = {"sft": chosen_positions, "dpkd": chosen_rows if self.needs_pairs else chosen_positions}
        return {name: counts[name] for name in self.weights}

    def total(self, sums: StepSums, counts: dict[str, int]) -> Tensor:
        """The weighted loss: each term's sum over its count, which is the whole step's."""
        return torch.stack([self.weights[name] * sums.terms[name] / counts[name] for name in self.weights]).sum()

    def __call__(self, score: Score, batch: Batch) -> StepSums:
        """Sums of every term and metric over `batch`."""
        if batch.num_positions == 0:
            raise ValueError("a batch without response positions")
        if self.needs_pairs:
            return self._sequence(score, batch)
        if self.needs_distributions:
            return self._token(score, batch)
        return self._sft(score, batch)

    def _score(self, score: Score, batch: Batch, chosen_T: Tensor | None = None) -> TokenScores:
        uniform_T = None
        if chosen_T is not None and self._config.student_token == "sample":
            uniform_T = torch.rand(batch.num_positions).to(batch.target_T.device)
        return score(
            batch.input_ids_BS,
            batch.attention_mask_BS,
            batch.row_T,
            batch.predict_T,
            batch.target_T,
            chosen_T,
            uniform_T,
        )

    def _token(self, score: Score, batch: Batch) -> StepSums:
        assert batch.entry_ids_TK is not None
        assert batch.entry_logprobs_TK is not None
        assert batch.entry_counts_T is not None
        assert batch.log_remainder_T is not None
        chosen_T = batch.entry_ids_TK[:, 0]  # entries stand in rank order: the teacher's arg-max
        scores = self._score(score, batch, chosen_T)
        teacher_chosen_T = batch.entry_logprobs_TK[:, 0]
        teacher_own_T, miss_T = cached_logprobs(
            scores.own_T,
            batch.entry_ids_TK,
            batch.entry_logprobs_TK,
            batch.entry_counts_T,
            batch.log_remainder_T,
            self._vocab_size,
        )
        beta = self._config.beta
        loss_T = dpkd_token_loss(scores.chosen_T, scores.own_logprob_T, teacher_chosen_T, teacher_own_T, beta=beta)
        sums = StepSums(terms={"dpkd": loss_T.sum()})
        if "sft" in self.weights:
            sums.terms["sft"] = cross_entropy(scores.target_T).sum()
        chosen_reward_T = beta * (scores.chosen_T.detach() - teacher_chosen_T)
        own_reward_T = beta * (scores.own_logprob_T.detach() - teacher_own_T)
        _add_preference(sums, chosen_reward_T, own_reward_T)
        sums.metrics["teacher_miss_rate"] = (miss_T.float().sum(), batch.num_positions)
        return sums

    def _sequence(self, score: Score, batch: Batch) -> StepSums:
        assert batch.teacher_logprob_T is not None
        pairs, beta, normalize = batch.num_rows // 2, self._config.beta, self._config.length_normalize
        scores = self._score(score, batch)
        student_B = sum_by_row(scores.target_T, batch.row_T, batch.num_rows)
        teacher_B = sum_by_row(batch.teacher_logprob_T, batch.row_T, batch.num_rows)
        num_B = batch.num_tokens_B
        loss_B = dpkd_sequence_loss(
            student_B[:pairs],
            student_B[pairs:],
            teacher_B[:pairs],
            teacher_B[pairs:],
            num_B[:pairs],
            num_B[pairs:],
            beta=beta,
            length_normalize=normalize,
        )
        sums = StepSums(terms={"dpkd": loss_B.sum()})
        if "sft" in self.weights:
            sums.terms["sft"] = cross_entropy(scores.target_T[batch.row_T < pairs]).sum()
        rewards_B = implicit_reward(student_B.detach(), teacher_B, num_B, beta, normalize)
        _add_preference(sums, rewards_B[:pairs], rewards_B[pairs:])
        return sums

    def _sft(self, score: Score, batch: Batch) -> StepSums:
        scores = self._score(score, batch)
        sums = StepSums(terms={"sft": cross_entropy(scores.target_T).sum()})
        if batch.teacher_logprob_T is not None:
            student_B = sum_by_row(scores.target_T.detach(), batch.row_T, batch.num_rows)
            teacher_B = sum_by_row(batch.teacher_logprob_T, batch.row_T, batch.num_rows)
            reward_B = implicit_reward(student_B, teacher_B, batch.num_tokens_B, self._config.beta)
            sums.metrics["reward_chosen"] = (reward_B.sum(), batch.num_rows)
        return sums


def _add_preference(sums: StepSums, chosen: Tensor, rejected: Tensor) -> None:
    count = len(chosen)
    sums.metrics["reward_chosen"] = (chosen.sum(), count)
    sums.metrics["reward_rejected"] = (rejected.sum(), count)
    sums.metrics["reward_margin"] = ((chosen - rejected).sum(), count)
    sums.metrics["preference_accuracy"] = ((chosen > rejected).float().sum(), count)
