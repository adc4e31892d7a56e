"""What a recipe reads that no step of it makes: found to be missing before the first step, all at once."""

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
    """Raise `UserError` that names every model directory and data file that is missing, with how to get it.

    A hub name (OWNER/MODEL) that [reproduce.models] does not name is left to its step, which fetches it.
    """
    missing = [f"model {name}" + _how(config.models.get(name)) for name in missing_models(steps, config)]
    missing += [f"data {name}" for name in missing_data(steps)]
    if missing:
        raise UserError(
            f"{len(missing)} inputs of the recipe are missing",
            found=f"no {'; no '.join(missing)}",
            advice="Put them there, or change the paths in the recipe; --dry-run shows the plan without them",
        )


def _how(advice: str | None) -> str:
    return "" if advice is None else f" ({advice})"


def missing_models(steps: list[Step], config: ReproduceConfig) -> list[str]:
    """Directories of checkpoints that are neither there nor made by a step."""
    made = _made(steps)
    names = [*config.models, *(name for step in steps for name in _texts(step.config, _MODELS))]
    return [name for name in dict.fromkeys(names) if not _is_there(name, made, config)]


def _is_there(name: str, made: set[str], config: ReproduceConfig) -> bool:
    path = Path(name)
    if path in map(Path, made) or any(Path(place) in path.parents for place in made):
        return True
    if (path / "config.json").is_file():
        return True
    is_hub_name = name.count("/") == 1 and not path.is_absolute() and not name.startswith(".")
    return is_hub_name and name not in config.models


def missing_data(steps: list[Step]) -> list[str]:
    """Files of data that are neither there nor made by a step; known sets are looked for in their directory."""
    from dpkd.evaluate.options.eval import SET_PREFIX

    made = _made(steps)
    missing = []
    for step in steps:
        for name in _texts(step.config, _DATA):
            if name.startswith(SET_PREFIX):
                missing += _missing_set(step.config, name.removeprefix(SET_PREFIX))
            elif Path(name).suffix in _SUFFIXES and name not in made and not Path(name).is_file():
                missing.append(name)
    return list(dict.fromkeys(missing))


def _missing_set(config: Any, name: str) -> list[str]:
    from dpkd.evaluate.inputs.named_sets import resolve_sets

    try:
        resolve_sets(config.model_copy(update={"data": {name: config.data[name]}}))
    except UserError:
        return [f"set {name!r} in {config.data_dir or 'DPKD_DATA'}"]
    return []


def _made(steps: list[Step]) -> set[str]:
    return {str(step.config.out) for step in steps}  # type: ignore[attr-defined]


def _texts(config: Any, keys: tuple[str, ...]) -> list[str]:
    """The values of those options that are given; of named ones each."""
    found: list[str] = []
    for key in keys:
        value = getattr(config, key, None)
        found += map(str, value.values()) if isinstance(value, dict) else [] if value is None else [str(value)]
    return found
