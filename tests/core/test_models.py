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


@pytest.mark.parametrize("num_bytes", [0, 4, 1000, -1])
def test_weights_that_are_cut_short_are_one_line(toy_teacher: Path, tmp_path: Path, num_bytes: int) -> None:
    shutil.copytree(toy_teacher, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match=r"the student's weights cannot be read: .*found \d+ bytes.*cut short"):
        locate_model(str(tmp_path / "cut"), "student")


def test_a_missing_file_of_weights_is_one_line(toy_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_teacher, tmp_path / "two")
    index = tmp_path / "two" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(UserError, match=r"1 files of the student's weights are missing: found no model-2\.safetensors"):
        locate_model(str(tmp_path / "two"), "student")
    index.write_text("{")
    with pytest.raises(UserError, match="the student's index of weights cannot be read"):
        locate_model(str(tmp_path / "two"), "student")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 128}, "have other shapes than the config says"),
        ({"num_hidden_layers": 9}, r"lack some that the config asks for: found \d+, the first: model\.layers\."),
        ({"num_hidden_layers": 1}, "have layers that the config does not"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_one_line(
    toy_teacher: Path, tmp_path: Path, values: dict[str, int], message: str
) -> None:
    """transformers draws missing weights at random, and leaves surplus ones out."""
    model = locate_model(_changed(toy_teacher, tmp_path / "other", "config.json", **values), "teacher")
    with pytest.raises(UserError, match=f"the model's weights {message}"):
        model.load("float32")
    locate_model(str(toy_teacher), "teacher").load("float32")


def test_a_generation_config_that_is_none_is_one_line(toy_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_teacher, tmp_path / "gen")
    path = tmp_path / "gen" / "generation_config.json"
    odd = {"{": "is not JSON", "[]": "is not", '{"eos_token_id": "x"}': "is no token id: found 'x'"}
    for text, message in odd.items():
        path.write_text(text)
        with pytest.raises(UserError, match=f"generation config {message}"):
            locate_model(str(tmp_path / "gen"), "teacher").stop_token_ids()
