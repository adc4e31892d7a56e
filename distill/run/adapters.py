"""LoRA through `peft`: adapters on frozen linear layers, saved by themselves or merged into the weights."""

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

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the student's own names inside peft's wrapper


def check_adapters(source: ModelSource, config: TrainConfig) -> None:
    """Raise `UserError` when peft is missing, or `lora_target_modules` names no linear layer of the student."""
    if config.lora_rank is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora-rank needs the package peft, which is not installed", advice="pip install 'dpkd[lora]'")
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
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
    """Freeze `model` and add adapters to it, in place; they compute 0 until they are trained.

    Their random initial weights depend on the seed alone. The wrapper that is returned saves and loads them.
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
    lora.base_model_name_or_path = config.student  # peft fills in the path of a hub's snapshot on this machine
    return adapters


def save_adapters(adapters: PeftModel, directory: Path, weights: dict[str, Tensor]) -> None:
    """Write the adapters among `weights`, which have the student's own names, to `directory` in peft's format."""
    named = {f"{_PREFIX}{name}": value for name, value in weights.items()}
    # peft would otherwise ask the hub whether the vocabulary was resized
    adapters.save_pretrained(str(directory), state_dict=named, save_embedding_layers=False)
    (directory / "README.md").unlink()  # peft's template; a finished student gets its own model card


def load_adapters(adapters: PeftModel, directory: Path) -> None:
    """Copy the adapters saved in `directory` into the model that `adapters` wraps."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(adapters, load_file(directory / _WEIGHTS))


def merge_adapters(adapters: PeftModel, source: ModelSource, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The student of `source`, loaded again, with the adapters among `weights` merged into its own weights.

    The model in training stays as it is. Takes the memory of one student in float32 on the CPU.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    named = {f"{_PREFIX}{name}": value for name, value in weights.items()}
    saved = get_peft_model_state_dict(adapters, named, save_embedding_layers=False)
    lora = copy.deepcopy(adapters.peft_config["default"])
    # adapters have no memory until they are set: no random numbers are drawn in the middle of a run
    student = get_peft_model(source.load("float32"), lora, low_cpu_mem_usage=True)
    set_peft_model_state_dict(student, saved, low_cpu_mem_usage=True)
    return cast("PreTrainedModel", student.merge_and_unload())
