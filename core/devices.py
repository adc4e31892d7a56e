"""The device that a `--device` means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpkd.core.errors import UserError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; raises `UserError` when CUDA is asked for and absent."""
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("CUDA was requested but is not available", found="no CUDA device", advice="Choose --device cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
