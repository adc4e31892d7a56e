"""The device that a `--device` means, and what to say when its memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError, first_line

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; raises `UserError` when CUDA is asked for and absent."""
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("CUDA was requested but is not available", found="no CUDA device", advice="Choose --device cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device or the machine ran out of memory."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(phrase in text for phrase in ("out of memory", "can't allocate memory", "cannot allocate memory"))
    )


@contextmanager
def explained_out_of_memory(what: str, *, advice: str, found: object = None, where: object = None) -> Iterator[None]:
    """Inside, running out of memory is a `UserError` that begins with `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what}: {first_line(error)}", found=found, where=where, advice=advice) from error
