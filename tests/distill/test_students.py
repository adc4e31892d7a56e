"""Students made of a teacher's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, OPTConfig, Qwen2Config

from dpkd.distill.config import InitStudentConfig
from dpkd.distill.students import init_student, keep_layers, spread_layers
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.models import locate_model

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=6, n_head=2),
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1),
    "gemma3": Gemma3TextConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, head_dim=8),
}


def test_layers_are_spread_from_first_to_last() -> None:
    assert spread_layers(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert spread_layers(12, 1) == [0]
    assert spread_layers(4, 4) == [0, 1, 2, 3]


def test_a_student_has_the_layers_and_tokenizer_of_its_teacher(tmp_path: Path, toy_teacher: Path) -> None:
    out = init_student(InitStudentConfig(teacher=str(toy_teacher), out=tmp_path / "s", layers=1))
    teacher, student = (locate_model(str(path), "model") for path in (toy_teacher, out))
    assert student.config.num_hidden_layers == 1
    assert student.tokenizer_identity() == teacher.tokenizer_identity()
    assert student.stop_token_ids() == teacher.stop_token_ids()
    ours, theirs = student.load("float32").state_dict(), teacher.load("float32").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # again with the same options: left alone; with others: refused
    before = (out / "model.safetensors").stat().st_mtime_ns
    init_student(InitStudentConfig(teacher=str(toy_teacher), out=out, layers=1))
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds another student; differing: layers: 1 -> 2"):
        init_student(InitStudentConfig(teacher=str(toy_teacher), out=out, layers=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_layer_is_the_teacher(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    ids = torch.arange(1, 12)[None]
    same = keep_layers(model, list(range(6))).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, same(input_ids=ids).logits)
    fewer = keep_layers(model, [0, 5])
    assert fewer.config.num_hidden_layers == 2
    assert len([name for name in fewer.state_dict() if ".1." in name]) > 0


def test_more_layers_than_the_teacher_is_an_error(tmp_path: Path, toy_teacher: Path) -> None:
    with pytest.raises(UserError, match="more layers than the teacher: found 9, expected at most 2"):
        init_student(InitStudentConfig(teacher=str(toy_teacher), out=tmp_path / "s", layers=9))
    assert not (tmp_path / "s").exists()


def test_another_directory_is_not_overwritten(tmp_path: Path, toy_teacher: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than a student"):
        init_student(InitStudentConfig(teacher=str(toy_teacher), out=tmp_path, layers=1))
