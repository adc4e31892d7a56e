"""Pure metrics of fidelity: two passes over the same tokens, and kept entries against the full distribution.

Log-probs are natural logs of the full-vocabulary float32 log-softmax at temperature 1; errors and divergences in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from dpkd.teacher_cache.engines.engine import Distributions
from dpkd.teacher_cache.engines.top_k import from_top_k

_CHUNK_LOGITS = 2**24  # numbers in one [T, V] table of log-probs: 64 MiB, and the same again for its probabilities
_LOWEST_LOGPROB = -1e4  # replaces -inf (a masked logit), whose product with probability 0 is NaN


@dataclass(frozen=True, slots=True)
class Scores:
    """One pass over the rows' responses, T tokens in all: the log-prob of each (nats) and the top of its distribution.

    `distributions` is None with top-K 0.
    """

    logprobs_T: np.ndarray
    distributions: Distributions | None

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of all `parts`, one after the other."""
        tops = [part.distributions for part in parts if part.distributions is not None]
        return cls(
            np.concatenate([part.logprobs_T for part in parts]),
            joined_distributions(tops) if len(tops) == len(parts) else None,
        )


def joined_distributions(parts: Sequence[Distributions]) -> Distributions:
    """The positions of all `parts`, one after the other."""
    names = [field.name for field in fields(Distributions)]
    return Distributions(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, slots=True)
