"""The layers of a model: which list they are in, named choices of them, a copy with some, a run without some."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import Batch

#: lists in configs with one value a layer
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def spread_layers(num_layers: int, num_kept: int) -> list[int]:
    """`num_kept` of `num_layers` layers, evenly from the first to the last (the first alone for one)."""
    return [round(index * (num_layers - 1) / max(num_kept - 1, 1)) for index in range(num_kept)]


def named_layers(num_layers: int, num_kept: int, keep: str | Sequence[int]) -> list[int]:
    """Numbers (from 0, ascending) of the layers to keep: the list `keep`, or the spread, first or last `num_kept`.

    Raises `UserError` when the model does not have a listed layer.
    """
    if not isinstance(keep, str):
        if max(keep) >= num_layers:
            raise UserError(
                "the teacher has no such layer",
                found=f"layer {max(keep)} in --keep",
                expected=f"layers 0 to {num_layers - 1}",
            )
        return list(keep)
    if keep == "spread":
        return spread_layers(num_layers, num_kept)
    return list(range(num_kept) if keep == "first" else range(num_layers - num_kept, num_layers))


def in_words(kept: Sequence[int]) -> str:
    """Layers as ranges: `0-9, 16-29`."""
    runs: list[list[int]] = []
    for layer in kept:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The one list of layers in `model`, and its name; raises `UserError` if there is not exactly one."""
    num_layers = model.config.get_text_config().num_hidden_layers
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.count(".") <= 2
    }
    if len(stacks) != 1:
        raise UserError(
            "the teacher's layers cannot be identified",
            found=f"lists of {num_layers} modules: {', '.join(stacks) or 'none'}",
            expected="exactly one such list",
        )
    return next(iter(stacks.items()))


def with_layers(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a model's config for the layers `kept`."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = len(kept)
    for name in _LAYER_LISTS:
        if getattr(text_config, name, None):
            setattr(text_config, name, [getattr(text_config, name)[layer] for layer in kept])
    return config


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of the same family with the layers `kept` and everything else copied."""
    prefix = f"{layer_stack(model)[0]}."
    new_layer = {str(layer): str(index) for index, layer in enumerate(kept)}
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith(prefix):
            layer, _, rest = name[len(prefix) :].partition(".")
            if layer not in new_layer:
                continue
            name = f"{prefix}{new_layer[layer]}.{rest}"
        weights[name] = value
    return rebuilt(model, with_layers(model.config, kept), weights)


def rebuilt(model: PreTrainedModel, config: Any, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model of `config` with `weights`; its head is tied or not, as the config says."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_config(config)
    student.load_state_dict(weights)
    student.generation_config = model.generation_config
    return cast("PreTrainedModel", student)


@contextmanager
def running_only(
    layers: nn.ModuleList, kept: Collection[int], resumed: tuple[int, Tensor] | None = None
) -> Iterator[None]:
    """Inside, the model runs only the layers `kept`; every other one returns its input.

    With `resumed`, a layer and hidden states: no layer up to and with that one runs, and it returns those states. The
    layers keep their places, so that what a family sets for each place (such as sliding windows) stays right.
    """
    start, hidden = (-1, None) if resumed is None else resumed
    replaced = []
    for index, layer in enumerate(layers):
        if index <= start or index not in kept:
            layer.forward = _returns(hidden if index == start else None)
            replaced.append(layer)
    try:
        yield
    finally:
        for layer in replaced:
            del layer.forward


def _returns(states: Tensor | None) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if states is None else states

    return forward


@torch.no_grad()
def over_inputs(
    model: PreTrainedModel, names: Sequence[str], batches: Iterable[Batch], note: Callable[[int, Tensor], None]
) -> int:
    """Run the decoder of `model`, without its head, over `batches`, which are on its device; returns their tokens.

    `note` gets what each of the modules `names` is given: its number and its inputs [N, F], for all tokens of a batch
    except padding.
    """
    real_N, num_tokens = torch.zeros(0, dtype=torch.bool), 0

    def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: note(number, arguments[0].flatten(end_dim=-2)[real_N])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(number)) for number, name in enumerate(names)]
    decoder = cast(Any, model.eval()).get_decoder()
    try:
        for batch in batches:
            real_N = batch.attention_mask_BS.flatten().bool()
            num_tokens += int(real_N.sum())
            decoder(input_ids=batch.input_ids_BS, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return num_tokens


@contextmanager
def masked_inputs(masks: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Inside, every module's input is multiplied by its mask: what is 0 might as well not be there."""

    def hook(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, arguments: (arguments[0] * mask.to(arguments[0]), *arguments[1:])

    handles = [module.register_forward_pre_hook(hook(mask)) for module, mask in masks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
