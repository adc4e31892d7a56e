"""The best student so far by a validation metric, and the held-out prompts that Rouge-L is measured on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.files import replacing_directory
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.distill.rows.row import RowSource, indices_of

#: where a run keeps the best student until it is complete
BEST_DIR = "best"

#: smaller is better; of the other metrics larger is
_SMALLER = ("loss", "kld")


@dataclass(frozen=True)
class HeldOutPrompt:
    """A validation example: its prompt's ids, and the texts that an answer is compared with."""

    prompt_ids: list[int]
    references: list[str]


#: Rouge-L (0 to 100) of the student in a Hugging Face directory, on held-out prompts; text in, a score out.
EvaluateFn = Callable[[Path, Sequence[HeldOutPrompt]], float]


@dataclass
class Best:
    """The best value of `metric` so far, the step after which it was measured, and the validations since."""

    metric: str
    value: float | None = None
    step: int = 0
    num_since: int = 0

    def value_of(self, line: dict[str, Any]) -> float:
        """The metric of a validation; raises `UserError` if the validation does not measure it."""
        value = line.get(self.metric)
        if value is None:
            have = sorted(name for name, existing in line.items() if existing is not None and name != "step")
            raise UserError(
                "the validation does not measure the best_metric",
                found=f"best_metric {self.metric}",
                expected=f"one of {', '.join(have)}",
                advice="Choose another best_metric, or leave it out",
            )
        return float(value)

    def note(self, line: dict[str, Any]) -> bool:
        """Record a validation; True if it is better than all before it (an equal one is not)."""
        value = self.value_of(line)
        better = self.value is None or (value < self.value if self.metric in _SMALLER else value > self.value)
        if better:
            self.value, self.step, self.num_since = value, int(line["step"]), 0
        else:
            self.num_since += 1
        return better


def take_best(directory: Path, target: Path, step: int | None) -> int | None:
    """Copy the best student, of `step`, from `directory` to `target`; None if it is not there, which is said."""
    if step is None:
        return None
    try:
        kept = int(json.loads((directory / "dpkd.json").read_bytes())["steps"])
    except (OSError, ValueError, KeyError):
        kept = None
    if kept != step:
        what = "is missing" if kept is None else f"is that of step {kept}"
        say(f"the best student is that of step {step}, but {directory} {what}: the last student is the result")
        return None
    # `directory` is deleted in the end: the copy must be on the disk before that
    with replacing_directory(target) as temporary:
        shutil.copytree(directory, temporary, dirs_exist_ok=True)
    return step


def held_out_prompts(rows: RowSource, references: RowSource | None, student: ModelSource) -> list[HeldOutPrompt]:
    """Each example of `rows` once, with its responses in `references`; with those in `rows` if it has none there."""
    prompts = _with_responses(rows, student)
    given = {} if references is None else _with_responses(references, student)
    return [
        replace(prompt, references=given[name].references) if name in given else prompt
        for name, prompt in prompts.items()
    ]


def _with_responses(rows: RowSource, student: ModelSource) -> dict[str, HeldOutPrompt]:
    """Each example with all its responses in `rows`; of a conversation, the last one."""
    prompts: dict[str, HeldOutPrompt] = {}
    for index in indices_of(rows):
        row = rows.row(*index).chosen.by_span()[-1]
        earlier = prompts[row.example_id].references if row.example_id in prompts else []
        text = student.decode(row.response_ids.tolist())
        prompts[row.example_id] = HeldOutPrompt(row.prompt_ids.tolist(), [*earlier, text])
    return prompts
