"""The plan of a recipe and its cost, from its options and the files that exist; needs no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from dpkd.core.errors import UserError
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.options.train import TrainConfig
from dpkd.evaluate.judge.rows import compared
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.options.merge import MergeConfig
from dpkd.pipelines.commands.options import NoiseConfig, PrepareConfig
from dpkd.pipelines.planning.model_sizes import ModelSizes
from dpkd.pipelines.recipe.steps import Step
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.options.derive import CacheFilterConfig, CacheMergeConfig, ImportConfig
from dpkd.teacher_cache.store.folder import MANIFEST

# bytes that a cached position takes beside its entries, and each entry (docs/results/cache-size.md)
_BYTES_A_POSITION, _BYTES_AN_ENTRY = 15.0, 2.4
_BYTES_A_WEIGHT = 4
_MODEL_AND_ADAM = 3  # a checkpoint: weights and two moments
# operations per weight and token: forward, and forward with backward
_FORWARD, _TRAINING = 2, 6
_PROMPT_TOKENS = 400  # of the judge's own prompt, at most
#: the file that each command but cache-teacher writes last, in its output
_LAST_FILES = {
    "prepare-data": "", "init-student": "dpkd-student.json", "train": "run.json", "add-noise": "noise.json",
    "eval": "report.json", "report": "report.json", "judge": "judge.json", "cache import": MANIFEST,
    "cache merge": MANIFEST, "cache filter": MANIFEST,
}  # fmt: skip


@dataclass(frozen=True)
class PlannedStep:
    """A step with its cost; NaN where it is unknown until the data or a model's config exists.

    `generated`: largest number of tokens; `trained`: 1 for a training; `disk`: what stays, in bytes; `flop`: operations
    at most; `questions`: to a judge.
    """

    step: Step
    trained: int = 0
    steps: float = 0
    rows: float = 0
    generated: float = 0
    cached: float = 0
    disk: float = 0
    flop: float = 0
    questions: float = 0
    words: str = ""

    @property
    def finished(self) -> bool:
        """Whether the step's last file exists; the step itself checks what the file was made of."""
        config, out = self.step.config, self.step.out
        if "://" in out:
            return False
        if isinstance(config, CacheConfig):
            return Path(out, *(("rounds", config.round) if config.round else ()), MANIFEST).is_file()
        return Path(out, _LAST_FILES[self.step.command]).is_file()


@dataclass(frozen=True)
class StepCost:
    """Time of a step on `devices` devices; `seconds` None: it was not measured, for `reason`."""

    seconds: float | None
    devices: int = 1
    reason: str = ""

    @property
    def device_hours(self) -> float | None:
        """Hours of one device."""
        return None if self.seconds is None else self.seconds * self.devices / 3600


@dataclass
class _Knowledge:
    """What earlier steps tell of later ones: rows of data files, rows of caches, sizes of models."""

    sizes: ModelSizes
    assumed: dict[str, int]
    data_rows: dict[str, float] = field(default_factory=dict)
    cache_rows: dict[str, float] = field(default_factory=dict)
    cache_tokens: dict[str, int] = field(default_factory=dict)  # of a row, at most
    evaluations: dict[str, tuple[EvalConfig, dict[str, float]]] = field(default_factory=dict)  # with rows by set

    def rows_of(self, data: str) -> float:
        """Rows of a data file that exists or that a step writes."""
        if data not in self.data_rows:
            self.data_rows[data] = _count_lines(Path(data))
        rows = self.data_rows[data]
        return self.assumed.get(data, rows) if math.isnan(rows) else rows

    def rows_of_cache(self, cache: str) -> float:
        """Rows of a cache that exists or that a step writes."""
        from dpkd.teacher_cache.store.reader import TeacherCache

        if cache not in self.cache_rows:
            try:
                self.cache_rows[cache] = TeacherCache.open(cache).manifest.counts["rows"]
            except UserError:  # a real run says so
                self.cache_rows[cache] = math.nan
        return self.cache_rows[cache]

    def size_of(self, model: str) -> float:
        """Parameters of a model."""
        size = self.sizes.of(model)
        return math.nan if size is None else size

    def operations(self, model: str, tokens: float, per_weight: int = _FORWARD) -> float:
        """Floating-point operations of `model` over `tokens`."""
        return 0 if tokens == 0 else per_weight * tokens * self.size_of(model)


