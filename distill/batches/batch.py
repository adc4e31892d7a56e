"""What one forward pass reads: tensors of rows, of a text corpus, and of pairs that share their prompt."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from dpkd.core.errors import UserError
from dpkd.distill.rows.vocabulary import ids_without_embedding


class _OnDevice:
    """A dataclass of tensors, and of objects that have tensors."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(cast(Any, self))}
        moved = {name: value.to(device) for name, value in values.items() if hasattr(value, "to")}
        return cast(Self, replace(cast(Any, self), **moved))


@dataclass(frozen=True)
class Batch(_OnDevice):
    """B sequences of prompt and response, right padded to S tokens, with T response positions over all of them.

    The first `num_chosen` sequences are the responses to learn from. For a preference, the rejected responses follow in
    the same order. `unfinished_B` marks responses that ended by length. Position t predicts token `target_T[t]` from
    the hidden state at (`row_T[t]`, `predict_T[t]`), one token before it.

    `sampling_logprob_T` is log q0 of each token, where q0 is the distribution that drew it; None unless every row was
    drawn by a student that is known. `sampling_logprob_B` is log q0 of whole responses, of pairs whose round has it.
    `progress` is the share of the run's steps that are done. `cache_B` is the number of each row's cache, of a run that
    learns from several.

    The `entry_*` tensors hold the K cached entries of the teacher's distribution, padded with id -1. They are None
    where the cache holds none; so is `teacher_logprob_T` where the teacher did not score the rows. Nats.
    """

    example_ids: list[str]
    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    row_T: Tensor
    predict_T: Tensor
    target_T: Tensor
    num_tokens_B: Tensor
    unfinished_B: Tensor
    num_chosen: int
    teacher_logprob_T: Tensor | None = None
    entry_ids_TK: Tensor | None = None
    entry_logprobs_TK: Tensor | None = None
    entry_counts_T: Tensor | None = None
    log_tail_T: Tensor | None = None
    sampling_logprob_T: Tensor | None = None
    sampling_logprob_B: Tensor | None = None
    progress: float = 0.0
    cache_B: Tensor | None = None

    @property
    def sequences(self) -> dict[str, Tensor]:
        """What the student reads, by the names of `StudentScorer.forward`; right padding needs no mask."""
        names = ("input_ids_BS", "row_T", "predict_T")
        return {name: getattr(self, name) for name in names}

    @property
    def num_rows(self) -> int:
        """B, sequences."""
        return int(self.input_ids_BS.shape[0])

    @property
    def num_positions(self) -> int:
        """T, response tokens."""
        return int(self.target_T.shape[0])


@dataclass(frozen=True)
class SharedPrompts(_OnDevice):
    """P pairs as P sequences of prompt, chosen and rejected response, right padded to S tokens.

    Response position t of the batch (chosen ones first, then rejected ones) is predicted from the hidden state at
    (`row_T[t]`, `predict_T[t]`).
    """

    input_ids_PS: Tensor
    position_ids_PS: Tensor
    prompt_P: Tensor
    chosen_P: Tensor
    length_P: Tensor
    row_T: Tensor
    predict_T: Tensor

    @property
    def sequences(self) -> dict[str, Tensor]:
        """What the student reads, by the names of `StudentScorer.forward`."""
        of_pairs = {"input_ids_BS": self.input_ids_PS, "position_ids_BS": self.position_ids_PS}
        return of_pairs | {"attention_mask_B1SS": self.mask(), "row_T": self.row_T, "predict_T": self.predict_T}

    def mask(self) -> Tensor:
        """Attention mask [P, 1, S, S], true where a query (third dimension) sees a key; padding sees itself alone."""
        index_S = torch.arange(self.input_ids_PS.shape[1], device=self.input_ids_PS.device)
        query, key = index_S[None, :, None], index_S[None, None, :]
        prompt, chosen, length = (value[:, None, None] for value in (self.prompt_P, self.chosen_P, self.length_P))
        hidden = (query >= prompt + chosen) & (key >= prompt) & (key < prompt + chosen)
        inside = (query < length) & (key < length)
        return ((key <= query) & inside & ~hidden | (key == query))[:, None]


