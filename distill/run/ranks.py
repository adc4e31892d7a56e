"""The processes of one run: how they start and end, what they agree on, and their sums.

With one process each function here is the plain call that it wraps.
"""

from __future__ import annotations

import functools
import gc
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from dpkd.core.devices import choose_device
from dpkd.core.errors import UserError
from dpkd.distill.objectives.objective import METRICS, StepSums
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.trackers import TRACKER_DIR, choose_tracker

#: longest wait for another rank, which may be scoring answers or waiting for rows
_TIMEOUT = timedelta(hours=2)

_P = ParamSpec("_P")
_T = TypeVar("_T")


class OtherRankFailed(SystemExit):
    """Another rank has printed its error: this one ends with the same exit code and prints nothing."""

    def __init__(self) -> None:
        super().__init__(2)


def open_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of this process; raises `UserError` for a device, dtype, tracker or sharding that cannot be used.

    The launcher (`accelerate launch`, `torchrun`) decides the number of processes and their devices, and sharding
    unless the option asks for it.
    """
    choose_device(config.device)
    cpu = config.device == "cpu" or (config.device == "auto" and not torch.accelerator.is_available())
    if config.dtype == "bfloat16" and not cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError(
            "this device does not compute in bfloat16",
            found=torch.cuda.get_device_name(),
            expected="a device with bfloat16",
            where="option 'dtype'",
            advice="Choose --set dtype=float32",
        )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # its successor in newer versions of torch is not there in older ones
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated", category=FutureWarning)
    if not torch.distributed.is_initialized():
        # accelerate remembers the first run's device and precision; a notebook may start another
        AcceleratorState._reset_state(reset_partial_state=True)
    plugin = _sharding(config) if several else None
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no",
        # given as a number, it would give way to the environment's, and the optimizer would skip steps of the loop
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        fsdp_plugin=plugin,
        log_with=choose_tracker(config.tracker),
        project_config=ProjectConfiguration(project_dir=str(config.out), logging_dir=str(config.out / TRACKER_DIR)),
        kwargs_handlers=[
            # the corpus term calls the student a second time before the backward pass: buffers must stay as they are;
            # gradients that are views of what is sent are not there twice
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_TIMEOUT),
        ],
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate passes the plugin over on CPUs, though all it calls works there (gloo)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # accelerate takes this from a data loader, of which there is none here
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise UserError(
            "the configuration of accelerate or DeepSpeed accumulates gradients over another number of batches",
            found=f"{accelerator.gradient_accumulation_steps}",
            expected=f"{config.gradient_accumulation_steps}, as --gradient-accumulation-steps",
            advice="Give both the same number, or `auto` in DeepSpeed's file",
        )
    on_all_ranks(accelerator, lambda: _check_sharding(accelerator, config))
    if config.dtype == "bfloat16" and accelerator.device.type == "cuda":
        # the head stays in float32, where it costs more than the layers in bfloat16; TF32 inputs change log q by
        # 0.002 nats (root mean square), as much as the cache's rounding
        torch.set_float32_matmul_precision("high")
    return accelerator


def ends_process_group(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function that ends the process group it opened once its own local variables are gone.

    The last reference to the group waits for gloo's threads, which need the interpreter's lock to end. Python's own
    reference releases the lock for that; the reducer of a `DistributedDataParallel` does not, and waits forever.
    """

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        was_initialized = torch.distributed.is_initialized()
        result = function(*args, **kwargs)
        if torch.distributed.is_initialized() and not was_initialized:
            gc.collect()
            torch.distributed.destroy_process_group()
        return result

    return wrapped