def plan_steps(steps: list[Step], assumed: dict[str, int]) -> list[PlannedStep]:
    """Each step with its cost, in order; `assumed` are rows of data and parameters of models that are not here."""
    known = _Knowledge(ModelSizes(steps, assumed), assumed)
    return [_plan(step, known) for step in steps]


def _plan(step: Step, known: _Knowledge) -> PlannedStep:
    config = step.config
    match config:
        case PrepareConfig():
            return _prepare(step, config, known)
        case CacheConfig():
            return _cache(step, config, known)
        case ImportConfig():
            rows = known.cache_rows[step.out] = math.nan if config.limit is None else config.limit
            return PlannedStep(step, words=f"{_count(rows)} rows of {config.source}")
        case CacheMergeConfig():
            rows = known.cache_rows[step.out] = sum(map(known.rows_of_cache, config.caches))
            return PlannedStep(step, words=f"{_count(rows)} rows of {len(config.caches)} caches")
        case CacheFilterConfig():
            rows = known.cache_rows[step.out] = known.rows_of_cache(config.cache)
            return PlannedStep(step, words=f"{_count(rows)} rows at most of {config.cache}")
        case InitStudentConfig():
            size = known.size_of(str(config.out))
            return PlannedStep(step, disk=size * _BYTES_A_WEIGHT, words=_size_text(size))
        case TrainConfig():
            return _train(step, config, known)
        case NoiseConfig():
            size, copies = known.size_of(config.model), len(config.copies())
            words = f"{copies} copies ({_size_text(size)}), each measured on {config.cache_rows} rows at most"
            return PlannedStep(step, disk=size * copies * _BYTES_A_WEIGHT, words=words)
        case EvalConfig():
            return _evaluate(step, config, known)
        case MergeConfig():
            return PlannedStep(step, words=f"merges {len(config.evaluations)} evaluations")
        case JudgeConfig():
            return _judge(step, config, known)
    raise TypeError(f"a step of {step.command} has no plan")


def _prepare(step: Step, config: PrepareConfig, known: _Knowledge) -> PlannedStep:
    from dpkd.pipelines.commands.prepare import kept_rows

    try:
        known.data_rows[step.out] = sum(1 for _ in kept_rows(config))
    except UserError:
        known.data_rows[step.out] = math.nan  # missing, or no data: a real run says so
    rows = known.rows_of(step.out)
    return PlannedStep(step, rows=rows, words=f"{_count(rows)} rows of {config.data}")


def _cache(step: Step, config: CacheConfig, known: _Knowledge) -> PlannedStep:
    if config.round is not None:
        rows = generated_rows = known.cache_rows.get(config.out, math.nan)
    else:
        rows_of_data = _at_most(known.rows_of(config.data or ""), config.limit)
        generated_rows = 0 if config.responses == "reference" else rows_of_data * config.num_samples
        rows = generated_rows + (0 if config.responses == "teacher" else rows_of_data)
        known.cache_rows[config.out] = rows
    generated = generated_rows * config.max_new_tokens
    disk = rows * config.max_new_tokens * (_BYTES_A_POSITION + _BYTES_AN_ENTRY * config.most_entries)
    who = config.teacher if config.student is None else f"{config.student}, scored by {config.teacher}"
    words = f"{_count(rows)} rows at most, up to {_count(generated)} tokens generated by {who}"
    known.cache_tokens[config.out] = config.max_prompt_tokens + config.max_new_tokens
    flop = known.operations(config.teacher, rows * known.cache_tokens[config.out])
    if config.student is not None:
        flop += known.operations(config.student, generated)
    return PlannedStep(step, cached=rows, generated=generated, disk=disk, flop=flop, words=words)


