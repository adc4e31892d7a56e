"""What a recipe reads that no step of it makes. Missing inputs are reported before the first step, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.pipelines.recipe.steps import Step
from dpkd.pipelines.reproduce.options import ReproduceConfig

#: options that name a checkpoint, and options that name data
_MODELS = ("teacher", "student", "from_checkpoint", "model")
_DATA = ("data", "lm_data", "from_config", "train_data")
_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")


def check_inputs(steps: list[Step], config: ReproduceConfig) -> None:
    """Raise `UserError` that names every missing input, with how to get it."""
    if missing := missing_inputs(steps, config):
        raise UserError(
            f"{len(missing)} inputs of the recipe are missing",
            found=f"no {'; no '.join(missing)}",
            advice="Put them there, or change the paths in the recipe; --dry-run shows the plan without them",
        )


def missing_inputs(steps: list[Step], config: ReproduceConfig) -> list[str]:
    """Models and data that neither exist nor are made by a step: "model NAME (how to get it)", "data NAME".

    A hub name (OWNER/MODEL) that [reproduce.models] does not list is left to its step, which fetches it.
    """
    made = {Path(step.out) for step in steps}
    models = [*config.models, *(name for step in steps for name in _texts(step.config, _MODELS))]
    missing = [
        f"model {name}" + (f" ({config.models[name]})" if name in config.models else "")
        for name in models
        if not (made & {Path(name), *Path(name).parents} or _is_model(name, config))
    ]
    for step in steps:
        for name in _texts(step.config, _DATA):
            if Path(name).suffix in _SUFFIXES and Path(name) not in made and not Path(name).is_file():
                missing.append(f"data {name}")
        missing += _missing_sets(step.config)
    return list(dict.fromkeys(missing))


def _is_model(name: str, config: ReproduceConfig) -> bool:
    path = Path(name)
    is_hub_name = name.count("/") == 1 and not path.is_absolute() and not name.startswith(".")
    return (path / "config.json").is_file() or (is_hub_name and name not in config.models)


def _missing_sets(config: Any) -> list[str]:
    """Evaluation sets given by name that are not in the data directory."""
    from dpkd.evaluate.inputs.named_sets import resolve_sets
    from dpkd.evaluate.options.eval import SET_PREFIX, EvalConfig

    missing = []
    for name, place in config.data.items() if isinstance(config, EvalConfig) else ():
        try:
            resolve_sets(config.model_copy(update={"data": {name: place}}))
        except UserError:
            missing.append(f"set {place.removeprefix(SET_PREFIX)!r} in {config.data_dir or 'DPKD_DATA'}")
    return missing


def _texts(config: Any, keys: tuple[str, ...]) -> list[str]:
    """The values of those options that are given; of named ones each."""
    found: list[str] = []
    for key in keys:
        value = getattr(config, key, None)
        found += map(str, value.values()) if isinstance(value, dict) else [] if value is None else [str(value)]
    return found
