"""Conversations in an evaluation: later questions come after the model's own answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.conversations import conversations, make_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.core.errors import UserError
from dpkd.core.prompts.examples import Example
from dpkd.core.prompts.sources import iter_examples, open_examples
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.inputs.turns import questions
from dpkd.evaluate.judge.questions import defuse, read_prompt
from dpkd.evaluate.judge.rows import choose, make_questions, read_answers
from dpkd.evaluate.merge.merge import merge
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.options.merge import MergeConfig

MakeConfig = Callable[..., EvalConfig]
BENCH = {
    "question_id": 7,
    "category": "math",
    "turns": ["What is 2 + 2?", "And twice that?", "And half of it?"],
    "reference": ["4", "8", "4"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("turns"))


def examples(path: Path) -> list[Example]:
    return [item for item in iter_examples(open_examples(str(path))) if isinstance(item, Example)]


def test_questions_of_a_conversation(write_rows: Any) -> None:
    bench, two, tools = examples(write_rows([BENCH, *conversations()[1:3]]))
    assert (bench.example_id, bench.references) == ("7", ("4",))
    assert [question.example_id for question, _ in questions(bench, "last")] == ["7"]
    asked = list(questions(bench, "all"))
    assert [question.example_id for question, _ in asked] == ["7/turn-1", "7/turn-2", "7/turn-3"]
    assert [question.references for question, _ in asked] == [("4",), ("8",), ("4",)]
    third, follow_up = asked[2]
    assert follow_up is not None
    assert third.messages is not None
    assert [turn.content for turn in third.messages] == BENCH["turns"]
    own = follow_up.asked(["five", "ten"])
    assert own.messages is not None
    assert [(turn.role, turn.content) for turn in own.messages] == [
        ("user", "What is 2 + 2?"), ("assistant", "five"), ("user", "And twice that?"), ("assistant", "ten"),
        ("user", "And half of it?"),
    ]  # fmt: skip
    # answers that the row gives are references here, and the model's own take their place
    _, (second, follow_up) = questions(two, "all")
    assert second.references == ("The Tiber.",)
    assert follow_up is not None
    assert [turn.content for turn in follow_up.asked(["Milan?"]).messages or ()][1] == "Milan?"
    # calls of tools stay as they are given
    first, last = questions(tools, "all")
    assert (first[0].references, last[0].references) == (("It is warm.",), ("The Tiber.",))
    assert last[1] is not None
    assert [turn.role for turn in last[1].asked(["Hot!"]).messages or ()] == [
        "user", "assistant", "tool", "assistant", "user",
    ]  # fmt: skip


def test_a_turn_without_a_reference_ends_the_questions(write_rows: Any) -> None:
    [bench] = examples(write_rows([BENCH | {"reference": ["4", ""]}]))
    assert [question.references for question, _ in questions(bench, "all")] == [("4",), ()]


def test_a_model_is_asked_after_its_own_answers(
    models: tuple[Path, Path], make_config: MakeConfig, write_rows: Any, tmp_path: Path
) -> None:
    rows = [BENCH, {"id": "plain", "messages": conversations()[0]["messages"]}, {"turns": ["Why?", "How?"]}]
    options: dict[str, Any] = {
        "data": [f"bench={write_rows(rows)}"], "template": "chat", "turns": "all", "max_prompt_tokens": 200,
        "seeds": "1", "temperature": 0.0, "max_new_tokens": 8,
    }  # fmt: skip
    config = make_config(model=[f"a={models[0]}", f"b={models[1]}"], **options)
    evaluate(config)
    scored = pq.read_table(config.out / "per_example.parquet").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    for name, path in zip("ab", models, strict=True):
        of_model = {row["example_id"]: row for row in scored if row["model"] == name}
        assert list(of_model) == ["7/turn-1", "7/turn-2", "7/turn-3", "plain"]
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        said: list[dict[str, str]] = []
        for number, question in enumerate(BENCH["turns"], start=1):  # type: ignore[arg-type]
            said.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                drawn = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            row = of_model[f"7/turn-{number}"]
            assert row["prompt"] == prompt
            assert row["response"] == tokenizer.decode(drawn, skip_special_tokens=True)
            assert row["references"] == [BENCH["reference"][number - 1]]  # type: ignore[index]
            said.append({"role": "assistant", "content": row["response"]})
    report = json.loads((config.out / "report.json").read_text())
    assert [row["line"] for row in report["skipped"]["bench"]] == [3]


def test_a_follow_up_that_may_not_fit_is_left_out_for_all(
    models: tuple[Path, Path], make_config: MakeConfig, write_rows: Any
) -> None:
    config = make_config(
        model=[f"a={models[0]}"], data=[f"bench={write_rows([BENCH])}"], template="chat", turns="all", seeds="1",
        max_prompt_tokens=80, max_new_tokens=20,
    )  # fmt: skip
    evaluate(config)
    skipped = json.loads((config.out / "report.json").read_text())["skipped"]["bench"]
    assert len(skipped) == 1
    assert "of them for its own answers, over 80" in skipped[0]["reason"]


def test_a_merged_report_and_a_judge_show_each_seed_after_its_own_answers(
    models: tuple[Path, Path], make_config: MakeConfig, write_rows: Any, tmp_path: Path
) -> None:
    config = make_config(
        model=[f"a={models[0]}"], data=[f"bench={write_rows([BENCH])}"], template="chat", turns="all", seeds="1,2",
        max_prompt_tokens=200, max_new_tokens=8,
    )  # fmt: skip
    evaluate(config)
    asked = {
        (row["seed"], row["example_id"]): row["prompt"]
        for row in pq.read_table(config.out / "per_example.parquet").to_pylist()
    }
    assert asked[1, "7/turn-2"] != asked[2, "7/turn-2"]
    merged = merge(MergeConfig(evaluations=(str(config.out),), out=tmp_path / "merged"))
    rows = pq.read_table(merged.parent / "per_example.parquet").to_pylist()
    assert {(row["seed"], row["example_id"]): row["prompt"] for row in rows} == asked
    about = json.loads(merged.read_text())["data"]["bench"]
    assert (about["n"], about["num_rows"], about["num_not_common"]) == (3, 1, 0)
    options = {"report": config.out, "out": tmp_path, "judge_url": "http://h/v1", "judge_model": "j"}
    for which, seeds in (("first", {1}), ("all", {1, 2})):
        judged = JudgeConfig.parse(options | {"answer_seeds": which}, where="a test")
        questions_of = list(make_questions(choose(read_answers(judged), judged), judged, read_prompt(None, "score")))
        assert {question.seed for question in questions_of} == seeds
        for question in questions_of:
            assert defuse(asked[question.seed, question.row.example_id]) in question.text()


def test_predictions_without_ids_answer_each_turn(write_rows: Any, make_config: MakeConfig) -> None:
    given = {"data": f"d={write_rows([BENCH], 'd.jsonl')}", "turns": "all"}
    one = write_rows([{"prediction": "4"}], "one.jsonl")
    with pytest.raises(UserError, match=r"a line for each row of data d: found 1 of seed 0, expected 3 "):
        evaluate(make_config(predictions=f"p={one}", **given))
    three = write_rows([{"prediction": text} for text in ("4", "8", "4")], "three.jsonl")
    report = json.loads(evaluate(make_config(predictions=f"p={three}", **given)).read_text())
    assert report["models"]["p"]["data"]["d"]["exact_match"]["mean"] == 100.0
