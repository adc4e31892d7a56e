"""The study of objectives (`objectives_study.py`): its inputs, and its arms as `recipes/study` has them."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpkd.pipelines.commands.registry import COMMANDS
from dpkd.pipelines.recipe.format import read_recipe
from dpkd.pipelines.recipe.shipped import find_recipe
from dpkd.pipelines.recipe.steps import Step

#: the recipes with arms, in the order in which they run
ARM_RECIPES = ("token", "prefixes", "responses", "prefixes-renewed", "responses-renewed")
SIZE_RECIPE = "cache-size"


@dataclass(frozen=True)
class Study:
    """What every run shares: inputs by path, sizes, and the machine's options."""

    teacher: str
    data: str
    select: str
    evals: dict[str, str]
    out: Path
    rows: int
    select_rows: int
    eval_rows: int
    steps: int
    tokens: int
    eval_seeds: tuple[int, ...]
    recipes: tuple[str, ...]
    device: str = "auto"
    engine: str = "transformers"
    max_num_seqs: int = 128
    student: str | None = None
    url: str = "http://127.0.0.1:8000"

    def inputs(self, rate: float, seed: int) -> dict[str, str]:
        """Inputs of the recipes of an arm."""
        return {
            "teacher": self.teacher, "data": self.data, "out": str(self.out), "rows": str(self.rows),
            "tokens": str(self.tokens), "steps": str(self.steps), "part": str(max(self.steps // 3, 1)),
            "rate": f"{rate:g}", "seed": str(seed), "double": str(2 * self.steps), "url": self.url,
        }  # fmt: skip

    def start_steps(self) -> list[Step]:
        """The steps that all arms share; `student` replaces the recipe's own start."""
        steps = _read("start", self.inputs(1.0, 0))
        if self.student is None:
            return steps
        own = replace(
            next(step for step in steps if step.command == "init-student"),
            config=COMMANDS["init-student"]
            .options_class()
            .parse({"teacher": self.teacher, "out": self.out / "student", "from_checkpoint": self.student}, where=""),
        )
        return [own if step.command == "init-student" else step for step in steps]

    def arms(self, rate: float, seed: int, recipes: Sequence[str] | None = None) -> dict[str, list[Step]]:
        """The steps of every arm by its name, in the order of the recipes."""
        arms: dict[str, list[Step]] = {}
        num_shared = len(_read("start", self.inputs(rate, seed)))
        for name in self.recipes if recipes is None else recipes:
            for step in _read(name, self.inputs(rate, seed))[num_shared:]:
                arms.setdefault(step.variant or Path(step.out).name, []).append(step)
        return arms

    def run_dir(self, arm: str, rate: float, seed: int) -> Path:
        """Directory of a run, as in the recipes."""
        return self.out / f"{rate:g}-{seed}" / arm


def _read(name: str, given: dict[str, str]) -> list[Step]:
    """The steps of a recipe of the study; inputs that it lacks are left out."""
    declared = set(tomllib.loads(find_recipe("study/start").read_text()).get("inputs", {}))
    declared |= set(tomllib.loads(find_recipe(f"study/{name}").read_text()).get("inputs", {}))
    return read_recipe(f"study/{name}", {key: value for key, value in given.items() if key in declared})
