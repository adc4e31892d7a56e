"""`dpkd plan`: times a recipe by a pilot, a small copy of it that is really run in a temporary directory.

A cache is estimated as `dpkd cache-teacher --dry-run` does. A small one is then built for the steps that read it. A
training is timed over a few steps, an evaluation as a cache of the answers and the scored references of each model.
Steps of later rounds cost what those of the first round do.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.json_lines import complete_lines
from dpkd.core.progress import say
from dpkd.core.settings import Settings
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.options.train import TrainConfig
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.options.merge import MergeConfig
from dpkd.pipelines.commands.options import NoiseConfig
from dpkd.pipelines.planning.plan import PlannedStep, StepCost, plan_steps
from dpkd.pipelines.planning.processes import estimate, in_child, spread, timed, write_eval_rows
from dpkd.pipelines.planning.text import plan_text
from dpkd.pipelines.recipe.format import read_recipe
from dpkd.pipelines.recipe.steps import Step
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.options.derive import CacheFilterConfig, CacheMergeConfig, ImportConfig
from dpkd.teacher_cache.store.reader import TeacherCache

if TYPE_CHECKING:
    from dpkd.pipelines.commands.options import PlanOptions

_STEPS = 5  # of a training, the first of which is not timed
_CACHE_ROWS = 32  # of the small caches, at least
_CACHES = (CacheConfig, ImportConfig, CacheMergeConfig, CacheFilterConfig)  # what makes a cache
#: options that mean the same to `eval` as to `cache-teacher`
_ALIKE = (
    "template", "template_arg", "max_prompt_tokens", "max_new_tokens", "temperature", "top_p", "engine", "device",
    "dtype", "max_num_seqs",
)  # fmt: skip


def run(options: PlanOptions) -> None:
    """The command: print the plan of a recipe with the time of each step."""
    planned, costs = plan_recipe(options.recipe, options.set, options.pilot_rows)
    print(plan_text(planned, costs))
    hours = [cost.device_hours for cost in costs if cost.device_hours is not None]
    print(f"  device hours: {sum(hours):.2g}")
    if options.price_per_hour is not None:
        print(f"  price: {sum(hours) * options.price_per_hour:,.2f}, without a judge's")


def plan_recipe(recipe: str, inputs: dict[str, str], pilot_rows: int) -> tuple[list[PlannedStep], list[StepCost]]:
    """The steps of `recipe`, and the cost of each; nothing is written to their outputs.

    Raises `UserError` for a recipe that cannot be read. A step that cannot run here has a cost without time.
    """
    steps = read_recipe(recipe, inputs)
    planned = plan_steps(steps, {})
    with tempfile.TemporaryDirectory(prefix="dpkd-plan-") as directory:
        pilot = _Pilot(pilot_rows, Path(directory))
        costs = []
        for number, item in enumerate(planned):
            say(f"== pilot of step {number + 1} of {len(steps)}: dpkd {item.step.title}")
            costs.append(pilot.cost(number, item))
    return planned, costs


@dataclass
class _Pilot:
    """The small copies that were made so far: `made` maps an output of the recipe to its copy."""

    pilot_rows: int
    directory: Path
    made: dict[str, str] = field(default_factory=dict)
    cached_rows: dict[str, int] = field(default_factory=dict)  # of the real caches, by output
    measured: dict[tuple[str, ...], tuple[PlannedStep, StepCost]] = field(default_factory=dict)

    def cost(self, number: int, item: PlannedStep) -> StepCost:
        """Time the step `number`, and leave a small copy of its output for later steps."""
        step = item.step
        if item.finished:
            if isinstance(step.config, _CACHES) and getattr(step.config, "round", None) is None:
                self.cached_rows[step.out] = TeacherCache.open(step.out).manifest.counts["rows"]
            return StepCost(0.0)
        key = (step.command, step.variant or "", re.sub(r"\d+", "", step.output_name))
        if step.round and key in self.measured:
            first, cost = self.measured[key]
            self.made[step.out] = self.made.get(first.step.out, step.out)
            return cost
        try:
            cost = self._measure(number, item)
        except UserError as error:
            cost = StepCost(None, reason=str(error))
        self.measured[key] = item, cost
        return cost

    def _measure(self, number: int, item: PlannedStep) -> StepCost:
        step = item.step
        config: Any = self._moved(step, number)
        match config:
            case MergeConfig():
                return StepCost(0.0)
            case CacheConfig():
                return self._cache(step, config)
            case ImportConfig() | CacheMergeConfig() | CacheFilterConfig():
                return self._derive(step, config)
            case TrainConfig():
                return self._train(config, item)
            case EvalConfig():
                return self._evaluate(config)
            case NoiseConfig():
                copies = len(config.copies())
                small = _changed(config, scales=config.scales[:1], seeds=config.seeds[:1])
                return StepCost(in_child(timed, step.command, small) * copies)
            case InitStudentConfig() if config.cache is not None:
                small = _changed(config, cache_rows=min(config.cache_rows, _CACHE_ROWS))
                return StepCost(in_child(timed, step.command, small) * config.cache_rows / small.cache_rows)
        if step.command == "judge":
            return StepCost(None, reason="it depends on the judge's server")
        return StepCost(in_child(timed, step.command, config))

    def _moved(self, step: Step, number: int) -> Settings:
        """The step's options with the small copies as inputs and a new output; a round keeps its cache."""
        if not getattr(step.config, "round", None) or step.command != "cache-teacher":
            self.made[step.out] = str(self.directory / str(number))

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            if isinstance(value, list):
                return [move(item) for item in value]
            if not isinstance(value, str):
                return value
            for out, copy in self.made.items():  # also in NAME:PATH=WEIGHT
                value = copy.join(re.split(rf"(?:^|(?<=:)){re.escape(out)}(?=$|[/=])", value))
            return value

        values = move(step.config.model_dump(mode="json", exclude_unset=True))
        return type(step.config).parse(values, where=f"the pilot of {step.title}")

    def _cache(self, step: Step, config: CacheConfig) -> StepCost:
        if config.engine == "openai":
            return StepCost(
                None, reason="answers of the endpoint cost money: dpkd cache-teacher --dry-run asks for a few"
            )
        pilot = _changed(config, dry_run=True, pilot_rows=self.pilot_rows)
        if config.round is None:
            cost = in_child(estimate, pilot, None)
            self.cached_rows[step.out] = cost.num_rows
            rows = self.directory / f"{Path(config.out).name}.jsonl"
            spread(str(config.data), config.limit, rows, max(_CACHE_ROWS, self.pilot_rows))
            in_child(timed, step.command, _changed(config, data=str(rows), limit=None))
        else:
            cost = in_child(estimate, pilot, self.cached_rows.get(step.out))
            if Path(config.out).is_relative_to(self.directory):  # nothing is written to a cache that is not a copy
                in_child(timed, step.command, config)
        return StepCost(cost.seconds, cost.devices)

    def _derive(self, step: Step, config: ImportConfig | CacheMergeConfig | CacheFilterConfig) -> StepCost:
        """The time of a small copy, by the rows that are read. A filter that keeps none of them leaves its source."""
        if isinstance(config, ImportConfig):
            small = min(config.limit or _CACHE_ROWS, _CACHE_ROWS)
            seconds = in_child(timed, step.command, _changed(config, limit=small))
            if config.limit is None:
                return StepCost(None, reason="its rows are not counted before they are read: give `limit`")
            self.cached_rows[step.out] = config.limit
            return StepCost(seconds * config.limit / small)
        given = step.config
        assert isinstance(given, CacheMergeConfig | CacheFilterConfig)
        sources = [given.cache] if isinstance(given, CacheFilterConfig) else given.caches
        copies = [config.cache] if isinstance(config, CacheFilterConfig) else config.caches
        small = sum(TeacherCache.open(copy).manifest.counts["rows"] for copy in copies)
        real = sum(
            self.cached_rows.get(source) or TeacherCache.open(source).manifest.counts["rows"] for source in sources
        )
        try:
            seconds = in_child(timed, step.command, config)
        except UserError:
            if isinstance(config, CacheMergeConfig):
                raise
            self.made[step.out], self.cached_rows[step.out] = config.cache, real
            return StepCost(None, reason="none of the pilot's rows is kept")
        kept = TeacherCache.open(config.out).manifest.counts["rows"]
        self.cached_rows[step.out] = round(real * kept / small)
        return StepCost(seconds * real / small)

    def _train(self, config: TrainConfig, item: PlannedStep) -> StepCost:
        if config.student_samples == "live":
            return StepCost(None, reason="live samples need a running teacher server")
        if math.isnan(item.steps):
            return StepCost(None, reason="its number of steps is unknown")
        given = item.step.config
        assert isinstance(given, TrainConfig)
        held_out = sum(config.num_held_out(self.cached_rows.get(choice.location, 0)) for choice in given.caches)
        options: dict[str, Any] = {"steps": _STEPS, "epochs": None, "save_every": None, "tracker": "none"}
        options |= {"follow": False, "patience": None, "validate_every": None, "on_alarm": "warn"}
        options |= {"validation_examples": min(2, held_out), "best_metric": "last"}
        if config.data is not None:
            rows = self.directory / f"{config.out.name}.jsonl"
            spread(config.data, None, rows, 8 * config.batch_size * config.gradient_accumulation_steps)
            options["data"] = str(rows)
        taken_s = in_child(timed, "train", _changed(config, **options))
        log = [json.loads(line) for line in complete_lines(config.out / "metrics.jsonl")]
        step_s = statistics.median(line["step_time_s"] for line in log[1:])
        rest_s = taken_s - sum(line["step_time_s"] for line in log)
        per_step = config.batch_size * config.gradient_accumulation_steps
        steps = int(item.steps)
        return StepCost(rest_s + step_s * (steps + validation_steps(config, steps, held_out, per_step)))

    def _evaluate(self, config: EvalConfig) -> StepCost:
        rows = self.directory / f"{config.out.name}.jsonl"
        in_child(write_eval_rows, config, rows)
        alike = {key: getattr(config, key) for key in _ALIKE}
        seconds = 0.0
        for model in config.model.values():
            options = {
                "teacher": model,
                "data": str(rows),
                "out": str(self.directory / "answers"),
                "responses": "both" if config.perplexity else "teacher",
                "num_samples": len(config.resolved_seeds()),
                "top_k": 0,
                "dry_run": True,
                "pilot_rows": self.pilot_rows,
            }
            as_cache = CacheConfig.parse(options | alike, where="the pilot")
            seconds += in_child(estimate, as_cache, None).seconds
        return StepCost(seconds)


def validation_steps(config: TrainConfig, steps: int, held_out: int, per_step: int) -> float:
    """Time of all validations in steps of training: a third of a step for as many rows, as `train` assumes."""
    from dpkd.distill.run.plan import validation_interval

    if not held_out:
        return 0.0
    every = config.validate_every or validation_interval(steps, held_out, per_step)
    return (steps / every + 1) * held_out / per_step / 3


def _changed(config: Any, **options: Any) -> Any:
    """`config` with other values, validated again; options that are not given stay so."""
    values = config.model_dump(exclude_unset=True) | options
    return type(config).parse(values, where="the pilot")
