"""What a step minimises: weighted terms over the student's statistics, summed with the counts that divide them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpkd.distill.batches.batch import Batch, MicroBatch, narrowed
from dpkd.distill.losses.preference import implicit_reward, sum_by_row
from dpkd.distill.objectives.statistics import (
    Statistic,
    batch_fields,
    distance_from_teacher,
    entropy_and_agreement,
    target_logprob,
)
from dpkd.distill.objectives.terms import make_terms
from dpkd.distill.options.train import TrainConfig

#: metrics that every line has; null where the objective or the cache does not define them
METRICS = (
    *("reward_chosen", "reward_rejected", "reward_margin"),
    *("reward_chosen_sum", "reward_rejected_sum", "reward_margin_sum", "preference_accuracy"),
    *("kld", "rkld", "kld_first", "rkld_first", "entropy", "top1_agreement"),
    *("teacher_miss_rate", "zero_gradient_share", "clipped_share"),
    *("skew_gap_chosen", "skew_gap_rejected", "skew"),
    *("chosen_length", "rejected_length", "unfinished_chosen", "unfinished_rejected", "end_gap"),
)


#: steps between two logged values of `entropy` and `top1_agreement`, which read the whole vocabulary
MEASURE_EVERY = 10

#: `StudentScorer`, wrapped for several devices or not
Score = Callable[..., dict[str, Tensor]]


@dataclass
class StepSums:
    """Sums over a micro-batch. `terms` have a gradient; `metrics` are (sum, count) without one."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


class Objective:
    """The objective that a config names, averaged over the positions (or pairs) of a whole step.

    Each term's sum is divided by its count in the step, over all micro-batches and ranks: response positions for `sft`,
    `kd`, `minillm` and the token level (the released code's mean), pairs for the sequence level (Algorithm 1's mean),
    and tokens of the corpus for `lm`. `vocab_size` is the width of the teacher's logits, `num_logits` that of the
    student's (None: not narrower). A narrower student reads the cache as if the other ids did not exist.
    """

    def __init__(self, config: TrainConfig, vocab_size: int, num_logits: int | None = None) -> None:
        self._num_logits = num_logits if num_logits is not None and num_logits < vocab_size else None
        self._beta, self._length_normalize = config.beta, config.length_normalize
        self.weights = {str(name): weight for name, weight in config.weights.items()}
        self.needs_pairs, self.needs_distributions = config.needs_pairs, config.needs_distributions
        self._caches = [choice.name for choice in config.caches]
        self.terms = make_terms(config, self._num_logits or vocab_size)

    def counts(self, micro_batch: MicroBatch) -> dict[str, int]:
        """How many values of `micro_batch` enter each term."""
        return {
            name: term.count(batch)
            for name, term in self.terms.items()
            if (batch := micro_batch.corpus if term.source == "corpus" else micro_batch.rows) is not None
        }

    def total(self, sums: StepSums, counts: Mapping[str, int]) -> Tensor:
        """The weighted loss: each term's sum over its count in the whole step."""
        return torch.stack([self.weights[name] * sums.terms[name] / counts[name] for name in self.weights]).sum()

    def __call__(self, score: Score, micro_batch: MicroBatch, *, measure: bool = True) -> StepSums:
        """Sums of every term and metric over `micro_batch`; a term without anything to compare is left out.

        Without `measure`, the metrics that read the whole vocabulary are left out too.
        """
        rows, sums = micro_batch.rows, StepSums()
        if rows.num_positions == 0:
            raise ValueError("a batch without response positions")
        if self._num_logits is not None:
            rows = narrowed(rows, self._num_logits)
        metrics = [target_logprob, distance_from_teacher, *([entropy_and_agreement] if measure else [])]
        values = self._evaluate(score, rows, micro_batch, metrics, sums)
        if "reward_chosen" not in sums.metrics:
            _add_metrics(sums, chosen_reward(values, rows, self._beta, self._length_normalize))
        _add_metrics(sums, distance_metrics(values, rows) | response_metrics(values, rows))
        _add_metrics(sums, metrics_by_cache(values, rows, self._caches))
        if micro_batch.corpus is not None:
            self._evaluate(score, micro_batch.corpus, micro_batch, [], sums)
        return sums

    def _evaluate(
        self, score: Score, batch: Batch, micro_batch: MicroBatch, metrics: Sequence[Statistic], sums: StepSums
    ) -> dict[str, Tensor]:
        """Add the terms that read `batch` to `sums`; the fields, the statistics of the terms and those of `metrics`."""
        source = "corpus" if batch is micro_batch.corpus else "rows"
        terms = {name: term for name, term in self.terms.items() if term.source == source}
        fields = batch_fields(batch)
        for term in terms.values():
            fields |= term.fields(batch)
        needed = [statistic for term in terms.values() for statistic in term.needs]
        statistics = list(dict.fromkeys([*needed, *metrics]))
        read = batch if source == "corpus" or micro_batch.shared is None else micro_batch.shared
        values = fields | score(**read.sequences, fields=fields, statistics=statistics)
        for name, term in terms.items():
            if (result := term(values, batch)) is not None:
                sums.terms[name] = result.loss.sum()
                _add_metrics(sums, result.metrics)
        return values


