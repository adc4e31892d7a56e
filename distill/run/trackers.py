"""Experiment trackers, through accelerate. They show what `metrics.jsonl` records in any case."""

from __future__ import annotations

import importlib.util
from typing import Any

from accelerate import Accelerator

from dpkd.core.errors import UserError, first_line
from dpkd.distill.options.train import TrainConfig

#: where a tracker writes in the run directory
TRACKER_DIR = "tracker"


def choose_tracker(name: str) -> str | None:
    """The tracker for `--tracker NAME`, None for none; `auto` is TensorBoard if it is installed.

    Raises `UserError` for a named tracker that is not installed.
    """
    if name == "none":
        return None
    if name == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") is not None else None
    if importlib.util.find_spec(name) is None:
        raise UserError(
            "the tracker is not installed", found=f"--tracker {name}", advice=f"pip install {name}, or leave it out"
        )
    return name


def start_tracker(accelerator: Accelerator, config: TrainConfig, first: int) -> None:
    """Start the tracker, or continue a resumed run's after step `first`; `UserError` when the tracker cannot start."""
    name = choose_tracker(config.tracker)
    if name is None:
        return
    options: dict[str, Any] | None = config.model_dump(mode="json", exclude_none=True)
    arguments: dict[str, Any] = {}
    if name == "tensorboard":
        options = None  # it would show each start's options as a run of their own; the run's dpkd.toml has them
        arguments = {"tensorboard": {"purge_step": first + 1}}
    elif name == "wandb" and accelerator.is_main_process:  # by default it writes to the current directory
        (config.out / TRACKER_DIR).mkdir(parents=True, exist_ok=True)
        arguments = {"wandb": {"dir": str(config.out / TRACKER_DIR)}}
    try:
        accelerator.init_trackers("dpkd", config=options, init_kwargs=arguments)
    except Exception as error:
        raise UserError(
            f"the tracker cannot start: {first_line(error)}",
            found=f"--tracker {name}",
            advice="Check its settings, or give --tracker none: metrics.jsonl has the same numbers",
        ) from error


def track(accelerator: Accelerator, line: dict[str, Any], group: str) -> None:
    """Show the numbers of a line of metrics under `group`, at its step."""
    values = {f"{group}/{key}": value for key, value in line.items() if key != "step" and value is not None}
    accelerator.log(values, step=line["step"])
