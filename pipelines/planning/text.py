"""A plan as text: its steps with repeated rounds folded, and what is left to do in models, rows, tokens and time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from dpkd.core.progress import duration
from dpkd.pipelines.planning.plan import PlannedStep, StepCost

_TFLOPS = 100  # of the time estimate: what a GPU of 2022 reaches in bfloat16 with large batches


def plan_text(planned: list[PlannedStep], costs: Sequence[StepCost] | None = None) -> str:
    """The plan with two lines per step, the total of what is left to do, and what the totals leave out.

    `costs` are those of the steps, as measured. Without them the total time is that of an assumed speed.
    """
    lines, number = [], 0
    while number < len(planned):
        item = planned[number]
        number += 1
        lines.append(f"{number:>3}  {'done ' if item.finished else 'to do'}  {item.step.title} -> {item.step.out}")
        lines.append(f"            {item.words}")
        if costs is not None and not item.finished:
            cost = costs[number - 1]
            taken = f"not timed: {cost.reason}" if cost.seconds is None else duration(cost.seconds)
            lines.append(f"            {taken}")
        if repeated := _repeated(planned, number):
            lines.append(f"     and the same in {repeated} more steps, up to {planned[number + repeated - 1].step.out}")
            number += repeated
    left = [item for item in planned if not item.finished]
    rows = _total(item.rows for item in left if item.trained)
    lines += [
        "",
        f"{len(left)} of {len(planned)} steps to do (finished steps are checked again before they are used):",
        f"  models trained: {sum(item.trained for item in left)}",
        f"  training steps: {_total(item.steps for item in left)}, on rows: {rows}",
        f"  rows cached and scored: {_total(item.cached for item in left)}",
        f"  tokens generated, at most: {_total(item.generated for item in left)}",
        f"  disk, roughly: {_total((item.disk / 1e9 for item in left), '{:.1f} GB')}",
    ]
    if costs is None:
        hours = (item.flop / (_TFLOPS * 1e12 * 3600) for item in left)
        lines.append(f"  time, roughly, at {_TFLOPS} TFLOP/s: {_total(hours, '{:.1f} hours')}")
    else:
        known = [cost.seconds for cost in costs if cost.seconds is not None]
        missing = len(costs) - len(known)
        steps = "1 step that was" if missing == 1 else f"{missing} steps that were"
        without = f", without {steps} not timed" if missing else ""
        lines.append(f"  time: {duration(sum(known))}{without}")
    if any(item.questions != 0 for item in left):
        lines.append(f"  questions to a judge: {_total(item.questions for item in left)}")
    return "\n".join(lines)


def _repeated(planned: list[PlannedStep], end: int) -> int:
    """How many steps after the first `end` repeat the last one or two, such as rounds: they differ in numbers alone."""

    def alike(one: PlannedStep, other: PlannedStep) -> bool:
        texts = [f"{item.step.title} {item.step.out} {item.words} {item.finished}" for item in (one, other)]
        return re.sub(r"\d+", "", texts[0]) == re.sub(r"\d+", "", texts[1])

    for period in (1, 2):
        count = 0
        while (
            end >= period and end + count < len(planned) and alike(planned[end + count], planned[end + count - period])
        ):
            count += 1
        if count >= 2 * period:
            return count
    return 0


def _total(values: Iterable[float], form: str = "{:,}") -> str:
    given = list(values)
    known = [value for value in given if not math.isnan(value)]
    missing = len(given) - len(known)
    unknown = f" and those of {missing} steps whose data or model config are missing" if missing else ""
    return form.format(sum(known)) + unknown
