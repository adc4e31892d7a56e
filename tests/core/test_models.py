"""What a model is: its tokenizer by content and by what it does, and directories that hold no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model


def _changed(source: Path, directory: Path, name: str, **values: object) -> str:
    shutil.copytree(source, directory)
    settings = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(settings | values))
    return str(directory)


def test_split_special_tokens_makes_another_tokenizer(toy_teacher: Path, tmp_path: Path) -> None:
    model = locate_model(str(toy_teacher), "teacher")
    splitting = _changed(toy_teacher, tmp_path / "split", "tokenizer_config.json", split_special_tokens=True)
    other = locate_model(splitting, "teacher")
    assert other.tokenizer.encode("<|end|>") != model.tokenizer.encode("<|end|>")
    assert other.tokenizer_identity() != model.tokenizer_identity()
    assert other.tokenizer_probe() != model.tokenizer_probe()


def test_what_changes_no_id_makes_no_other_tokenizer(toy_teacher: Path, tmp_path: Path) -> None:
    model = locate_model(str(toy_teacher), "teacher")
    padded = _changed(
        toy_teacher, tmp_path / "pad", "tokenizer_config.json", pad_token="<|user|>", model_max_length=64,
        padding_side="left", truncation_side="left",
    )  # fmt: skip
    other = locate_model(padded, "teacher")
    assert other.tokenizer_identity() == model.tokenizer_identity()
    assert other.tokenizer_probe() == model.tokenizer_probe()


def test_a_tokenizer_with_other_rules_and_the_same_content_is_found_by_its_ids(
    toy_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a class of its own would, or another version of the library."""
    model, other = locate_model(str(toy_teacher), "teacher"), locate_model(str(toy_teacher), "teacher")
    encode = type(other.tokenizer).encode
    monkeypatch.setattr(
        other.tokenizer, "encode", lambda text, **options: encode(other.tokenizer, text.lower(), **options)
    )
    assert other.tokenizer_identity() == model.tokenizer_identity()
    assert other.tokenizer_probe() != model.tokenizer_probe()


@pytest.mark.parametrize("with_model", [True, False])
def test_an_adapter_is_no_model(toy_teacher: Path, tmp_path: Path, with_model: bool) -> None:
    directory = tmp_path / "adapter"
    if with_model:
        shutil.copytree(toy_teacher, directory)
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the teacher's directory holds an adapter.*merge it first.*merge_and_unload"):
        locate_model(str(directory), "teacher")
    if with_model:  # a server's weights are not read here
        assert locate_model(str(directory), "teacher", needs_weights=False).vocab_size == 600