def _train(step: Step, config: TrainConfig, known: _Knowledge) -> PlannedStep:
    caches = [choice.location for choice in config.caches]
    rows = sum(known.cache_rows.get(cache, math.nan) for cache in caches)
    if config.data is not None:
        rows = known.rows_of(config.data)
    if config.cache is not None and not config.follow and not math.isnan(rows):
        rows -= min(rows, config.num_held_out(int(rows)))
    per_step = config.batch_size * config.gradient_accumulation_steps
    steps: float = math.nan
    if config.steps is not None:
        steps = config.steps
    elif config.batch_tokens is None and not math.isnan(rows):
        steps = math.ceil((config.epochs or 1) * rows / per_step)
    size = known.size_of(config.student)
    kept = 1 if config.save_every is None else 1 + _MODEL_AND_ADAM * config.keep_checkpoints
    words = f"{_count(steps)} steps of {per_step} rows, {config.objective}, student of {_size_text(size)}"
    if config.lora_rank is not None:
        kept, words = 1, f"{words}, adapters of rank {config.lora_rank}"
    limit = config.max_prompt_tokens + config.max_new_tokens
    row_tokens = max((known.cache_tokens.get(cache, limit) for cache in caches), default=limit)
    return PlannedStep(
        step, trained=1, steps=steps, rows=steps * per_step, disk=size * kept * _BYTES_A_WEIGHT,
        flop=known.operations(config.student, steps * per_step * row_tokens, _TRAINING), words=words,
    )  # fmt: skip


def _evaluate(step: Step, config: EvalConfig, known: _Knowledge) -> PlannedStep:
    from dpkd.evaluate.inputs.named_sets import resolve_sets

    try:
        places = resolve_sets(config)
    except UserError:  # a set is not there: a real run says so
        places = {name: name for name in config.data}
    by_set = {name: _at_most(known.rows_of(place), config.limit) for name, place in places.items()}
    known.evaluations[str(config.out)] = config, by_set
    rows, num_seeds = sum(by_set.values()), len(config.resolved_seeds())
    generated = rows * len(config.model) * num_seeds * config.max_new_tokens
    words = (
        f"{len(config.model)} models, {num_seeds} seeds, {_count(rows)} rows of {', '.join(config.data)}: up to "
        f"{_count(generated)} tokens"
    )
    tokens = rows * num_seeds * (config.max_prompt_tokens + config.max_new_tokens)
    flop = sum(known.operations(model, tokens) for model in config.model.values())
    return PlannedStep(step, generated=generated, flop=flop, words=words)


def _judge(step: Step, config: JudgeConfig, known: _Knowledge) -> PlannedStep:
    """Questions, tokens and price: of each row, every answer, or every pair in both orders."""
    asked = f"{config.judge_model} at {config.judge_url}"
    if str(config.report) not in known.evaluations:
        return PlannedStep(step, questions=math.nan, words=f"asks {asked} an unknown number of questions")
    evaluation, by_set = known.evaluations[str(config.report)]
    rows = sum(
        _at_most(found, config.limit, config.sample)
        for name, found in by_set.items()
        if not config.sets or name in config.sets
    )
    models = [name for name in evaluation.names if not config.only or name in config.only]
    pairs = len(compared(models, config.baseline))
    per_row = 2 * pairs if config.mode == "pairwise" else len(models)
    per_row *= len(evaluation.resolved_seeds()) if config.answer_seeds == "all" else 1
    questions = rows * per_row
    texts = 3 if config.mode == "pairwise" else 2  # the reference, and the answers
    prompts = questions * (_PROMPT_TOKENS + evaluation.max_prompt_tokens + texts * evaluation.max_new_tokens)
    replies = questions * config.max_tokens
    words = (
        f"asks {asked} {_count(questions)} questions: up to {_count(prompts)} tokens of prompts and {_count(replies)} "
        "of replies"
    )
    cost = config.cost(prompts, replies)
    if cost is None:
        words += "; --estimate of dpkd judge gives the cost with --price-in and --price-out"
    elif not math.isnan(questions):
        words += f", {cost:,.2f} at most by the prices given"
    return PlannedStep(step, questions=questions, words=words)


def _count(value: float) -> str:
    return "an unknown number of" if math.isnan(value) else f"{value:,}"


def _size_text(size: float) -> str:
    return "unknown size (its config is missing)" if math.isnan(size) else f"{size / 1e6:,.1f}M parameters"


def _at_most(value: float, *limits: int | None) -> float:
    return min([value, *(limit for limit in limits if limit is not None)])  # an unknown value stays so


def _count_lines(path: Path) -> float:
    if path.suffix != ".jsonl" or not path.is_file():
        return math.nan
    with path.open(encoding="utf-8", errors="replace") as file:
        return sum(1 for line in file if line.strip())
