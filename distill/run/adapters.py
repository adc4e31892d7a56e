"""LoRA: small matrices beside frozen linear layers, from `peft`; merged into the weights or kept on their own."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.distill.options.train import TrainConfig

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NAME = "default"  # peft's name of the only adapter


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model. `layers` are (scaling, whether the weight is stored transposed) by module name."""

    config: LoraConfig
    layers: dict[str, tuple[float, bool]]

    def is_adapter(self, name: str) -> bool:
        """Whether `name` is a weight of an adapter, not of the model beneath."""
        return f".{_NAME}." in name and "lora_" in name

    def merge(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the model without adapters: W + scaling B A, under the model's own names."""
        merged: dict[str, Tensor] = {}
        for name, value in weights.items():
            if self.is_adapter(name):
                continue
            module, _, kind = name.rpartition(".base_layer.")
            if module and kind == "weight":
                scaling, transposed = self.layers[module]
                delta = scaling * (
                    weights[f"{module}.lora_B.{_NAME}.weight"] @ weights[f"{module}.lora_A.{_NAME}.weight"]
                )
                value = value + (delta.T if transposed else delta)
            merged[name.replace(".base_layer.", ".")] = value
        return merged

    def save(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """The adapters alone, in peft's form, into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        named = {
            f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": value.contiguous()
            for name, value in weights.items()
            if self.is_adapter(name)
        }
        save_file(named, directory / WEIGHTS, metadata={"format": "pt"})
        self.config.save_pretrained(str(directory))

    def load(self, directory: Path, model: nn.Module) -> None:
        """Put the adapters of `directory` back into `model`."""
        found = load_file(directory / WEIGHTS)
        own = {name: value for name, value in model.state_dict(keep_vars=True).items() if self.is_adapter(name)}
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(found[f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"])


def check_adapters(source: ModelSource, config: TrainConfig) -> None:
    """Raise `UserError` when peft is not there, or a name of `lora_target_modules` is no linear layer's."""
    if config.lora_rank is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora-rank needs the package peft, which is not installed", advice="pip install 'dpkd[lora]'")
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    names = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
    for target in config.lora_target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                "lora_target_modules names no linear layer of the student",
                found=target,
                expected=f"some of {', '.join(known)}",
                where=source.name,
                advice="Leave it out to put adapters into all but the head",
            )


def add_adapters(model: Any, config: TrainConfig) -> Adapters:
    """Freeze `model` and put adapters into it, in place; what they compute is 0 until they are trained.

    Their random halves follow from the seed.
    """
    from peft import LoraConfig, get_peft_model

    assert config.lora_rank is not None  # the caller's choice
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_rank,  # type: ignore[arg-type]
        target_modules=list(config.lora_target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.student,
    )
    torch.manual_seed(config.seed)
    get_peft_model(model, lora)
    layers = {
        name: (float(part.scaling[_NAME]), bool(part.fan_in_fan_out))
        for name, part in model.named_modules()
        if hasattr(part, "lora_A") and _NAME in part.lora_A
    }
    return Adapters(lora, layers)
