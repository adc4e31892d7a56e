"""What a run is validated on, how often, and which student is its result: decided before the first step, and said."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import cut_entries
from dpkd.distill.batches.collate import collate
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import RowSource, indices_of
from dpkd.distill.rows.sources import CacheSplit

#: validations by default: their share of the run's time, and the most of them after the first
_SHARE_OF_TIME, _MOST_VALIDATIONS = 0.05, 20
#: share of the teacher's probability that entries should hold, and the rows that it is measured on
_ENOUGH_KEPT, _ROWS_FOR_TAIL = 0.8, 32


@dataclass(frozen=True)
class ValidationPlan:
    """Validation `rows` (None: no validation), measured before the first step, `every` so many steps and at the end.

    `best_metric` picks the student that is the run's result; None: the last one is. `note` is a sentence for the
    person about what no option asked for, and `facts` what the run's files say. `references` are the reference
    responses that rouge_l compares answers with, where the cache has any.
    """

    rows: RowSource | None = None
    every: int = 0
    best_metric: str | None = None
    note: str | None = None
    examples: int = 0
    references: RowSource | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return {"examples": self.examples, "every": self.every, "best_metric": self.best_metric or "last"}

    def is_due(self, done: int, steps: int) -> bool:
        """Whether to validate after `done` of `steps` steps."""
        return self.rows is not None and (done % self.every == 0 or done == steps)


def plan_validation(
    config: TrainConfig, split: CacheSplit | None, steps: int, rows_per_step: float, *, has_kl: bool
) -> ValidationPlan:
    """The plan for a run on the rows of `split` (None: they cannot be split).

    Raises `UserError` where an option needs validation and no example is held out.
    """
    if split is None or split.validation is None:
        for key in ("best_metric", "patience", "on_alarm"):
            if getattr(config, key) not in (None, "last", "warn"):
                raise UserError(
                    f"{config.flag(key)} needs validation, and no example is held out",
                    found="rows that cannot be split" if split is None else split.reason,
                    advice=f"Give --validation-examples of 1 or more, or leave {config.flag(key)} out",
                )
        return ValidationPlan(note=_note_of_absence(config, split))
    best_metric = None if config.best_metric == "last" else config.best_metric or _best_metric(config, has_kl)
    if best_metric is None and config.patience is not None:
        raise UserError(
            "--patience needs a metric of the student, and by default this run has none: no KL without distributions",
            advice="Give --best-metric loss, or leave --patience out",
        )
    every = config.validate_every or validation_interval(steps, sum(split.validation.group_sizes), rows_per_step)
    note = None
    if config.validation_examples is None:
        result = "last student" if best_metric is None else f"student with the best {best_metric}"
        often = "every step" if every == 1 else f"every {every} steps"
        note = (
            f"validation: {split.held_out} of {split.examples} examples are held out and measured {often}; "
            f"the result is the {result} (--validation-examples 0 trains on all)"
        )
    return ValidationPlan(split.validation, every, best_metric, note, split.held_out, split.references)


def tail_note(config: TrainConfig, rows: RowSource) -> str | None:
    """A sentence about a cache whose tail holds much of the teacher's probability, by the first rows; None without."""
    if not config.needs_distributions:
        return None
    first = [rows.row(*index) for index in itertools.islice(indices_of(rows), _ROWS_FOR_TAIL)]
    if any(row.chosen.distributions is None for row in first):
        return None
    batch = cut_entries(collate(first, with_distributions=True), config.top_k, config.top_mass)
    assert batch.log_tail_T is not None
    kept = 1 - float(batch.log_tail_T[batch.row_T < batch.num_chosen].exp().mean())
    if kept >= _ENOUGH_KEPT:
        return None
    return (
        f"the cached entries hold {kept:.0%} of the teacher's probability. The loss and the logged KL see the rest as "
        "one outcome, so the true KL is larger: a larger --top-k of the cache helps ('Tail mass' in docs/objectives.md)"
    )


def validation_interval(steps: int, num_rows: int, rows_per_step: float) -> int:
    """Steps between validations of `num_rows` rows that take about 5% of the time, at most 20 of them.

    A step takes three times as long as a validation of as many rows: forward and backward. There are always two
    validations, before the first step and after the last.
    """
    cost = num_rows / rows_per_step / 3  # in steps
    affordable = int(_SHARE_OF_TIME * steps / cost) - 1  # one comes before training
    return math.ceil(steps / min(max(affordable, 1), _MOST_VALIDATIONS))


def _best_metric(config: TrainConfig, has_kl: bool) -> str | None:
    if config.objective == "sft" and {*config.weights} == {"sft"}:
        return "loss"  # it learns the responses, whoever wrote them
    return "kld" if has_kl else None


def _note_of_absence(config: TrainConfig, split: CacheSplit | None) -> str | None:
    if config.validation_examples == 0:
        return None
    if split is None:
        reason = "--data has no teacher" if config.cache is None else "with --follow the cache is still being written"
        return f"no validation: {reason}; the result is the last student"
    return (
        f"no validation: {split.reason}; the result is the last student (--validation-examples N holds out N examples)"
    )
