"""Fewer attention heads in each layer: which ones do least, and a copy without them.

Heads that share keys and values (grouped-query attention) are kept or removed together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import Batch
from dpkd.distill.student.layers import layer_stack, over_inputs, rebuilt
from dpkd.distill.student.neurons import largest

_INPUTS, _OUTPUT = ("q_proj", "k_proj", "v_proj"), "o_proj"


@dataclass(frozen=True)
class Attention:
    """The attention of one model: its module's name in every layer, G groups of heads, and sizes in features."""

    names: tuple[str, ...]
    num_groups: int
    heads_per_group: int
    head_size: int

    def rows(self, part: str, groups: Tensor) -> Tensor:
        """Indices of the features of `groups` in the outputs of a projection (for `o_proj`: in its inputs)."""
        size = self.head_size * (1 if part in ("k_proj", "v_proj") else self.heads_per_group)
        return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def attention_of(model: PreTrainedModel) -> Attention:
    """How the heads of `model` are laid out; raises `UserError` for a family whose heads cannot be removed.

    A family's config must hold the size of a head: where it is the hidden size divided by the number of heads, a model
    with fewer heads would have larger ones.
    """
    config = model.config.get_text_config()
    prefix, layers = layer_stack(model)
    names = tuple(
        name
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.") and {*_INPUTS, _OUTPUT} <= {child for child, _ in module.named_children()}
    )
    if len(names) != len(layers) or getattr(config, "head_dim", None) is None:
        reason = "its config has no size of a head" if len(names) == len(layers) else "its attention is unknown"
        raise _refused(model, reason)
    num_heads, num_groups = int(config.num_attention_heads), int(config.num_key_value_heads)
    found = Attention(names, num_groups, num_heads // num_groups, int(config.head_dim))
    norms = {
        int(parameter.shape[0])
        for name in names
        for child, module in model.get_submodule(name).named_children()
        if "norm" in child
        for parameter in module.parameters()
    }
    if norms - {found.head_size}:
        raise _refused(
            model, f"its attention normalises {max(norms)} features, more than the {found.head_size} of a head"
        )
    return found


def _refused(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"attention heads cannot be removed from the model type {model.config.model_type}: {reason}",
        found="--heads",
        expected="a family such as Llama, Mistral, Gemma or Qwen3",
        advice="Leave out --heads and keep fewer --layers or a smaller --mlp-width",
    )


def possible_heads(model: PreTrainedModel) -> list[int]:
    """Numbers of heads a layer that a student of `model` can have, ascending: whole groups that the family allows.

    Needs only the shapes of the weights. Raises the errors of `attention_of`.
    """
    attention = attention_of(model)
    found = []
    for num_groups in range(1, attention.num_groups + 1):
        config = with_heads(model.config, num_groups * attention.heads_per_group)
        try:
            type(config).from_dict(config.to_dict())  # some families want a hidden size that the heads divide
        except (ValueError, StrictDataclassError):
            continue
        found.append(num_groups * attention.heads_per_group)
    return found


def check_heads(model: PreTrainedModel, num_heads: int) -> None:
    """Raise `UserError` unless a student of `model` can have `num_heads` heads a layer (`possible_heads`)."""
    if num_heads not in (possible := possible_heads(model)):
        raise UserError(
            "the student cannot have so many attention heads in a layer",
            found=f"--heads {num_heads}",
            expected=f"one of {', '.join(map(str, possible))}: whole groups that share keys and values",
        )


def group_sizes(model: PreTrainedModel, batches: Iterable[Batch]) -> Float[Tensor, "L G"]:
    """Importance of each of the G groups of heads in each of the L layers.

    It is the mean norm of what the group adds to the hidden states, over all tokens of `batches` except padding.
    Batches must be on the model's device.
    """
    attention = attention_of(model)
    outputs = [f"{name}.{_OUTPUT}" for name in attention.names]
    sums_LG = torch.zeros(len(outputs), attention.num_groups, dtype=torch.float64)

    def note(layer: int, heads_NF: Tensor) -> None:
        weight_DF = cast(Tensor, model.get_submodule(outputs[layer]).weight)
        for group in range(attention.num_groups):
            features = attention.rows(_OUTPUT, torch.tensor([group], device=weight_DF.device))
            added_ND = heads_NF[:, features] @ weight_DF[:, features].T
            sums_LG[layer, group] += float(added_ND.norm(dim=1).sum())

    num_tokens = over_inputs(model, outputs, batches, note)
    return (sums_LG / num_tokens).float()


def prune_heads(model: PreTrainedModel, num_heads: int, sizes_LG: Float[Tensor, "L G"]) -> PreTrainedModel:
    """A model of the same family that keeps `num_heads` heads in each layer: the groups of the largest `sizes_LG`.

    `sizes_LG` has a row for each layer of `model`. Raises the errors of `check_heads`.
    """
    check_heads(model, num_heads)
    attention = attention_of(model)
    num_groups = num_heads // attention.heads_per_group
    weights = dict(model.state_dict())
    for name, sizes_G in zip(attention.names, sizes_LG, strict=True):
        kept = largest(sizes_G, num_groups)
        for part in (*_INPUTS, _OUTPUT):
            key = f"{name}.{part}"
            features = attention.rows(part, kept).to(weights[f"{key}.weight"].device)
            weights[f"{key}.weight"] = weights[f"{key}.weight"].index_select(int(part == _OUTPUT), features)
            if part != _OUTPUT and f"{key}.bias" in weights:
                weights[f"{key}.bias"] = weights[f"{key}.bias"][features]
    return rebuilt(model, with_heads(model.config, num_heads), weights)


def head_masks(
    model: PreTrainedModel, num_heads: int, sizes_LG: Float[Tensor, "L G"]
) -> dict[nn.Module, Float[Tensor, " F"]]:
    """Of each attention's last projection, 1 for the inputs that `prune_heads` keeps and 0 for the others."""
    attention = attention_of(model)
    outputs = [cast(nn.Linear, model.get_submodule(f"{name}.{_OUTPUT}")) for name in attention.names]
    num_groups = num_heads // attention.heads_per_group
    return {
        output: torch.zeros(output.in_features).index_fill(0, attention.rows(_OUTPUT, largest(sizes_G, num_groups)), 1)
        for output, sizes_G in zip(outputs, sizes_LG, strict=True)
    }


def with_heads(config: Any, num_heads: int) -> Any:
    """A copy of a model's config with `num_heads` attention heads in each layer, as large as before."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    heads_per_group = text_config.num_attention_heads // text_config.num_key_value_heads
    text_config.num_attention_heads, text_config.num_key_value_heads = num_heads, num_heads // heads_per_group
    return config
