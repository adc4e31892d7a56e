"""Where a run's figures are shown beside `metrics.jsonl`, which is always written: a tracker of accelerate's."""

from __future__ import annotations

import importlib.util
from typing import Any

from accelerate import Accelerator

from dpkd.core.errors import UserError, first_line
from dpkd.distill.options.train import TrainConfig

PROJECT = "dpkd"
#: what a tracker writes of a run, beside its metrics
TRACKER_DIR = "tracker"
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def choose_tracker(name: str) -> str | None:
    """The tracker that `--tracker` means; None for none. `auto` is TensorBoard where it is installed.

    Raises `UserError` for one that is asked for and not installed.
    """
    if name == "none":
        return None
    if name == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") is not None else None
    if importlib.util.find_spec(_PACKAGES[name]) is None:
        raise UserError(
            "the tracker is not installed",
            found=f"--tracker {name}",
            advice=f"pip install {_PACKAGES[name]}, or leave it out",
        )
    return name


def start_tracker(accelerator: Accelerator, config: TrainConfig, first: int) -> None:
    """Begin (or go on) showing the run, from the step after `first`; raises `UserError` when the tracker will not."""
    name = choose_tracker(config.tracker)
    if name is None:
        return
    # TensorBoard would make a run of its own of the options, at every start; the run's dpkd.toml holds them
    options = None if name == "tensorboard" else config.model_dump(mode="json", exclude_none=True)
    arguments: dict[str, Any] = {"tensorboard": {"purge_step": first + 1}} if name == "tensorboard" else {}
    if name == "wandb" and accelerator.is_main_process:  # its files stand with the run, not where the command was given
        arguments = {"wandb": {"dir": str(config.out / TRACKER_DIR)}}
        (config.out / TRACKER_DIR).mkdir(parents=True, exist_ok=True)
    try:
        accelerator.init_trackers(PROJECT, config=options, init_kwargs=arguments)
    except Exception as error:
        raise UserError(
            f"the tracker cannot start: {first_line(error)}",
            found=f"--tracker {name}",
            advice="Mend its settings, or give --tracker none: the figures are in metrics.jsonl all the same",
        ) from error


def track(accelerator: Accelerator, line: dict[str, Any], group: str) -> None:
    """Show the numbers of a line of metrics under `group`, at its step."""
    values = {f"{group}/{key}": value for key, value in line.items() if key != "step" and value is not None}
    accelerator.log(values, step=line["step"])
