"""LoRA through `peft`: adapters on frozen linear layers, saved alone or merged into the weights."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.student.sizes import skeleton

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # that peft's wrapper puts before the student's own names


def check_adapters(source: ModelSource, config: TrainConfig) -> None:
    """Raise `UserError` when peft is missing, or `lora_target_modules` names no linear layer of the student."""
    if config.lora_rank is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "--lora-rank needs the package peft, which is not installed",
            advice="In the clone: pip install -e '.[lora]'",
        )
    from transformers.pytorch_utils import Conv1D

    names = [
        name for name, module in skeleton(source.config).named_modules() if isinstance(module, (nn.Linear, Conv1D))
    ]
    for target in config.lora_target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                "lora_target_modules names no linear layer of the student",
                found=target,
                expected=f"some of {', '.join(known)}",
                where=source.name,
                advice="Leave it out to add adapters to every linear layer except the head",
            )


def add_adapters(model: Any, config: TrainConfig) -> PeftModel:
    """Freeze `model` and add adapters to it, in place; returns the wrapper that saves and loads them.

    Their random initial weights depend on the seed alone. Until they are trained, they change no output.
    """
    from peft import LoraConfig, get_peft_model

    assert config.lora_rank is not None  # the caller's choice
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_rank,  # type: ignore[arg-type]
        target_modules=list(config.lora_target_modules) or "all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    adapters = get_peft_model(model, lora)
    lora.base_model_name_or_path = config.student  # peft would fill in a local path for a model from a hub
    return adapters


def save_adapters(adapters: PeftModel, directory: Path, weights: dict[str, Tensor]) -> None:
    """Write the adapters in `weights`, under the student's own names, to `directory` in peft's format."""
    named = {f"{_PREFIX}{name}": value for name, value in weights.items()}
    # peft would otherwise ask the hub whether the vocabulary was resized
    adapters.save_pretrained(str(directory), state_dict=named, save_embedding_layers=False)
    (directory / "README.md").unlink()  # peft's template; a finished student gets its own model card


def load_adapters(adapters: PeftModel, directory: Path) -> None:
    """Copy the adapters saved in `directory` into the model that `adapters` wraps."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(adapters, load_file(directory / _WEIGHTS))


def merge_adapters(adapters: PeftModel, source: ModelSource, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The student of `source`, loaded again, with the adapters in `weights` merged into its own weights.

    The model in training does not change. Needs the memory of one student in float32 on the CPU.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    named = {f"{_PREFIX}{name}": value for name, value in weights.items()}
    saved = get_peft_model_state_dict(adapters, named, save_embedding_layers=False)
    lora = copy.deepcopy(adapters.peft_config["default"])
    # with `low_cpu_mem_usage`, new adapters are not initialised: no random numbers are drawn in the middle of a run
    student = get_peft_model(source.load("float32"), lora, low_cpu_mem_usage=True)
    set_peft_model_state_dict(student, saved, low_cpu_mem_usage=True)
    return cast("PreTrainedModel", student.merge_and_unload())
