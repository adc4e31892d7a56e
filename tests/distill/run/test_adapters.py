"""LoRA: only adapters are trained, saved students compute the same, and an interrupt loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.adapters import add_adapters
from dpkd.distill.training import train


def config(out: Path, cache: Path, student: Path, **options: object) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 5, "learning_rate": 1e-2, "device": "cpu", "lora_rank": 4}
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(defaults | options))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toy_cache: Path, toy_student: Path) -> tuple[Path, Path]:
    """The same run twice: written merged, and as adapters."""
    directory = tmp_path_factory.mktemp("runs")
    merged = train(config(directory / "merged", toy_cache, toy_student, save_every=2))
    return merged, train(config(directory / "adapter", toy_cache, toy_student, save_every=2, lora_save="adapter"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(1, 40)[None]).logits


def test_merged_weights_compute_what_the_adapters_do(runs: tuple[Path, Path], toy_student: Path) -> None:
    """Against peft: it reads our adapter, and its own merge gives our merged weights."""
    merged, adapter = runs
    base = AutoModelForCausalLM.from_pretrained(toy_student)
    before = logits(base)
    with_adapter = PeftModel.from_pretrained(base, adapter)
    ours = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(with_adapter) - before).abs().max() > 0.1
    assert torch.allclose(logits(ours), logits(with_adapter), atol=1e-4)
    theirs = with_adapter.merge_and_unload().state_dict()
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, theirs[name], atol=1e-6), name


def test_the_weights_beneath_stay_as_they_are(runs: tuple[Path, Path], toy_student: Path) -> None:
    """Merged weights minus the adapters are the initial student; other layers are equal bit for bit."""
    merged, adapter = runs
    base, ours, deltas = (
        load_file(toy_student / "model.safetensors"),
        load_file(merged / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert set(ours) == set(base)
    changed = {name for name in base if not torch.equal(base[name], ours[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    for name in changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        delta = deltas[f"{stem}.lora_B.weight"] @ deltas[f"{stem}.lora_A.weight"] * 2
        assert torch.allclose(ours[name] - delta, base[name], atol=1e-6), name


def test_what_a_directory_of_adapters_holds(runs: tuple[Path, Path], toy_student: Path) -> None:
    _, adapter = runs
    assert not (adapter / "model.safetensors").exists()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == str(toy_student)
    card = (adapter / "README.md").read_text()
    assert "library_name: peft\n" in card
    assert "LoRA of rank 4, adapter" in card
    checkpoint = adapter / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()


def test_resuming_is_bitwise(tmp_path: Path, runs: tuple[Path, Path], toy_cache: Path, toy_student: Path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    for name in ("run.json", "model.safetensors", "config.json"):
        (run / name).unlink()
    train(config(run, toy_cache, toy_student, save_every=2))
    ours, theirs = (load_file(path / "model.safetensors") for path in (run, runs[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_give_the_adapters_of_one(
    tmp_path: Path, runs: tuple[Path, Path], toy_cache: Path, toy_student: Path
) -> None:
    from support.commands import TwoRanks

    out = tmp_path / "run"
    shared = {"out": out, "cache": toy_cache, "student": toy_student, "device": "cpu", "lora_rank": 4}
    changed = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "sharding": "fsdp2"}
    reference = train(config(tmp_path / "one", toy_cache, toy_student, batch_size=4))
    TwoRanks(shared | changed).finish()
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, reference))
    assert set(ours) == set(theirs)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in theirs)


def test_some_modules_only(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    values = {"cache": str(toy_cache), "student": str(toy_student), "out": str(tmp_path / "run"), "device": "cpu"}
    values |= {"lora_rank": "2", "lora_alpha": "2", "lora_target_modules": "q_proj, v_proj", "steps": "1"}
    options = TrainConfig.parse(values, where="here")
    model = AutoModelForCausalLM.from_pretrained(toy_student)
    add_adapters(model, options)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"}
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    wrong = options.model_copy(update={"lora_target_modules": ("w_proj",)})
    with pytest.raises(UserError, match=r"no linear layer of the student: found w_proj, expected some of down_proj, "):
        train(wrong)
    assert not wrong.out.exists()


@pytest.mark.parametrize("option", [{"lora_alpha": 8}, {"lora_target_modules": "q_proj"}, {"lora_save": "adapter"}])
def test_options_of_adapters_need_a_rank(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs --lora-rank"):
        TrainConfig.parse({"cache": "c", "student": "s", "out": "o"} | option, where="here")
