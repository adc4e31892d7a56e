"""Training curves of run directories: what a run wrote of its steps and validations, thinned for a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import file_sha256
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.report.provenance import redacted

#: the files of a run, by what their lines are of
LOGS = {"training": "metrics.jsonl", "validation": "validation.jsonl"}
#: the figures whose curves are shown, with their titles
METRICS = {
    "loss": "Loss",
    "reward_margin": "Reward margin",
    "kld": "KL(teacher, student) in nats",
    "rkld": "KL(student, teacher) in nats",
    "preference_accuracy": "Share of pairs with a positive margin",
    "top1_agreement": "Agreement in the likeliest token",
    "rouge_l": "Rouge-L of held-out answers (0 to 100)",
}
#: points of a curve; of a longer run each point is the mean of as many neighbouring lines as needed
MAX_POINTS = 200


def find_runs(config: EvalConfig) -> dict[str, str]:
    """The run directories whose curves the report shows: those of `--run`, then models that are runs themselves."""
    found = dict(config.run)
    for name, directory in config.model.items():
        if name not in found and (Path(directory) / LOGS["training"]).is_file():
            found[name] = directory
    return found


def read_run(name: str, directory: str) -> dict[str, Any]:
    """What `report.json` holds of a run: `directory`, `num_steps`, and the curves of training and validation.

    Raises `UserError` for a directory without the log of a run, and for a log that cannot be read. The last line may
    be cut short: the run may be going on.
    """
    if not (Path(directory) / LOGS["training"]).is_file():
        raise UserError(
            f"the directory of the run {name!r} has no {LOGS['training']}",
            where=directory,
            advice="Give --run NAME=DIR with the --out of a `dpkd train`",
        )
    lines = {kind: _lines(Path(directory) / file) for kind, file in LOGS.items()}
    steps = [line["step"] for found in lines.values() for line in found]
    return {
        "directory": redacted(directory),
        "num_steps": max(steps, default=0),
        **{kind: _curves(found) for kind, found in lines.items()},
    }


def run_identity(directory: str) -> dict[str, str | None]:
    """The sha256 of a run's logs, by what their lines are of."""
    paths = {kind: Path(directory) / file for kind, file in LOGS.items()}
    return {kind: file_sha256(path) if path.is_file() else None for kind, path in paths.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
    texts = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    found = []
    for number, text in enumerate(texts[:-1], start=1):  # what follows the last line break is not finished
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"line {number} is no line of a run: {type(error).__name__} {error}",
                where=path,
                advice="Give the directory of a `dpkd train`",
            ) from None
        found.append(line)
    return found


def _curves(lines: list[dict[str, Any]]) -> dict[str, Any]:
    curves = {}
    for metric in METRICS:
        points = [(line["step"], float(line[metric])) for line in lines if _is_number(line.get(metric))]
        if points:
            curves[metric] = thinned(points)
    return curves


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def thinned(points: list[tuple[int, float]], most: int = MAX_POINTS) -> dict[str, Any]:
    """At most `most` points: means of steps and values over equal runs of neighbours (the last may be shorter)."""
    size = max(1, math.ceil(len(points) / most))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return {
        "steps": [sum(step for step, _ in part) / len(part) for part in parts],
        "values": [sum(value for _, value in part) / len(part) for part in parts],
        "lines_a_point": size,
    }


def thinning_text(runs: Mapping[str, Any]) -> str:
    """How many lines of the logs a point stands for, where that is more than one."""
    sizes = {
        curve["lines_a_point"] for run in runs.values() for kind in LOGS for curve in run[kind].values()
    }  # fmt: skip
    if not sizes or max(sizes) == 1:
        return ""
    return f"Points are means of up to {max(sizes)} steps."
