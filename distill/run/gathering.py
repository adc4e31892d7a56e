"""Weights and optimiser state as whole tensors on the CPU of the main process, however they are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_weights(
    accelerator: Accelerator, scorer: nn.Module, model: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The `wanted` weights of `model` by name, which `scorer` wraps; empty on every rank but the main one.

    All ranks must call it.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state = accelerator.get_state_dict(scorer) or {}
        named = {name.removeprefix("model."): value for name, value in state.items()}
        return named if accelerator.is_main_process else {}
    gathered: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not wanted(name):
            continue
        if id(value) not in seen:  # tied weights stay one tensor
            whole = _whole(value.detach())
            seen[id(value)] = whole if accelerator.is_main_process else torch.empty(0)
        gathered[name] = seen[id(value)]
    return gathered if accelerator.is_main_process else {}


def gather_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as `PARAMETER.NAME`; empty on every rank but the main one. All ranks must call it.

    A parameter is numbered by its place in the groups, which is the same for one rank and for many.
    """
    flat: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            whole = _whole(value.detach())
            if accelerator.is_main_process:
                flat[f"{index}.{name}"] = whole.contiguous()
    return flat


def spread_optimizer(flat: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put gathered moments and step counts back, each rank's part of them where parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            value = distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
