"""What a step minimises: terms with weights, each a sum with the count that it is divided by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from dpkd.distill.batches.batch import Batch, MicroBatch, narrowed
from dpkd.distill.objectives.policy_gradient import minillm_loss
from dpkd.distill.objectives.preference import (
    PreferenceOptions,
    cross_entropy,
    implicit_reward,
    sequence_preference_loss,
    sum_by_row,
    token_preference_loss,
)
from dpkd.distill.objectives.readings import Reading, distribution_fields
from dpkd.distill.objectives.student_forward import Read, read_target
from dpkd.distill.objectives.teacher_lookup import cached_logprobs
from dpkd.distill.options.objectives import PREFERENCES, PreferenceName
from dpkd.distill.options.train import TrainConfig

#: metrics that every line carries; null where the objective or the cache does not define them
METRICS = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_chosen_sum",
    "reward_rejected_sum",
    "reward_margin_sum",
    "preference_accuracy",
    "kld",
    "rkld",
    "kld_first",
    "rkld_first",
    "entropy",
    "top1_agreement",
    "teacher_miss_rate",
    "zero_gradient_share",
    "chosen_length",
    "rejected_length",
    "unfinished_chosen",
    "unfinished_rejected",
)


class Score(Protocol):
    """`StudentScorer.forward`, wrapped for several devices or not."""

    def __call__(
        self,
        input_ids_BS: Tensor,
        attention_mask_BS: Tensor,
        row_T: Tensor,
        predict_T: Tensor,
        fields: dict[str, Tensor],
        read: Read,
        position_ids_BS: Tensor | None = None,
    ) -> dict[str, Tensor]: ...


@dataclass
class StepSums:
    """Sums over a batch. `terms` are differentiable; `metrics` are (sum, count) without gradient."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