class CutLoss:
    """What kept entries lose of T full distributions, per position (float64).

    `kl_T` is KL(teacher || kept) in nats, with the tail mass spread evenly over the tail and the stored probabilities
    scaled to sum to one (otherwise rounding could make it negative). `kl_cut_T` is the same with exact log-probs, so
    `kl_T - kl_cut_T` (never negative) is the cost of the grid. `mass_kept_T` is the teacher's probability of the
    entries, `tail_error_T` the error of the stored tail mass, and `total_error_T` the difference between 1 and the sum
    of the stored probabilities.
    """

    kl_T: np.ndarray
    kl_cut_T: np.ndarray
    mass_kept_T: np.ndarray
    tail_error_T: np.ndarray
    total_error_T: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[CutLoss]) -> CutLoss:
        """The positions of all `parts`, one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class FullDistributions:
    """The teacher's full distributions at T positions: log-probs [T, V] (nats, float32), V the width of the logits."""

    def __init__(self, logprobs_TV: torch.Tensor) -> None:
        self._logprobs_TV = logprobs_TV
        self._probs_TV = logprobs_TV.exp()
        # sums of the same float32 values in float64, so that the tail mass is a difference without noise
        self._mass_T = _numpy(self._probs_TV.sum(1, dtype=torch.float64))
        products_TV = self._probs_TV * logprobs_TV.clamp(min=_LOWEST_LOGPROB)
        self._negentropy_T = _numpy(products_TV.sum(1, dtype=torch.float64))

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self._logprobs_TV.shape[1])

    def top(self, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probs (nats) of the `top_k` most likely tokens in rank order, each [T, K]."""
        top = torch.topk(self._logprobs_TV, top_k, dim=1)
        return _numpy(top.indices), _numpy(top.values)

    def logprobs_of(self, ids_T: np.ndarray) -> np.ndarray:
        """Log-prob (nats) of one token per position."""
        return self._at(self._logprobs_TV, np.arange(len(ids_T)), ids_T)

    def scores(self, response_ids_T: np.ndarray, top_k: int, top_mass: float | None) -> Scores:
        """What an engine would return for these positions."""
        sampled_T = self.logprobs_of(response_ids_T)
        if top_k == 0:
            return Scores(sampled_T, None)
        return Scores(
            sampled_T, from_top_k(*self.top(top_k), response_ids_T, sampled_T, self.vocab_size, top_mass=top_mass)
        )

    def loss_of(self, kept: Distributions) -> CutLoss:
        """What `kept`, of the same T positions, loses."""
        num_positions = len(self._mass_T)
        position_E = np.repeat(np.arange(num_positions), kept.counts_T)
        exact_E = self._at(self._logprobs_TV, position_E, kept.ids_E).astype(np.float64)
        probs_E = self._at(self._probs_TV, position_E, kept.ids_E).astype(np.float64)
        num_outside_T = self.vocab_size - kept.counts_T
        mass_kept_T = np.bincount(position_E, probs_E, minlength=num_positions)
        outside_T = np.where(num_outside_T > 0, np.maximum(self._mass_T - mass_kept_T, 0.0), 0.0)

        def divergence(logprobs_E: np.ndarray, tail_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """KL to these entries and tail mass, and their total."""
            total_T = np.bincount(position_E, np.exp(logprobs_E), minlength=num_positions) + tail_T
            each_T = np.where(outside_T > 0, tail_T / np.maximum(num_outside_T, 1), 1.0)
            cross_T = np.bincount(position_E, probs_E * logprobs_E, minlength=num_positions)
            with np.errstate(divide="ignore"):  # no stored tail mass where the teacher has some: infinite
                cross_T = cross_T + np.where(outside_T > 0, outside_T * np.log(each_T), 0.0)
            return self._negentropy_T - cross_T + self._mass_T * np.log(total_T), total_T

        stored_T = np.exp(kept.log_tail_T.astype(np.float64))
        kl_T, total_T = divergence(kept.logprobs_E.astype(np.float64), stored_T)
        kl_cut_T, _ = divergence(np.maximum(exact_E, _LOWEST_LOGPROB), outside_T)
        return CutLoss(kl_T, kl_cut_T, mass_kept_T, np.abs(stored_T - outside_T), np.abs(total_T - 1.0))

    @staticmethod
    def _at(table_TV: torch.Tensor, position_E: np.ndarray, ids_E: np.ndarray) -> np.ndarray:
        indices = (torch.from_numpy(index.astype(np.int64)).to(table_TV.device) for index in (position_E, ids_E))
        return _numpy(table_TV[tuple(indices)])


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def full_distributions(
    model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> Iterator[tuple[slice, FullDistributions]]:
    """`model`'s full distributions over the response, in chunks of positions so that [T, V] stays small.

    One sequence without padding. The keys and values of earlier chunks are reused.
    """
    ids_S = torch.tensor([*map(int, prompt_ids), *map(int, response_ids)], device=model.device)
    chunk = max(_CHUNK_LOGITS // model.config.get_text_config().vocab_size, 1)
    past, fed = None, 0
    for start in range(0, len(response_ids), chunk):
        stop = min(start + chunk, len(response_ids))
        # the logits at a position predict the next token, so the response's last token is never an input
        end = len(prompt_ids) + stop - 1
        with torch.inference_mode():
            output = model(
                input_ids=ids_S[None, fed:end], past_key_values=past, use_cache=True, logits_to_keep=stop - start
            )
            logprobs_TV = torch.log_softmax(output.logits[0].float(), dim=-1)
        past, fed = output.past_key_values, end
        yield slice(start, stop), FullDistributions(logprobs_TV)


def compare(ours: Scores, theirs: Scores, vocab_size: int) -> dict[str, Any]:
    """Distances |log p - log p| (nats) between two passes over the same T tokens.

    `sampled`: max and mean over the response tokens. `entries` (None without distributions): max and mean over the
    entries that both have, matched by token id; `weighted_mean`, their distances weighted by the probability in
    `theirs`, mean over positions; `positions_with_other_ids`, the number of positions where the two have different ids.
    """
    sampled = spread(np.abs(ours.logprobs_T.astype(np.float64) - theirs.logprobs_T))
    if ours.distributions is None or theirs.distributions is None:
        return {"sampled": sampled, "entries": None}
    keys, other_keys = (_entry_keys(scores.distributions, vocab_size) for scores in (ours, theirs))
    _, ours_index, theirs_index = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    other_E = theirs.distributions.logprobs_E[theirs_index].astype(np.float64)
    error_E = np.abs(ours.distributions.logprobs_E[ours_index] - other_E)
    apart = np.setxor1d(keys, other_keys, assume_unique=True)
    entries = spread(error_E) | {
        "weighted_mean": float((np.exp(other_E) * error_E).sum() / len(theirs.logprobs_T)),
        "positions_with_other_ids": len(np.unique(apart // vocab_size)),
    }
    return {"sampled": sampled, "entries": entries}


def _entry_keys(top: Distributions | None, vocab_size: int) -> np.ndarray:
    """A number for each entry that identifies its position and token."""
    assert top is not None
    position_E = np.repeat(np.arange(len(top.counts_T), dtype=np.int64), top.counts_T)
    return position_E * vocab_size + top.ids_E


def spread(values: np.ndarray) -> dict[str, float]:
    """Max and mean of distances."""
    return {"max": float(values.max(initial=0.0)), "mean": float(values.mean()) if len(values) else 0.0}
