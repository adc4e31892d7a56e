"""What a term of an objective is, and the terms without pairs or samples: cross-entropy and divergences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dpkd.distill.batches.batch import Batch
from dpkd.distill.objectives.statistics import FunctionOfOutcomes, Outcomes, Statistic, target_logprob


@dataclass(frozen=True)
class TermValues:
    """What a term makes of a batch: `loss` with a gradient, one value a position or a pair, and metrics without one.

    Each metric is averaged over its own length.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Term(ABC):
    """A term of an objective, by default with one value a position of the chosen responses.

    `source` is the part of a micro-batch that it reads: cached rows or the text corpus.
    """

    source: Literal["rows", "corpus"] = "rows"

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics of the student's logits that it reads."""
        return (target_logprob,)

    def fields(self, batch: Batch) -> dict[str, Tensor]:
        """Per-position inputs of its statistics that the batch itself does not have."""
        return {}

    def count(self, batch: Batch) -> int:
        """How many values its loss has on `batch`."""
        return int(batch.num_tokens_B[: batch.num_chosen].sum())

    @abstractmethod
    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues | None:
        """Its unreduced loss; None where `batch` lacks what it compares. `values` are the statistics and the fields."""


@dataclass(frozen=True)
class CrossEntropy(Term):
    """-log q of the tokens of the chosen responses, or of the corpus (the paper's L_pt)."""

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        return TermValues(-values["target"][batch.row_T < batch.num_chosen])


@dataclass(frozen=True, kw_only=True)
class Divergence(Term):
    """A divergence from the cached distribution at each position of the chosen responses."""

    divergence: Callable[[Tensor, Tensor], Tensor]
    outcomes: Outcomes

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (FunctionOfOutcomes("divergence", self.divergence, self.outcomes),)

    def __call__(self, values: Mapping[str, Tensor], batch: Batch) -> TermValues:
        return TermValues(values["divergence"][batch.row_T < batch.num_chosen])