def _add_metrics(sums: StepSums, metrics: Mapping[str, Tensor]) -> None:
    sums.metrics |= {name: (value.detach().sum(), len(value)) for name, value in metrics.items()}


def chosen_reward(values: Mapping[str, Tensor], batch: Batch, beta: float, length_normalize: bool) -> dict[str, Tensor]:
    """Eq. 29 of each chosen response, as it is compared and as a sum; of none where the teacher did not score all."""
    student_B = sum_by_row(values["target"].detach(), batch.row_T, batch.num_rows)
    if batch.teacher_logprob_T is None:  # empty, not absent: all micro-batches of a step must have the same metrics
        return dict.fromkeys(("reward_chosen", "reward_chosen_sum"), student_B[:0])
    teacher_B = sum_by_row(batch.teacher_logprob_T, batch.row_T, batch.num_rows)
    return {
        f"reward_chosen{suffix}": implicit_reward(student_B, teacher_B, batch.num_tokens_B, beta, normalize)[
            : batch.num_chosen
        ]
        for suffix, normalize in (("", length_normalize), ("_sum", False))
    }


def _known_positions(batch: Batch) -> Tensor:
    """Which positions of chosen responses the teacher is known at: an endpoint may not say how likely an end was."""
    chosen_T = batch.row_T < batch.num_chosen
    return chosen_T if batch.entry_counts_T is None else chosen_T & (batch.entry_counts_T > 0)


def distance_metrics(values: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Entropy and divergences at the positions of the chosen responses, and at their first tokens (Table 3)."""
    chosen_T = batch.row_T < batch.num_chosen
    first_T = torch.cat([chosen_T[:1], batch.row_T[1:] != batch.row_T[:-1]]) & chosen_T
    known_T = _known_positions(batch)
    metrics = {"entropy": values["entropy"][chosen_T]} if "entropy" in values else {}
    metrics |= {name: values[name][known_T] for name in ("kld", "rkld", "top1_agreement") if name in values}
    return metrics | {f"{name}_first": values[name][first_T & known_T] for name in ("kld", "rkld") if name in values}


def metrics_by_cache(values: Mapping[str, Tensor], batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """`kld/NAME`, `rkld/NAME` and `top1_agreement/NAME`: as in `distance_metrics`, of the rows of each cache.

    Nothing where the batch does not say which cache a row is of. A cache without a row has an empty tensor.
    """
    if batch.cache_B is None:
        return {}
    known_T, cache_T = _known_positions(batch), batch.cache_B[batch.row_T]
    return {
        f"{metric}/{name}": values[metric][known_T & (cache_T == number)]
        for metric in ("kld", "rkld", "top1_agreement")
        if metric in values
        for number, name in enumerate(names)
    }


def response_metrics(values: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Length in tokens and whether the token limit ended it, of chosen and of rejected responses; `end_gap`.

    `end_gap` is log q - log p of the EOS (nats) where chosen responses ended: far below 0, the student never stops.
    """
    ends_T = torch.cat([batch.row_T[1:] != batch.row_T[:-1], batch.row_T.new_ones(1, dtype=torch.bool)])
    ended_T = ends_T & _known_positions(batch) & ~batch.unfinished_B[batch.row_T]
    if batch.teacher_logprob_T is None:
        metrics = {"end_gap": values["target"][:0]}
    else:
        metrics = {"end_gap": (values["target"] - batch.teacher_logprob_T)[ended_T]}
    for name, rows in (("chosen", slice(batch.num_chosen)), ("rejected", slice(batch.num_chosen, batch.num_rows))):
        if len(batch.num_tokens_B[rows]):
            metrics[f"{name}_length"] = batch.num_tokens_B[rows].float()
            metrics[f"unfinished_{name}"] = batch.unfinished_B[rows].float()
    return metrics
