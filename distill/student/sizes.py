"""How many layers and neurons a student of a given share of its teacher's parameters can have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError
from dpkd.distill.student.heads import possible_heads, with_heads
from dpkd.distill.student.layers import with_layers
from dpkd.distill.student.neurons import mlps_of, with_width

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


#: largest number of choices of fewer heads among the splits of a share
_HEAD_CHOICES = 3


@dataclass(frozen=True)
class Split:
    """Number of layers of a student, neurons in each of its MLPs and heads in each layer (None: as the teacher)."""

    layers: int
    width: int | None
    heads: int | None

    def words(self) -> str:
        """The same for the person."""
        neurons = "all" if self.width is None else str(self.width)
        return f"{self.layers} layers, {neurons} neurons, {'all' if self.heads is None else self.heads} heads"


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A model of `config` without memory for its weights: for names, shapes and counts."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of a model of `config`; an embedding that is the head too counts once."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def resized(config: PretrainedConfig, layers: int, width: int | None, heads: int | None) -> PretrainedConfig:
    """A copy of a teacher's config for so many layers, neurons an MLP and heads a layer (None: as the teacher)."""
    config = with_layers(config, range(layers))
    if heads is not None:
        config = with_heads(config, heads)
    return config if width is None else with_width(config, width)


def splits_within(
    teacher: PretrainedConfig, share: float, layers: int | None, width: int | None, heads: int | None
) -> list[Split]:
    """Students with at most `share` of the teacher's parameters, each as wide as that allows.

    Sorted from many layers to few, and of one number of layers from many heads (at most `_HEAD_CHOICES` numbers) to
    few. A given number of `layers`, `width` or `heads` is kept; with a width, the numbers of layers are the largest.
    Raises `UserError` when none is so small.
    """
    whole = skeleton(teacher)
    num_layers = int(teacher.get_text_config().num_hidden_layers)
    choices: list[int | None] = [heads] if heads is not None else [None, *_fewer_heads(whole)]
    found = []
    for choice in choices:
        widths = _widths_within(whole, share, choice, width)
        if width is not None:
            widths = {max(widths): width} if widths else {}
        found += [Split(count, neurons, choice) for count, neurons in widths.items() if layers in (None, count)]
    if width is not None:
        found = [split for split in found if split.layers == max(split.layers for split in found)][:1]
    if not found:
        smallest = count_parameters(resized(teacher, layers or 1, width or 1, choices[-1]))
        raise UserError(
            "a student with so small a share of the teacher's parameters is not possible",
            found=f"--params {share:g}",
            expected=f"at least {smallest / count_parameters(teacher):.3f} (embeddings count) for {layers or 1} of "
            f"{num_layers} layers",
        )
    return sorted(found, key=lambda split: (-split.layers, choices.index(split.heads)))


def _fewer_heads(whole: PreTrainedModel) -> list[int]:
    """Numbers of heads below the teacher's, descending; none for families that cannot lose any."""
    try:
        possible = possible_heads(whole)[-2::-1]
    except UserError:
        return []
    every = -(-len(possible) // _HEAD_CHOICES)
    return possible[every - 1 :: every] if possible else []


def _widths_within(whole: PreTrainedModel, share: float, heads: int | None, fixed: int | None) -> dict[int, int | None]:
    """For every number of layers, the largest width of MLPs within the share, or the `fixed` one if it fits.

    Numbers of layers that do not fit are left out. None is the teacher's own width.
    """
    teacher = whole.config
    most = math.floor(share * count_parameters(teacher))

    def count(layers: int, width: int) -> int:
        return count_parameters(resized(teacher, layers, width, heads))

    # the count is linear in layers, and in neurons of a layer
    one, full = count(1, 1), mlps_of(whole)[0].width
    num_layers = int(teacher.get_text_config().num_hidden_layers)
    a_neuron, a_layer = count(1, 2) - one, count(2, 1) - one if num_layers > 1 else 0
    found: dict[int, int | None] = {}
    for layers in range(1, num_layers + 1):
        room = most - one - (layers - 1) * a_layer
        width = 1 + room // (layers * a_neuron)
        if width >= (fixed or 1):
            found[layers] = fixed or (None if width >= full else width)
    return found