class Objective:
    """The objective that a config names, over the positions (or pairs) of a whole step.

    `term_counts` says by how many each term's sum is divided: response positions of the step for `sft`, `kd`,
    `minillm` and the token level (the released code's mean), pairs of the step for the sequence level (Algorithm 1's
    mean), and the corpus's tokens for `lm`. `vocab_size` is the width of the teacher's logits, `num_logits` that of the
    student's (None: not narrower).
    """

    def __init__(self, config: TrainConfig, vocab_size: int, num_logits: int | None = None) -> None:
        # a student with fewer logits than the teacher reads the cache as if the rest of its ids were not there
        self._num_logits = num_logits if num_logits is not None and num_logits < vocab_size else None
        vocab_size = self._num_logits or vocab_size
        self._config, self._vocab_size = config, vocab_size
        self.weights = {str(name): weight for name, weight in config.weights.items()}
        self.needs_pairs, self.needs_distributions = config.needs_pairs, config.needs_distributions
        self._by_token = config.objective in PREFERENCES and not self.needs_pairs
        self._reading = Reading(config, vocab_size, frozenset(self.weights))
        self._options = PreferenceOptions(
            beta=config.beta,
            gamma=config.gamma,
            dpop_lambda=config.dpop_lambda,
            label_smoothing=config.label_smoothing,
            length_normalize=config.length_normalize,
        )

    def term_counts(self, part: MicroBatch) -> dict[str, int]:
        """How many positions or pairs of `part` enter each term."""
        batch = part.rows
        positions = int(batch.num_tokens_B[: batch.num_chosen].sum())
        counts = dict.fromkeys(self.weights, positions)
        if self.needs_pairs:
            counts["dpkd"] = batch.num_rows - batch.num_chosen
        if part.corpus is not None:
            counts["lm"] = part.corpus.num_positions
        return counts

    def total(self, sums: StepSums, counts: dict[str, int]) -> Tensor:
        """The weighted loss: each term's sum over its count, which is the whole step's."""
        return torch.stack([self.weights[name] * sums.terms[name] / counts[name] for name in self.weights]).sum()

    def __call__(self, score: Score, part: MicroBatch) -> StepSums:
        """Sums of every term and metric over `part`."""
        batch = part.rows
        if batch.num_positions == 0:
            raise ValueError("a batch without response positions")
        if self._num_logits is not None:
            batch = narrowed(batch, self._num_logits)
        sums = StepSums()
        chosen_T = batch.row_T < batch.num_chosen
        fields = {"target": batch.target_T} | distribution_fields(batch)
        if self._by_token:
            fields |= self._token_fields(batch)
        if part.shared is None:
            values = _read(score, batch, fields, self._reading)
        else:
            shared = part.shared
            values = score(
                *(shared.input_ids_PS, shared.mask(), shared.row_T, shared.predict_T),
                fields,
                self._reading,
                shared.position_ids_PS,
            )
        if self._by_token:
            self._token(sums, batch, fields, values)
        if self.needs_pairs:
            self._sequence(sums, batch, values)
        if not self._by_token and not self.needs_pairs:
            self._chosen_reward(sums, batch, values)
        if "sft" in self.weights:
            sums.terms["sft"] = cross_entropy(values["target"][chosen_T]).sum()
        if "kd" in self.weights:
            sums.terms["kd"] = values["kd"][chosen_T].sum()
        if "minillm" in self.weights:
            sums.terms["minillm"] = self._minillm(batch, values)
        if part.corpus is not None:
            text = _read(score, part.corpus, {"target": part.corpus.target_T}, read_target)
            sums.terms["lm"] = cross_entropy(text["target"]).sum()
        _add_measures(sums, batch, values, chosen_T)
        return sums

    def _token_fields(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's token of each position and its log-prob, and where the student's own is drawn."""
        assert batch.entry_ids_TK is not None
        assert batch.entry_logprobs_TK is not None
        if self._config.teacher_token == "response":
            assert batch.teacher_logprob_T is not None
            fields = {"chosen": batch.target_T, "teacher_chosen": batch.teacher_logprob_T}
        else:
            # entries stand in rank order: the first is the teacher's arg-max
            place_T = torch.zeros_like(batch.target_T)
            if self._config.teacher_token == "sample":
                shares_TK = batch.entry_logprobs_TK.exp().cumsum(dim=1)
                drawn_T = torch.rand(batch.num_positions).to(shares_TK.device) * shares_TK[:, -1]
                place_T = torch.searchsorted(shares_TK, drawn_T[:, None], right=True)[:, 0]
                place_T = torch.minimum(place_T, cast(Tensor, batch.entry_counts_T) - 1)
            fields = {
                "chosen": batch.entry_ids_TK.gather(1, place_T[:, None])[:, 0],
                "teacher_chosen": batch.entry_logprobs_TK.gather(1, place_T[:, None])[:, 0],
            }
        if self._config.student_token == "sample":
            fields["uniform"] = torch.rand(batch.num_positions).to(batch.target_T.device)
        return fields

    def _token(self, sums: StepSums, batch: Batch, fields: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        teacher_own_T, miss_T = cached_logprobs(
            values["own_id"],
            fields["entry_ids"],
            fields["entry_logprobs"],
            fields["entry_counts"],
            fields["log_tail"],
            self._vocab_size,
        )
        loss_T = token_preference_loss(
            self._form,
            values["chosen"],
            values["own"],
            fields["teacher_chosen"],
            teacher_own_T,
            options=self._options,
        )
        sums.terms["dpkd"] = loss_T.sum()
        beta = self._config.beta
        chosen_T = beta * (values["chosen"].detach() - fields["teacher_chosen"])
        own_T = beta * (values["own"].detach() - teacher_own_T)
        _add_preference(sums, chosen_T, own_T)
        same_T = values["own_id"] == fields["chosen"]
        sums.metrics["teacher_miss_rate"] = (miss_T.float().sum(), batch.num_positions)
        sums.metrics["zero_gradient_share"] = (same_T.float().sum(), batch.num_positions)

    def _sequence(self, sums: StepSums, batch: Batch, values: dict[str, Tensor]) -> None:
        if batch.num_rows == batch.num_chosen:  # validation rows without a student's response
            self._chosen_reward(sums, batch, values)
            return
        assert batch.teacher_logprob_T is not None
        pairs = batch.num_chosen
        student_B = sum_by_row(values["target"], batch.row_T, batch.num_rows)
        teacher_B = sum_by_row(batch.teacher_logprob_T, batch.row_T, batch.num_rows)
        num_B = batch.num_tokens_B
        loss_B = sequence_preference_loss(
            self._form,
            student_B[:pairs],
            student_B[pairs:],
            teacher_B[:pairs],
            teacher_B[pairs:],
            num_B[:pairs],
            num_B[pairs:],
            options=self._options,
        )
        sums.terms["dpkd"] = loss_B.sum()
        beta, normalize = self._config.beta, self._config.length_normalize
        rewards_B = implicit_reward(student_B.detach(), teacher_B, num_B, beta, normalize)
        _add_preference(sums, rewards_B[:pairs], rewards_B[pairs:])
        whole_B = implicit_reward(student_B.detach(), teacher_B, num_B, beta, False)
        _add_rewards(sums, whole_B[:pairs], whole_B[pairs:], "_sum")

    def _chosen_reward(self, sums: StepSums, batch: Batch, values: dict[str, Tensor]) -> None:
        if batch.teacher_logprob_T is None:
            return
        student_B = sum_by_row(values["target"].detach(), batch.row_T, batch.num_rows)
        teacher_B = sum_by_row(batch.teacher_logprob_T, batch.row_T, batch.num_rows)
        for suffix, normalize in (("", True), ("_sum", False)):
            reward_B = implicit_reward(student_B, teacher_B, batch.num_tokens_B, self._config.beta, normalize)
            sums.metrics[f"reward_chosen{suffix}"] = (reward_B.sum(), batch.num_rows)

    def _minillm(self, batch: Batch, values: dict[str, Tensor]) -> Tensor:
        assert batch.teacher_logprob_T is not None
        loss_T = minillm_loss(
            values["target"],
            values["target"].detach(),  # responses are used once, with the weights that drew them or the next ones
            batch.teacher_logprob_T,
            batch.row_T,
            batch.num_tokens_B,
            values["single_step"],
            clip=self._config.minillm_clip,
            length_normalize=self._config.length_normalize,
        )
        return loss_T.sum()

    @property
    def _form(self) -> PreferenceName:
        return cast(PreferenceName, self._config.objective)


def _read(score: Score, batch: Batch, fields: dict[str, Tensor], read: Read) -> dict[str, Tensor]:
    return score(batch.input_ids_BS, batch.attention_mask_BS, batch.row_T, batch.predict_T, fields, read)


def _add_preference(sums: StepSums, chosen: Tensor, rejected: Tensor) -> None:
    _add_rewards(sums, chosen, rejected, "")
    sums.metrics["preference_accuracy"] = ((chosen > rejected).float().sum(), len(chosen))


def _add_rewards(sums: StepSums, chosen: Tensor, rejected: Tensor, suffix: str) -> None:
    count = len(chosen)
    sums.metrics[f"reward_chosen{suffix}"] = (chosen.sum(), count)
    sums.metrics[f"reward_rejected{suffix}"] = (rejected.sum(), count)
    sums.metrics[f"reward_margin{suffix}"] = ((chosen - rejected).sum(), count)


def _add_measures(sums: StepSums, batch: Batch, values: dict[str, Tensor], chosen_T: Tensor) -> None:
    """Means over the chosen responses' positions, over their first tokens (Table 3), and over responses."""
    chosen = batch.num_chosen
    num_chosen_positions = int(batch.num_tokens_B[:chosen].sum())
    first_T = torch.cat([chosen_T[:1], batch.row_T[1:] != batch.row_T[:-1]]) & chosen_T
    for name, value in (("entropy", "entropy"), ("kld", "kld"), ("rkld", "rkld"), ("top1_agreement", "agrees")):
        if value in values:
            sums.metrics[name] = (values[value][chosen_T].sum(), num_chosen_positions)
    for name in ("kld", "rkld"):
        if name in values:
            sums.metrics[f"{name}_first"] = (values[name][first_T].sum(), chosen)
    for name, begin, end in (("chosen", 0, chosen), ("rejected", chosen, batch.num_rows)):
        if end > begin:
            sums.metrics[f"{name}_length"] = (batch.num_tokens_B[begin:end].float().sum(), end - begin)
            sums.metrics[f"unfinished_{name}"] = (batch.unfinished_B[begin:end].float().sum(), end - begin)