def _check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    if is_sharded(accelerator) and config.student_samples == "live":
        raise UserError(
            "--student-samples live needs the whole student on each device",
            found=f"{accelerator.distributed_type.value} sharding",
            advice="Leave sharding out, or train on a round of the cache (--student-samples cached)",
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and config.save_every is not None:
        raise UserError(
            "DeepSpeed keeps its optimizer in its own form, which dpkd cannot checkpoint",
            found=f"save_every {config.save_every}",
            expected="save_every none",
            advice="Give --save-every none, or shard with --sharding fsdp2, which has checkpoints",
        )


def _sharding(config: TrainConfig) -> FullyShardedDataParallelPlugin | None:
    asked_of_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if config.sharding is None and not asked_of_accelerate:
        return None
    # every rank reads the weights itself, so that a checkpoint is read in one way
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # autocast chooses the number types, as without sharding: FSDP's own bfloat16 would round the head's weights, the
    # cached log-probs and the losses
    precision = MixedPrecisionPolicy()
    if config.sharding is not None:
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=precision,
        )
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError(
            "only the second version of FSDP is supported",
            found=f"fsdp_version {plugin.fsdp_version}",
            expected="fsdp_version 2",
            where="accelerate's config",
            advice="Set `fsdp_version: 2` there, or leave FSDP out of it and give --set sharding=fsdp2",
        )
    plugin.mixed_precision_policy = precision
    return plugin


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each rank holds a part of every weight only."""
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    # on CPUs accelerate sets its type back once the weights are prepared
    return sharded or getattr(accelerator.state, "fsdp_plugin", None) is not None


def on_all_ranks(accelerator: Accelerator, act: Callable[[], _T]) -> _T:
    """Call `act` on every rank and wait for all; on a `UserError` the first rank that has one raises it.

    The other ranks then end without a message.
    """
    error: UserError | None = None
    result: Any = None
    try:
        result = act()
    except UserError as raised:
        error = raised
    raise_first(accelerator, error)
    return cast(_T, result)


def raise_first(accelerator: Accelerator, error: UserError | None) -> None:
    """Raise the error of the first rank that has one, on that rank; the others raise `OtherRankFailed`."""
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    failed = accelerator.gather(torch.tensor([error is not None], device=accelerator.device)).tolist()
    if not any(failed):
        return
    if error is not None and failed.index(True) == accelerator.process_index:
        raise error
    raise OtherRankFailed


def on_rank_zero(accelerator: Accelerator, act: Callable[[], _T]) -> _T:
    """Call `act` on rank zero while the others wait; its result, on every rank."""
    result = on_all_ranks(accelerator, lambda: act() if accelerator.is_main_process else None)
    if accelerator.num_processes > 1:
        result = broadcast_object_list([result])[0]
    return cast(_T, result)


def all_reduce_sums(accelerator: Accelerator, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums by key over this rank's micro-batches and over all ranks."""
    summed = {key: sum(part[key] for part in parts) for key in parts[0]}
    if accelerator.num_processes == 1:
        return summed
    values = torch.tensor(list(summed.values()), dtype=torch.float64, device=accelerator.device)
    reduced = accelerator.reduce(values, reduction="sum").tolist()
    return dict(zip(summed, reduced, strict=True))


def step_means(
    accelerator: Accelerator, sums: list[StepSums], counts: dict[str, int], weights: dict[str, float]
) -> dict[str, float | None]:
    """Every term (`loss_NAME`), their weighted sum `loss`, and every metric; None for what is not defined.

    `counts` are those of the terms over all micro-batches and ranks.
    """
    parts = [
        {name: float(loss.detach()) for name, loss in part.terms.items()}
        | {f"sum {name}": float(total) for name, (total, _) in part.metrics.items()}
        | {f"count {name}": count for name, (_, count) in part.metrics.items()}
        for part in sums
    ]
    summed = all_reduce_sums(accelerator, parts)
    terms = {f"loss_{name}": summed[name] / count for name, count in counts.items() if name in summed}
    # of several caches, a step may have no row of one
    metrics = {
        name: summed[f"sum {name}"] / count if (count := summed[f"count {name}"]) else None for name in sums[0].metrics
    }
    complete = all(f"loss_{name}" in terms for name in weights)
    loss = sum(weight * terms[f"loss_{name}"] for name, weight in weights.items()) if complete else None
    return {"loss": loss, **dict.fromkeys(METRICS), **terms, **metrics}
