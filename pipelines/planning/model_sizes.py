"""How many parameters the models of a recipe have, from their configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.options.train import TrainConfig
from dpkd.pipelines.recipe.steps import Step


class ModelSizes:
    """Parameters by model name: of a directory with a config.json, or of a step's output by what it is made from.

    `assumed` are those of models that do not exist yet.
    """

    def __init__(self, steps: list[Step], assumed: dict[str, int]) -> None:
        self._assumed = assumed
        self._makers = {step.out: step.config for step in steps}
        self._known: dict[str, int | None] = {}

    def of(self, name: str) -> int | None:
        """Parameters of the model `name`, tied ones counted once; None where no config says."""
        while isinstance(maker := self._makers.get(name), TrainConfig) and not _config_file(name).is_file():
            name = maker.student
        if name not in self._known:
            config = self._config(name)
            self._known[name] = self._assumed.get(name) if config is None else _parameters_of(config)
        return self._known[name]

    def _config(self, name: str) -> dict[str, Any] | None:
        if _config_file(name).is_file():
            return dict(json.loads(_config_file(name).read_text(encoding="utf-8")))
        maker = self._makers.get(name)
        if isinstance(maker, TrainConfig):
            return self._config(maker.student)
        if not isinstance(maker, InitStudentConfig):
            return None
        if maker.from_config is not None:
            path = maker.from_config
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        if maker.from_checkpoint is not None:
            return self._config(maker.from_checkpoint)
        config = self._config(maker.teacher)
        narrower = (maker.params, maker.mlp_width, maker.heads)
        if config is None or any(size is not None for size in narrower):  # their names differ between architectures
            return None
        layers = len(maker.keep) if isinstance(maker.keep, tuple) else maker.layers
        key = next((key for key in ("num_hidden_layers", "n_layer") if key in config), None)
        return None if key is None or layers is None else config | {key: layers}


def _config_file(name: str) -> Path:
    return Path(name) / "config.json"


def _parameters_of(config: dict[str, Any]) -> int | None:
    """Parameters of a model of this config.json; no memory is taken for them. None for an unknown architecture."""
    from transformers import AutoConfig

    from dpkd.distill.student.sizes import count_parameters

    # settings of single layers do not fit another number of them, and change no size
    content = {key: value for key, value in config.items() if key not in ("model_type", "layer_types", "auto_map")}
    try:
        return count_parameters(AutoConfig.for_model(config["model_type"], **content))
    except (KeyError, ValueError):
        return None
