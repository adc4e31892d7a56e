"""Make a student: a smaller model of the same family and tokenizer, from the teacher's own layers."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dpkd.distill.config import InitStudentConfig
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.identity import canonical_json, differences
from dpkd.teacher_cache.models import ModelSource, locate_model
from dpkd.teacher_cache.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARKER = "dpkd-student.json"
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def init_student(config: InitStudentConfig) -> Path:
    """Write a student of `config.layers` of the teacher's layers to `config.out`; the directory.

    A student made from the same teacher with the same options is left as it is; other content is an error.
    """
    teacher = locate_model(config.teacher, "teacher")
    made_of = {"teacher": teacher.identity("float32"), "layers": config.layers}
    if _is_made(config.out, made_of):
        say(f"the student {config.out} is complete")
        return config.out
    num_layers = int(teacher.config.get_text_config().num_hidden_layers)
    if config.layers > num_layers:
        raise UserError(
            "the student would have more layers than the teacher",
            found=config.layers,
            expected=f"at most {num_layers}",
            where=config.teacher,
        )
    kept = spread_layers(num_layers, config.layers)
    student = keep_layers(teacher.load("float32"), kept)
    temporary = config.out.with_name(f".{config.out.name}.{os.getpid()}.tmp")
    student.save_pretrained(temporary)
    copy_tokenizer(teacher, temporary)
    (temporary / _MARKER).write_bytes(canonical_json(made_of))
    (temporary / "dpkd.toml").write_text(config.to_toml(), encoding="utf-8")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.out.is_dir():
        config.out.rmdir()  # empty, as checked above
    temporary.replace(config.out)
    count = sum(parameter.numel() for parameter in student.parameters())
    say(f"the student {config.out}: layers {', '.join(map(str, kept))} of {num_layers}, {count / 1e6:.1f}M parameters")
    return config.out


def _is_made(out: Path, made_of: dict[str, object]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / _MARKER).is_file():
        raise UserError("the output holds something else than a student", where=out, advice="Choose another --out")
    held = json.loads((out / _MARKER).read_bytes())
    if canonical_json(held) != canonical_json(made_of):
        raise UserError(
            f"the output holds another student; differing: {'; '.join(differences(held, made_of))}",
            where=out,
            advice="Choose another --out",
        )
    return True


def spread_layers(num_layers: int, num_kept: int) -> list[int]:
    """`num_kept` of `num_layers` layers, evenly from the first to the last (the first alone for one)."""
    if num_kept == 1:
        return [0]
    return [round(place * (num_layers - 1) / (num_kept - 1)) for place in range(num_kept)]


def keep_layers(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A model of the same family with the layers `kept` and everything else copied."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    num_layers = text_config.num_hidden_layers
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.count(".") <= 2
    ]
    if len(stacks) != 1:
        raise UserError(
            "the teacher's layers are not found: its modules hold not exactly one stack of them",
            found=stacks,
            expected=f"one list of {num_layers} layers",
        )
    text_config.num_hidden_layers = len(kept)
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = [text_config.layer_types[layer] for layer in kept]
    student = AutoModelForCausalLM.from_config(config)
    place = {str(layer): str(index) for index, layer in enumerate(kept)}
    prefix = stacks[0] + "."
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith(prefix):
            layer, _, rest = name[len(prefix) :].partition(".")
            if layer not in place:
                continue
            name = f"{prefix}{place[layer]}.{rest}"
        weights[name] = value
    student.load_state_dict(weights)
    student.generation_config = model.generation_config
    return student


def copy_tokenizer(source: ModelSource, directory: Path) -> None:
    """The tokenizer's own files, byte for byte: saving it anew could change them."""
    for pattern in _TOKENIZER_FILES:
        for file in source.path.glob(pattern):
            shutil.copyfile(file, directory / file.name)
