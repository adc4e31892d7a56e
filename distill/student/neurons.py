"""Fewer neurons in each MLP of a model: which ones do least, and a copy without them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import Batch
from dpkd.distill.student.layers import layer_stack, over_inputs, rebuilt

#: (projections into the neurons, projection out of them), as model families name them
_MLP_NAMES = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen2, Gemma and most newer ones
    (("up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # OPT (on the layer itself), Phi
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)
#: names of the number of neurons in configs
_WIDTH_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


@dataclass(frozen=True)
class Mlp:
    """One layer's MLP: names of its modules in the model, and its width W in neurons."""

    inputs: tuple[str, ...]
    output: str
    width: int


def mlps_of(model: PreTrainedModel) -> list[Mlp]:
    """The MLP of every layer, in order; raises `UserError` for a model family whose MLPs are unknown."""
    prefix = f"{layer_stack(model)[0]}."
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    found: list[Mlp] = []
    for name, module in model.named_modules():
        if not name.startswith(prefix):
            continue
        children = {child_name: child for child_name, child in module.named_children() if hasattr(child, "weight")}
        for inputs, output in _MLP_NAMES:
            if {*inputs, output} <= set(children):
                width = int(children[output].weight.shape[_neuron_axis(children[output], is_output=True)])
                found.append(Mlp(tuple(f"{name}.{part}" for part in inputs), f"{name}.{output}", width))
                break
    known = _width_name(model.config.get_text_config()) is not None
    if not known or len(found) != num_layers or len({mlp.width for mlp in found}) != 1:
        raise UserError(
            f"neurons cannot be pruned: the MLPs of the model type {model.config.model_type} are unknown",
            found=f"{len(found)} MLPs of widths {sorted({mlp.width for mlp in found})} in {num_layers} layers"
            + ("" if known else " and no width in the config"),
            expected=f"one MLP a layer, all of the width that the config gives ({', '.join(_WIDTH_NAMES)})",
            advice="Give --layers instead of --mlp-width or --params",
        )
    return found


def check_mlp_width(model: PreTrainedModel, width: int) -> None:
    """Raise `UserError` unless every MLP of `model` has `width` neurons; needs only the shapes of its weights."""
    largest = mlps_of(model)[0].width
    if width > largest:
        raise UserError(
            "the student's MLPs would have more neurons than the teacher's",
            found=f"--mlp-width {width}",
            expected=f"at most {largest}",
        )


def neuron_sizes(model: PreTrainedModel, batches: Iterable[Batch]) -> Float[Tensor, "L W"]:
    """Importance of each of the W neurons in each of the L layers: mean |activation| times norm of outgoing weights.

    The mean is over all tokens of `batches` except padding. Batches must be on the model's device.
    """
    mlps = mlps_of(model)
    sums_LW = torch.zeros(len(mlps), mlps[0].width, dtype=torch.float64, device=next(model.parameters()).device)

    def note(layer: int, neurons_NW: Tensor) -> None:
        sums_LW[layer] += neurons_NW.abs().sum(dim=0, dtype=torch.float64)

    num_tokens = over_inputs(model, [mlp.output for mlp in mlps], batches, note)
    outputs = [model.get_submodule(mlp.output) for mlp in mlps]
    norms = [
        cast(Tensor, output.weight).detach().double().norm(dim=1 - _neuron_axis(output, is_output=True))
        for output in outputs
    ]
    return (sums_LW / num_tokens * torch.stack(norms)).float()


def prune_mlps(model: PreTrainedModel, width: int, sizes_LW: Float[Tensor, "L W"]) -> PreTrainedModel:
    """A model of the same family that keeps in each MLP the `width` neurons of the largest `sizes_LW`, in their order.

    `sizes_LW` has a row for each layer of `model`. Raises `UserError` when its MLPs have fewer neurons.
    """
    mlps = mlps_of(model)
    check_mlp_width(model, width)
    weights = dict(model.state_dict())
    for mlp, sizes_W in zip(mlps, sizes_LW, strict=True):
        kept = largest(sizes_W, width).to(next(model.parameters()).device)
        for name in mlp.inputs:
            axis = _neuron_axis(model.get_submodule(name), is_output=False)
            weights[f"{name}.weight"] = weights[f"{name}.weight"].index_select(axis, kept)
            if f"{name}.bias" in weights:
                weights[f"{name}.bias"] = weights[f"{name}.bias"][kept]
        axis = _neuron_axis(model.get_submodule(mlp.output), is_output=True)
        weights[f"{mlp.output}.weight"] = weights[f"{mlp.output}.weight"].index_select(axis, kept)
    return rebuilt(model, with_width(model.config, width), weights)


def with_width(config: Any, width: int) -> Any:
    """A copy of a model's config with `width` neurons in each MLP."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    setattr(text_config, str(_width_name(text_config)), width)
    return config


def neuron_masks(
    model: PreTrainedModel, width: int, sizes_LW: Float[Tensor, "L W"]
) -> dict[nn.Module, Float[Tensor, " W"]]:
    """Of each MLP's last projection, 1 for the inputs that `prune_mlps` keeps and 0 for the others."""
    outputs = [model.get_submodule(mlp.output) for mlp in mlps_of(model)]
    return {
        output: torch.zeros_like(sizes_W).index_fill(0, largest(sizes_W, width), 1)
        for output, sizes_W in zip(outputs, sizes_LW, strict=True)
    }


def largest(sizes: Float[Tensor, " N"], num_kept: int) -> Int[Tensor, " K"]:
    """Indices of the `num_kept` largest of `sizes`, ascending; of equal ones the first."""
    return sizes.argsort(descending=True, stable=True)[:num_kept].sort().values


def _width_name(text_config: Any) -> str | None:
    return next((name for name in _WIDTH_NAMES if hasattr(text_config, name)), None)


def _neuron_axis(module: nn.Module, *, is_output: bool) -> int:
    """The weight's axis of neurons: `Linear` has weights [out, in], GPT-2's `Conv1D` has [in, out]."""
    return int(is_output) if isinstance(module, nn.Linear) else int(not is_output)