@dataclass(frozen=True)
class MicroBatch(_OnDevice):
    """What one forward and backward pass reads: rows, and text of the corpus where the objective has an `lm` term.

    `shared` is the form in which the student reads pairs whose prompts are shared.
    """

    rows: Batch
    corpus: Batch | None = None
    shared: SharedPrompts | None = None

    @property
    def num_positions(self) -> int:
        """Tokens that the losses are computed on."""
        return self.rows.num_positions + (0 if self.corpus is None else self.corpus.num_positions)


def narrowed(batch: Batch, num_logits: int) -> Batch:
    """`batch` for a student with `num_logits` logits: the mass of entries with higher ids becomes part of the tail.

    Raises `UserError` for text with such an id, and for a position that would keep no entry.
    """
    largest = int(batch.input_ids_BS.max())
    if largest >= num_logits:
        rows = (batch.input_ids_BS >= num_logits).any(dim=1).nonzero()[:, 0].tolist()
        names = ", ".join(batch.example_ids[row] for row in rows[:8])
        raise ids_without_embedding("cache", f"id {largest}", num_logits, largest, where=f"rows {names}")
    if batch.entry_ids_TK is None:
        return batch
    beyond_TK = batch.entry_ids_TK >= num_logits
    if not bool(beyond_TK.any()):
        return batch
    kept_TK = (batch.entry_ids_TK >= 0) & ~beyond_TK
    counts_T = kept_TK.sum(dim=1)
    emptied_T = beyond_TK.any(dim=1) & (counts_T == 0)  # rejected responses have no entries to begin with
    if bool(emptied_T.any()):
        row = int(batch.row_T[emptied_T.nonzero()[0, 0]])
        raise UserError(
            "at one position, the student has no logit for any id that the cache keeps",
            found="no entry left",
            expected="at least one entry",
            where=f"row {batch.example_ids[row]}",
            advice="Build the cache with a larger --top-k",
        )
    return _with_entries(batch, kept_TK)


def cut_entries(batch: Batch, top_k: int | None, top_mass: float | None) -> Batch:
    """`batch` as if its cache kept at most `top_k` entries a position, or the fewest that reach `top_mass`."""
    if batch.entry_ids_TK is None or (top_k is None and top_mass is None):
        return batch
    assert batch.entry_logprobs_TK is not None
    kept_TK = batch.entry_ids_TK >= 0
    if top_k is not None:
        kept_TK[:, top_k:] = False
    if top_mass is not None:  # an entry stays if those before it do not reach the mass
        mass_TK = batch.entry_logprobs_TK.double().exp()
        kept_TK &= mass_TK.cumsum(dim=1) - mass_TK < top_mass
    return _with_entries(batch, kept_TK)


def _with_entries(batch: Batch, kept_TK: Tensor) -> Batch:
    """`batch` with these entries, in their order; the mass of the others becomes part of the tail."""
    assert batch.entry_ids_TK is not None
    assert batch.entry_logprobs_TK is not None
    assert batch.log_tail_T is not None
    lost_T = batch.entry_logprobs_TK.masked_fill(kept_TK, -torch.inf).logsumexp(dim=1)
    counts_T = kept_TK.sum(dim=1)
    most = max(int(counts_T.max()), 1)
    order_TK = (~kept_TK).to(torch.int8).argsort(dim=1, stable=True)[:, :most]  # the entries that stay come first
    kept_TK = kept_TK.gather(1, order_TK)
    return replace(
        batch,
        entry_ids_TK=batch.entry_ids_TK.gather(1, order_TK).masked_fill(~kept_TK, -1),
        entry_logprobs_TK=batch.entry_logprobs_TK.gather(1, order_TK).masked_fill(~kept_TK, -torch.inf),
        entry_counts_T=counts_T,
        log_tail_T=torch.logaddexp(batch.log_tail_T, lost_T),
    )
