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
from dpkd.distill.student.heads import check_heads, group_sizes, head_masks, prune_heads
from dpkd.distill.student.importance import Trials
from dpkd.distill.student.layers import in_words, keep_layers, masked_inputs, named_layers
from dpkd.distill.student.neurons import check_mlp_width, neuron_masks, neuron_sizes, prune_mlps
from dpkd.distill.student.sizes import Split, skeleton, splits_within

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

#: with --params: numbers of layers in a row that may be worse than the best before the search ends
_PATIENCE = 3


@dataclass(frozen=True)
class Size:
    """How much a student keeps: one of `splits`. `layers` are those to keep, from 0; None where importance decides."""

    splits: list[Split]
    layers: tuple[int, ...] | None


@dataclass(frozen=True)
class Kept:
    """The layers that a student keeps, and of each its number of neurons and heads (None: all)."""

    layers: tuple[int, ...]
    width: int | None
    heads: int | None

    def words(self, num_layers: int) -> str:
        """The same for the person."""
        words = f"layers {in_words(self.layers)} of " if len(self.layers) < num_layers else "all "
        words += f"{num_layers}" if len(self.layers) < num_layers else f"{num_layers} layers"
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
        splits = [Split(num_layers if num_kept is None else num_kept, config.mlp_width, config.heads)]
    else:
        splits = splits_within(teacher, config.params, num_kept, config.mlp_width, config.heads)
    counts = {split.layers for split in splits}
    if config.keep == "importance":
        layers = tuple(range(num_layers)) if counts == {num_layers} else None
    else:
        layers = tuple(named_layers(num_layers, counts.pop(), config.keep))
    return Size(splits, layers)


def choose(
    teacher: PreTrainedModel, size: Size, batches: Sequence[Batch], num_tokens: int
) -> tuple[PreTrainedModel, Kept]:
    """A student of that size, and what it keeps.

    Args:
        teacher: the whole teacher, on the device of `batches`; it is the same afterwards.
        size: how much to keep.
        batches: rows to choose on, with the teacher's distributions; none are needed where nothing is chosen.
        num_tokens: size of the tokenizer.

    Of several splits the one with the least KL to the teacher is kept. Layers are removed one by one for it, and after
    each the splits of so many layers are measured.
    """
    chooser = _Chooser(teacher, size.splits, batches)
    layers, split = size.layers, size.splits[0]
    if layers is None or len(size.splits) > 1:
        layers, split = chooser.nearest(Trials(teacher, batches, num_tokens), layers)
    student = keep_layers(teacher, layers)
    if split.heads is not None:
        student = prune_heads(student, split.heads, chooser.heads_LG[list(layers)])
    if split.width is not None:
        student = prune_mlps(student, split.width, chooser.neurons_LW[list(layers)])
    return student, Kept(layers, split.width, split.heads)


class _Chooser:
    """What each neuron and head of a teacher does on rows, as far as `splits` differ in them, and the best split."""

    def __init__(self, teacher: PreTrainedModel, splits: Sequence[Split], batches: Sequence[Batch]) -> None:
        self._teacher, self._splits = teacher, splits
        if any(split.width is not None for split in splits):
            self.neurons_LW = neuron_sizes(teacher, batches).cpu()
        if any(split.heads is not None for split in splits):
            self.heads_LG = group_sizes(teacher, batches)

    def nearest(self, trials: Trials, listed: tuple[int, ...] | None) -> tuple[tuple[int, ...], Split]:
        """The layers (`listed`, if they are given) and the split for them with the least KL to the teacher."""
        if len(self._splits) == 1:
            *_, last = trials.removals(self._splits[0].layers)
            return last.kept, self._splits[0]
        if listed is not None:
            return listed, self._best(trials, listed)[1]
        every = tuple(range(len(trials.layers)))
        layers, (least, split) = every, self._best(trials, every)
        for removal in trials.removals(min(split.layers for split in self._splits)):
            kl, of_kept = self._best(trials, removal.kept)
            if kl < least:
                layers, least, split = removal.kept, kl, of_kept
            if of_kept.width is None and of_kept.heads is None and kl < math.inf:
                break  # fewer layers would only make the student smaller
            if len(layers) - len(removal.kept) >= _PATIENCE and least < math.inf:
                break
        return layers, split

    def _best(self, trials: Trials, kept: tuple[int, ...]) -> tuple[float, Split]:
        """The best split for so many layers; KL is infinite if there is none."""
        least, best = math.inf, self._splits[0]
        for split in (split for split in self._splits if split.layers == len(kept)):
            with masked_inputs(self._masks(split)):
                kl = trials.kl(kept)
            say(f"{split.words()}: KL {kl:.3f}")
            if kl >= least:
                break  # splits go from many heads and few neurons to few heads and many neurons
            least, best = kl, split
        return least, best

    def _masks(self, split: Split) -> dict[nn.Module, Tensor]:
        masks: dict[nn.Module, Tensor] = {}
        if split.width is not None:
            masks |= neuron_masks(self._teacher, split.width, self.neurons_LW)
        if split.heads is not None:
            masks |= head_masks(self._teacher, split.heads, self.heads_LG)
        return masks
