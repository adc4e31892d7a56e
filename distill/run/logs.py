"""The lines that a run writes of its steps and validations, one JSON object each, and what it says of them."""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from dpkd.core.files import write_atomic

METRICS_LOG = "metrics.jsonl"


def shown(line: dict[str, Any]) -> list[str]:
    """The figures of a validation that a person looks at while a run goes on."""
    names = ("loss", "kld", "rkld", "reward_margin", "rouge_l")
    return [f"validation {name} {line[name]:.4f}" for name in names if line.get(name) is not None]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory of this process so far: of the device where it has its own, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux carries ru_maxrss over from the process that started this one, where that was larger; VmHWM is our own
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_line(path: Path) -> dict[str, Any] | None:
    """The last line of a log; None where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else None


def keep_lines(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run makes again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
