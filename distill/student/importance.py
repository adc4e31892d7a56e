"""Which layers a model needs least: those without which it stays nearest to itself on given rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.core.progress import Progress
from dpkd.distill.batches.batch import Batch
from dpkd.distill.objectives.statistics import batch_fields, distance_from_teacher
from dpkd.distill.objectives.student_forward import StudentScorer
from dpkd.distill.student.layers import layer_stack, running_only

#: layers that are tried before one is removed
NUM_TRIED = 8


@dataclass(frozen=True)
class Removal:
    """A layer that was removed, the layers left, and KL(teacher || model with only those), in nats a token."""

    layer: int
    kept: tuple[int, ...]
    kl: float


class Trials:
    """A teacher on rows, and the same with parts of it switched off: KL to its own distributions.

    `batches` are on the teacher's device and have its distributions; of `num_tokens` logits each is a token, further
    ones pad the vocabulary. The teacher is unchanged afterwards. Raises `UserError` for a family whose layers return
    more than hidden states.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], num_tokens: int) -> None:
        self.layers = layer_stack(model)[1]
        self._model, self._batches = model.eval(), batches
        self._scorer = StudentScorer(model, num_tokens=num_tokens)
        self._num_positions = sum(batch.num_positions for batch in batches)

    @torch.no_grad()
    def kl(self, kept: Sequence[int]) -> float:
        """KL(teacher || teacher with only the layers `kept`), nats a token."""
        with running_only(self.layers, kept):
            return sum(self._sum_of_kl(batch) for batch in self._batches) / self._num_positions

    @torch.no_grad()
    def removals(self, least: int, num_tried: int = NUM_TRIED) -> Iterator[Removal]:
        """Remove one layer after the other until `least` are left: each time the one whose removal costs least KL.

        The `num_tried` layers that change their input least (block influence, 1 - cosine of input and output,
        arXiv 2403.03853) are tried. Block influence alone, and the angular distance of blocks (arXiv 2403.17887), need
        one pass; with few layers left they find worse ones: docs/results/students.md.
        """
        kept = list(range(len(self.layers)))
        with Progress("removed layers", len(kept) - least, "layers") as progress:
            while len(kept) > least:
                inputs = [self.layer_inputs(kept, batch) for batch in self._batches]
                influence = torch.tensor([self._influence(inputs, index) for index in range(len(kept))])
                tried = influence.argsort(stable=True)[:num_tried].sort().values.tolist()
                kl_of = [self._kl_without(kept, index, inputs) for index in tried]
                kl = min(kl_of)
                layer = kept.pop(tried[kl_of.index(kl)])
                progress.advance(1, kl=f"{kl:.3f}", last=layer)
                yield Removal(layer, tuple(kept), kl)

    def _kl_without(self, kept: list[int], index: int, inputs: list[list[Tensor]]) -> float:
        total = 0.0
        for batch, states in zip(self._batches, inputs, strict=True):
            # up to this layer nothing changes, and its input is known
            with running_only(self.layers, kept, (kept[index], states[index])):
                total += self._sum_of_kl(batch)
        return total / self._num_positions

    def _influence(self, inputs: list[list[Tensor]], index: int) -> float:
        total, num_tokens = 0.0, 0
        for batch, states in zip(self._batches, inputs, strict=True):
            real_BS = batch.attention_mask_BS.bool()
            similarity_N = cosine_similarity(states[index][real_BS], states[index + 1][real_BS], dim=1)
            total, num_tokens = total + float(similarity_N.sum()), num_tokens + len(similarity_N)
        return 1 - total / num_tokens

    def layer_inputs(self, kept: Sequence[int], batch: Batch) -> list[Tensor]:
        """Hidden states before each of the layers `kept` and after the last, of a model that runs only those."""
        states: list[Tensor] = []

        def after(_: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                raise UserError(
                    "layers cannot be chosen by importance: those of this model return more than hidden states",
                    found=f"a {type(output).__name__}",
                    expected="one tensor",
                    where=f"model type {self._model.config.model_type}",
                    advice="Give --keep spread, or list the layers",
                )
            states.append(arguments[0])
            if len(states) == len(kept):
                states.append(output)

        handles = [self.layers[layer].register_forward_hook(after) for layer in kept]
        try:
            with running_only(self.layers, kept):
                decoder = cast(Any, self._model).get_decoder()
                decoder(input_ids=batch.input_ids_BS, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return states

    def _sum_of_kl(self, batch: Batch) -> float:
        given = {"fields": batch_fields(batch), "statistics": (distance_from_teacher,)}
        return float(self._scorer(**batch.sequences, **given)["kld"].sum())
