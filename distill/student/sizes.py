"""How many layers and neurons a student of a given share of its teacher's parameters can have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError
from dpkd.distill.student.heads import with_heads
from dpkd.distill.student.layers import with_layers
from dpkd.distill.student.neurons import mlps_of, with_width

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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


def widths_within(
    teacher: PretrainedConfig, share: float, heads: int | None = None, fixed: int | None = None
) -> dict[int, int | None]:
    """For every number of layers, the largest width of MLPs with which a student has at most `share` of the teacher.

    Numbers of layers that do not fit with one neuron are left out; so are, with `fixed`, those that do not fit with
    that width. None stands for the teacher's own width: the student is then smaller than the share allows.

    Raises `UserError` when not even one layer fits.
    """
    num_layers = int(teacher.get_text_config().num_hidden_layers)
    most = math.floor(share * count_parameters(teacher))
    whole = mlps_of(skeleton(teacher))[0].width

    def count(layers: int, width: int) -> int:
        return count_parameters(resized(teacher, layers, width, heads))

    # the count is linear in layers, and in neurons of a layer
    one = count(1, 1)
    a_neuron, a_layer = count(1, 2) - one, count(2, 1) - one if num_layers > 1 else 0
    found: dict[int, int | None] = {}
    for layers in range(1, num_layers + 1):
        room = most - one - (layers - 1) * a_layer
        width = 1 + room // (layers * a_neuron)
        if width >= (fixed or 1):
            found[layers] = fixed or (None if width >= whole else width)
    if not found:
        smallest = (one + ((fixed or 1) - 1) * a_neuron) / count_parameters(teacher)
        raise UserError(
            "so small a share of the teacher's parameters leaves no layer",
            found=f"--params {share:g}",
            expected=f"more than {smallest:.3f}: the embeddings and one layer",
        )
    return found
