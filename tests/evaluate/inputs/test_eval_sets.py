"""Which rows are evaluated: the same for all models, with all skipped rows listed; and which models are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpkd.core.errors import UserError
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.evaluate.inputs.eval_sets import EvalSet, read_eval_sets
from dpkd.evaluate.inputs.models import open_candidates
from dpkd.evaluate.options.eval import EvalConfig

MakeConfig = Callable[..., EvalConfig]
WriteRows = Callable[[list[dict[str, Any]], str], Path]


def _read(config: EvalConfig) -> list[EvalSet]:
    return read_eval_sets(config, open_candidates(config))


def test_rows_that_cannot_be_evaluated_are_named_by_line(
    toy_teacher: Path, make_config: MakeConfig, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user", "assistant")]
    path = write_rows(
        [
            {"id": "good", "instruction": "Say it", "output": ["yes", "yeah"]},
            {"instruction": "Say it"},
            {"instruction": "word " * 300, "output": "long prompt"},
            {"messages": turns},
            {"instruction": 5, "output": "malformed"},
            {"id": "good", "instruction": "Say it again", "output": "same id"},
        ],
        "d.jsonl",
    )
    (eval_set,) = _read(make_config(model=f"m={toy_teacher}", data=f"d={path}"))
    assert [example.example_id for example in eval_set.examples] == ["good"]
    assert [prompt.text for prompt in eval_set.prompts["m"]] == ["Say it"]
    reasons = {row.line: row.reason for row in eval_set.skipped}
    assert sorted(reasons) == [2, 3, 4, 5, 6]
    assert reasons[2] == "no reference to score against"
    assert reasons[3].endswith("tokens for model m, over 48")
    assert "takes one user turn, the row has 3" in reasons[4]
    assert "not text" in reasons[5]
    assert "earlier line" in reasons[6]
    said = capsys.readouterr().err
    assert "data d: 1 rows evaluated, 5 left out" in said
    assert "line 2: no reference to score against" in said
    assert "and 2 more" in said


def test_the_longest_prompt_that_fits_is_kept(
    toy_teacher: Path, make_config: MakeConfig, write_rows: WriteRows
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_teacher)
    texts = ["one two three four", "one two three four five six seven eight"]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert lengths[0] < lengths[1]
    path = write_rows([{"instruction": text, "output": "x"} for text in texts], "d.jsonl")
    for limit, kept in ((lengths[1], 2), (lengths[1] - 1, 1)):
        config = make_config(model=f"m={toy_teacher}", data=f"d={path}", max_prompt_tokens=limit)
        assert len(_read(config)[0].examples) == kept


def test_a_row_too_long_for_one_model_is_left_out_for_all(
    toy_teacher: Path, toy_student: Path, make_config: MakeConfig, write_rows: WriteRows, tmp_path: Path
) -> None:
    # the same checkpoint with a tokenizer of one token a character
    wordy = tmp_path / "wordy"
    shutil.copytree(toy_student, wordy)
    _character_tokenizer().save_pretrained(wordy)
    texts = ["short", "a line of sixty characters or so, which is fewer tokens elsewhere"]
    path = write_rows([{"instruction": text, "output": "x"} for text in texts], "d.jsonl")
    few = max(len(AutoTokenizer.from_pretrained(toy_teacher).encode(text)) for text in texts)
    assert few < 48 < len(texts[1])
    alone = _read(make_config(model=f"a={toy_teacher}", data=f"d={path}"))[0]
    assert len(alone.examples) == 2
    both = _read(make_config(model=[f"a={toy_teacher}", f"b={wordy}"], data=f"d={path}"))[0]
    assert [example.line for example in both.examples] == [1]
    assert len(both.prompts["a"]) == len(both.prompts["b"]) == 1
    assert len(both.prompts["b"][0].ids) == 5
    assert both.skipped[0].reason == f"prompt of {len(texts[1])} tokens for model b, over 48"


def _character_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_limit_counts_rows_of_the_file(
    toy_teacher: Path, make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]]
) -> None:
    del rows[0]["output"]
    config = make_config(model=f"m={toy_teacher}", data=f"d={write_rows(rows, 'd.jsonl')}", limit=3)
    (eval_set,) = _read(config)
    assert [example.line for example in eval_set.examples] == [2, 3]


def test_a_set_of_which_no_row_is_left_is_refused(
    toy_teacher: Path, make_config: MakeConfig, write_rows: WriteRows
) -> None:
    path = write_rows([{"instruction": "Say it"}], "d.jsonl")
    with pytest.raises(UserError, match=r"no row of data d can be evaluated: found line 1: no reference"):
        _read(make_config(model=f"m={toy_teacher}", data=f"d={path}"))


def test_a_missing_model_is_named(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"the model m is not found: found no directory '\./nowhere'"):
        open_candidates(make_config(model="m=./nowhere", data="d=d.jsonl"))


def test_lengths_over_the_models_positions_are_refused(toy_teacher: Path, make_config: MakeConfig) -> None:
    positions = json.loads((toy_teacher / "config.json").read_text())["max_position_embeddings"]
    config = make_config(model=f"m={toy_teacher}", data="d=d.jsonl", max_new_tokens=positions)
    with pytest.raises(UserError, match=rf"the model's positions: .*expected at most {positions} .*Lower --max"):
        open_candidates(config)
    open_candidates(config.model_copy(update={"max_new_tokens": positions - 48}))


@pytest.fixture
def trained(toy_student: Path, tmp_path: Path) -> Path:
    """A copy of the student, for a dpkd.json of its own."""
    return Path(shutil.copytree(toy_student, tmp_path / "trained"))


def test_the_template_of_a_checkpoints_training_is_required(trained: Path, make_config: MakeConfig) -> None:
    alpaca = PromptEncoder(AutoTokenizer.from_pretrained(trained), "alpaca").identity()
    config = make_config(model=f"m={trained}", data="d=d.jsonl")
    (trained / "dpkd.json").write_text(json.dumps({"template": alpaca, "step": 5}))
    with pytest.raises(UserError, match=r"found alpaca .*expected raw .*dpkd\.json.*Give --template alpaca"):
        open_candidates(config)
    (candidate,) = open_candidates(config.model_copy(update={"template": "alpaca"}))
    assert candidate.identity["template"] == alpaca


def test_a_template_of_the_same_name_and_other_text_is_refused(trained: Path, make_config: MakeConfig) -> None:
    (trained / "dpkd.json").write_text(json.dumps({"template": {"name": "raw", "sha256": "0" * 64}}))
    with pytest.raises(UserError, match=r"another prompt template of the same name: .*raw \(sha256 000000000000\)"):
        open_candidates(make_config(model=f"m={trained}", data="d=d.jsonl"))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"template": "raw"}'])
def test_a_dpkd_json_without_a_template_is_refused(trained: Path, make_config: MakeConfig, content: str) -> None:
    (trained / "dpkd.json").write_text(content)
    with pytest.raises(UserError, match=r"dpkd\.json has no template.*Delete the file"):
        open_candidates(make_config(model=f"m={trained}", data="d=d.jsonl"))
