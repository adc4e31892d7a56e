"""What a student keeps of its teacher: layers, neurons and heads, chosen on rows by what the teacher loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.distill.batches.batch import Batch
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.student.heads import check_heads, group_sizes, prune_heads
from dpkd.distill.student.importance import Trials
from dpkd.distill.student.layers import in_words, keep_layers, named_layers
from dpkd.distill.student.neurons import check_mlp_width, neuron_sizes, only_largest, prune_mlps
from dpkd.distill.student.sizes import skeleton, widths_within

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

#: with --params: numbers of layers in a row that may be worse than the best before the search ends
_PATIENCE = 3


@dataclass(frozen=True)
class Size:
    """How much a student keeps. `widths` has the neurons of an MLP (None: all) for each number of layers it may have.

    `layers` are the numbers of the layers to keep, from 0, or None where importance decides.
    """

    widths: dict[int, int | None]
    heads: int | None
    layers: tuple[int, ...] | None


@dataclass(frozen=True)
class Kept:
    """The layers that a student keeps, and of each its number of neurons and heads (None: all)."""

    layers: tuple[int, ...]
    width: int | None
    heads: int | None

    def words(self, num_layers: int) -> str:
        """The same for the person."""
        words = (
            f"layers {in_words(self.layers)} of {num_layers}"
            if len(self.layers) < num_layers
            else f"{num_layers} layers"
        )
        words += "" if self.width is None else f", {self.width} neurons in every MLP"
        return words + ("" if self.heads is None else f", {self.heads} heads in every layer")


def size_of(config: InitStudentConfig, teacher: PretrainedConfig) -> Size:
    """The size that the options ask for; raises `UserError` where `teacher` cannot have it."""
    num_layers = int(teacher.get_text_config().num_hidden_layers)
    num_kept = len(config.keep) if isinstance(config.keep, tuple) else config.layers
    if num_kept is not None and num_kept > num_layers:
        raise UserError(
            "the student would have more layers than the teacher", found=num_kept, expected=f"at most {num_layers}"
        )
    if config.heads is not None:
        check_heads(skeleton(teacher), config.heads)
    if config.mlp_width is not None:
        check_mlp_width(skeleton(teacher), config.mlp_width)
    if config.params is None:
        widths = {num_layers if num_kept is None else num_kept: config.mlp_width}
    else:
        widths = widths_within(teacher, config.params, config.heads, config.mlp_width)
        if config.mlp_width is not None:
            num_kept = max(widths)
        if num_kept is not None and num_kept not in widths:
            raise UserError(
                "so many layers do not fit into that share of the teacher's parameters",
                found=f"{num_kept} layers with --params {config.params:g}",
                expected=f"at most {max(widths)} layers",
            )
        widths = widths if num_kept is None else {num_kept: widths[num_kept]}
    if config.keep == "importance":
        layers = tuple(range(num_layers)) if [*widths] == [num_layers] else None
    else:
        layers = tuple(named_layers(num_layers, next(iter(widths)), config.keep))
    return Size(widths, config.heads, layers)


def choose(
    teacher: PreTrainedModel, size: Size, batches: Sequence[Batch], num_tokens: int
) -> tuple[PreTrainedModel, Kept]:
    """A student of that size, and what it keeps.

    Args:
        teacher: the whole teacher, on the device of `batches`.
        size: how much to keep.
        batches: rows to choose on, with the teacher's distributions; none are needed where nothing is chosen.
        num_tokens: size of the tokenizer.

    With `size.widths` for several numbers of layers, layers are removed one by one, and after each the neurons that fit
    are measured with the layers left. The split with the least KL to the teacher is kept.
    """
    model, sizes_LW = teacher, None
    if size.heads is not None:
        say("choosing attention heads")
        model = prune_heads(teacher, size.heads, group_sizes(teacher, batches)).to(teacher.device)
    if any(width is not None for width in size.widths.values()):
        say("choosing neurons")
        sizes_LW = neuron_sizes(model, batches)
    layers = size.layers
    if layers is None:
        layers = _by_importance(Trials(model, batches, num_tokens), model, size.widths, sizes_LW)
    width = size.widths[len(layers)]
    student = keep_layers(model, layers)
    if width is not None:
        assert sizes_LW is not None
        student = prune_mlps(student, width, sizes_LW[list(layers)])
    return student, Kept(layers, width, size.heads)


def _by_importance(
    trials: Trials, model: PreTrainedModel, widths: dict[int, int | None], sizes_LW: Tensor | None
) -> tuple[int, ...]:
    """The layers that are left where the student with the width that fits is nearest to the teacher."""
    if len(widths) == 1:
        *_, last = trials.removals(next(iter(widths)))
        return last.kept

    def kl(kept: tuple[int, ...]) -> float:
        width = widths[len(kept)]
        if width is None:
            return trials.kl(kept)
        assert sizes_LW is not None
        with only_largest(model, width, sizes_LW):
            return trials.kl(kept)

    every = tuple(range(len(trials.layers)))
    best = (kl(every), every) if len(every) in widths else (math.inf, ())
    for removal in trials.removals(min(widths)):
        if len(removal.kept) not in widths:
            continue
        nearest = kl(removal.kept)
        say(f"{len(removal.kept)} layers and {widths[len(removal.kept)] or 'all'} neurons: KL {nearest:.3f}")
        if nearest < best[0]:
            best = nearest, removal.kept
        whole = widths[len(removal.kept)] is None  # fewer layers would only make the student smaller
        if whole or (best[1] and len(best[1]) - len(removal.kept) >= _PATIENCE):
            break
    return best[1]
