"""Sets by name, rows with other field names, and rows that are also in the training data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpkd.core.errors import UserError
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.inputs.eval_sets import read_eval_sets
from dpkd.evaluate.inputs.named_sets import resolve_sets
from dpkd.evaluate.options.eval import EvalConfig

MakeConfig = Callable[..., EvalConfig]
WriteRows = Callable[[list[Any], str], Path]
_GIVEN = {"predictions": "p=p.jsonl"}


def test_a_known_name_is_found_in_the_data_directory(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPKD_DATA", raising=False)
    (tmp_path / "sinst" / "11_").mkdir(parents=True)
    for name in ("dolly_eval.jsonl", "sinst/11_/valid.jsonl"):
        (tmp_path / name).write_text("")
    data = ["dolly", "s-ni", "other=set:dolly", "mine=x.jsonl"]
    expected = {
        "dolly": str(tmp_path / "dolly_eval.jsonl"),
        "s-ni": str(tmp_path / "sinst/11_/valid.jsonl"),
        "other": str(tmp_path / "dolly_eval.jsonl"),
        "mine": "x.jsonl",
    }
    assert resolve_sets(make_config(**_GIVEN, data=data, data_dir=tmp_path)) == expected
    with pytest.raises(
        UserError, match=r"there is no data directory for the set 'dolly' .*--data-dir DIR.*DPKD_DATA.*dolly=FILE"
    ):
        resolve_sets(make_config(**_GIVEN, data=data))
    monkeypatch.setenv("DPKD_DATA", str(tmp_path))
    assert resolve_sets(make_config(**_GIVEN, data=data)) == expected
    with pytest.raises(UserError, match=r"'vicuna' is not in the data directory: found dolly_eval\.jsonl, sinst, exp"):
        resolve_sets(make_config(**_GIVEN, data="vicuna"))
    with pytest.raises(UserError, match=r"found no such directory"):
        resolve_sets(make_config(**_GIVEN, data="unni", data_dir=tmp_path / "none"))
    with pytest.raises(UserError, match=r"no set has this name: found 'x', expected dolly, "):
        resolve_sets(make_config(**_GIVEN, data="x=set:x"))


def _rows() -> list[dict[str, Any]]:
    return [
        {"question": "Why?", "answers": ["because", "so"], "instruction": "not this", "uid": 7},
        {"question": "Who?", "answers": ["me"], "instruction": "nor this", "uid": 8},
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_fields_by_option(make_config: MakeConfig, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(_rows()), path)
    else:
        path.write_text(json.dumps(_rows()) if suffix == "json" else "\n".join(map(json.dumps, _rows())))
    fields = ["instruction=question", "output=answers", "id=uid"]
    config = make_config(**_GIVEN, data=f"d={path}", field=fields)
    (eval_set,) = read_eval_sets(config, [])
    assert [example.instruction for example in eval_set.examples] == ["Why?", "Who?"]
    assert [example.references for example in eval_set.examples] == [("because", "so"), ("me",)]
    assert [example.example_id for example in eval_set.examples] == ["7", "8"]
    plain = make_config(**_GIVEN, data=f"d={path}", field=["output=answers"])
    assert read_eval_sets(plain, [])[0].identity != eval_set.identity


def test_unknown_fields_are_refused(make_config: MakeConfig, write_rows: WriteRows) -> None:
    path = write_rows(_rows(), "d.jsonl")
    with pytest.raises(UserError, match=r"no row has the field .*found question, answers, .*expected reply .*d\.jsonl"):
        read_eval_sets(make_config(**_GIVEN, data=f"d={path}", field="output=reply"), [])
    with pytest.raises(UserError, match=r"the name 'reply' is not one of instruction, input, output"):
        make_config(**_GIVEN, data=f"d={path}", field="reply=answers")
    path.write_text("{oops")
    with pytest.raises(UserError, match=r"line 1 is not JSON: .*d\.jsonl"):
        read_eval_sets(make_config(**_GIVEN, data=f"d={path}", field="output=answers"), [])


def test_the_reference_of_chat_rows_is_the_last_assistant_turn(make_config: MakeConfig, write_rows: WriteRows) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(["user", "assistant"] * 2)]
    path = write_rows([{"chat": turns}, {"chat": turns[:3]}], "d.jsonl")
    (eval_set,) = read_eval_sets(make_config(**_GIVEN, data=f"d={path}", field="messages=chat"), [])
    assert [example.references for example in eval_set.examples] == [("assistant 3",)]
    assert eval_set.prompt_text("p", 0, []) == "user 0\n\nassistant 1\n\nuser 2"
    assert eval_set.num_without_reference == 1


def test_prompts_of_the_training_data_are_counted(
    make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows[3]["input"] = "with this"
    trained_on = [
        {"instruction": " say  1", "output": "another answer"},
        {"instruction": "Say 3", "output": "without the input"},
        {"messages": [{"role": "user", "content": "Say 4"}, {"role": "assistant", "content": "x"}]},
    ]
    config = make_config(
        predictions=f"p={write_rows([{'prediction': 'x'}] * 6, 'p.jsonl')}",
        data=f"d={write_rows(rows, 'd.jsonl')}",
        train_data=str(write_rows(trained_on, "t.jsonl")),
    )
    path = evaluate(config)
    report = json.loads(path.read_text())
    assert report["duplicates"]["rows"] == {"d": ["row-1", "row-4"]}
    assert report["identities"]["train_data"] == report["duplicates"]["train_data"]
    assert "data d: 2 prompts are also in the training data" in capsys.readouterr().err
    assert "## d (6 rows, 2 prompts also in the training data)" in (config.out / "report.md").read_text()
    assert evaluate(config) == path  # complete already


def test_other_scripts_are_reported_and_scored_with_another_tokenizer(
    make_config: MakeConfig, write_rows: WriteRows, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "\u732b\u304c\u5ea7\u3063\u305f"
    options = {
        "predictions": f"p={write_rows([{'prediction': text}], 'p.jsonl')}",
        "data": f"d={write_rows([{'instruction': 'Say', 'output': text}], 'd.jsonl')}",
    }
    config = make_config(**options)
    report = json.loads(evaluate(config).read_text())
    assert report["models"]["p"]["data"]["d"]["rouge_l"]["mean"] == 0.0
    assert "data d: of 1 rows, 1 have no reference with a letter a-z" in capsys.readouterr().err
    assert "- Rouge loses text here: of 1 rows, 1 have" in (config.out / "report.md").read_text()
    config = make_config(**options, rouge_tokenizer="character", out=tmp_path / "other")
    report = json.loads(evaluate(config).read_text())
    assert report["models"]["p"]["data"]["d"]["rouge_l"]["mean"] == 100.0
    assert "loses text" not in (config.out / "report.md").read_text()
    assert "(tokens: character)" in (config.out / "report.md").read_text()
