"""Training curves of run directories: their logs of steps and validations, thinned for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import file_sha256
from dpkd.core.json_lines import complete_lines, loads
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.report.provenance import redacted

#: the logs of a run, by kind
LOGS = {"training": "metrics.jsonl", "validation": "validation.jsonl"}
#: the metrics whose curves are shown, with their titles
METRICS = {
    "loss": "Loss",
    "reward_margin": "Reward margin",
    "kld": "KL(teacher, student) in nats",
    "rkld": "KL(student, teacher) in nats",
    "preference_accuracy": "Share of pairs with a positive margin",
    "top1_agreement": "Agreement in the likeliest token",
    "rouge_l": "Rouge-L of held-out answers (0 to 100)",
}
#: most points of a curve; in a longer run each point is the mean of neighbouring lines
MAX_POINTS = 200


def find_runs(config: EvalConfig) -> dict[str, str]:
    """The run directories whose curves the report shows: those of `--run`, then models that are runs."""
    found = dict(config.run)
    for name, directory in config.model.items():
        if name not in found and (Path(directory) / LOGS["training"]).is_file():
            found[name] = directory
    return found


def read_run(name: str, directory: str) -> dict[str, Any]:
    """What `report.json` holds of a run: `directory`, `num_steps`, and the curves of training and validation.

    Raises `UserError` for a directory without the log of a run, and for a log that cannot be read. A last line without
    a line break is left out: the run may still be writing it.
    """
    if not (Path(directory) / LOGS["training"]).is_file():
        raise UserError(
            f"the directory of the run {name!r} has no {LOGS['training']}",
            where=directory,
            advice="Give --run NAME=DIR with the --out directory of a `dpkd train`",
        )
    lines = {kind: _lines(Path(directory) / file) for kind, file in LOGS.items()}
    steps = [line["step"] for found in lines.values() for line in found]
    return {
        "directory": redacted(directory),
        "num_steps": max(steps, default=0),
        **{kind: _curves(found) for kind, found in lines.items()},
    }


def run_identity(directory: str) -> dict[str, str | None]:
    """The sha256 of each log of a run, by kind."""
    paths = {kind: Path(directory) / file for kind, file in LOGS.items()}
    return {kind: file_sha256(path) if path.is_file() else None for kind, path in paths.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for number, text in enumerate(complete_lines(path), start=1):
        try:
            line = loads(text)
            line["step"] = int(line["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"line {number} is not a training log's: {type(error).__name__} {error}",
                where=path,
                advice="Give the --out directory of a `dpkd train`",
            ) from None
        found.append(line)
    return found


def _curves(lines: list[dict[str, Any]]) -> dict[str, Any]:
    points = {m: [(line["step"], float(line[m])) for line in lines if _is_number(line.get(m))] for m in METRICS}
    return {metric: thinned(of_metric) for metric, of_metric in points.items() if of_metric}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def thinned(points: list[tuple[int, float]], most: int = MAX_POINTS) -> dict[str, Any]:
    """At most `most` points: means of steps and values over equal groups of neighbours (the last may be smaller)."""
    size = max(1, math.ceil(len(points) / most))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return {
        "steps": [sum(step for step, _ in part) / len(part) for part in parts],
        "values": [sum(value for _, value in part) / len(part) for part in parts],
        "lines_a_point": size,
    }


def thinning_text(runs: Mapping[str, Any]) -> str:
    """How many lines of the logs make a point; empty if it is one."""
    sizes = [curve["lines_a_point"] for run in runs.values() for kind in LOGS for curve in run[kind].values()]
    largest = max(sizes, default=1)
    return "" if largest == 1 else f"Points are means of up to {largest} steps."
