"""Which answers are judged: from an evaluation or files of predictions, selected, and put into questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpkd.core.errors import UserError
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.judge.questions import read_prompt
from dpkd.evaluate.judge.rows import Question, choose, make_questions, read_answers
from dpkd.evaluate.merge.merge import merge
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.options.merge import MergeConfig

PLACE = {"out": "o", "judge_url": "http://h/v1", "judge_model": "judge"}
WriteRows = Callable[..., Path]


@pytest.fixture
def sources(write_rows: WriteRows, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Predictions of `a` (seeds 3 and 7) and `b` (one) to the sets d (six rows) and e (the first three)."""
    ids = [row["id"] for row in rows]
    lines = [{"example_id": name, "prediction": f"a {seed} {name}", "seed": seed} for seed in (7, 3) for name in ids]
    a = write_rows(lines, "a.jsonl")
    b = [write_rows([{"prediction": f"b {name}"} for name in part], f"b{len(part)}.jsonl") for part in (ids, ids[:3])]
    return {
        "predictions": [f"a:d={a}", f"a:e={a}", f"b:d={b[0]}", f"b:e={b[1]}"],
        "data": [f"d={write_rows(rows, 'd.jsonl')}", f"e={write_rows(rows[:3], 'e.jsonl')}"],
    }


def asked(config: JudgeConfig) -> list[Question]:
    form = "verdict" if config.mode == "pairwise" else "scores" if config.grade_reference else "score"
    return list(make_questions(choose(read_answers(config), config), config, read_prompt(None, form)))


def parse(given: dict[str, Any], **options: Any) -> JudgeConfig:
    return JudgeConfig.parse(PLACE | given | options, where="a test")


def about(questions: list[Question]) -> list[tuple[Any, ...]]:
    return [(q.data, q.row.example_id, q.model, q.seed, q.other, q.other_seed, q.swapped) for q in questions]


def test_a_report_and_the_same_predictions_give_the_same_questions(
    sources: dict[str, list[str]], make_config: Callable[..., EvalConfig]
) -> None:
    out = evaluate(make_config(**sources, seeds="none")).parent
    for options in ({}, {"mode": "pairwise"}, {"answer_seeds": "all"}, {"grade_reference": True}):
        configs = parse({"report": out}, **options), parse(sources, **options)
        ours, theirs = map(asked, configs)
        assert [question.key for question in ours] == [question.key for question in theirs]
        assert about(ours) == about(theirs)
        buckets = [
            {(judged.name, model): judged.bucket_SN(model).tolist() for judged in sets for model in judged.answers}
            for sets in (choose(read_answers(config), config) for config in configs)
        ]
        assert buckets[0] == buckets[1]


def test_each_answer_once_row_by_row(sources: dict[str, list[str]]) -> None:
    found = about(asked(parse(sources)))
    assert found[:3] == [
        ("d", "row-0", "a", 3, None, None, False),
        ("d", "row-0", "b", 0, None, None, False),
        ("d", "row-1", "a", 3, None, None, False),
    ]
    assert len(found) == 2 * (6 + 3)
    assert len(about(asked(parse(sources, answer_seeds="all")))) == 3 * (6 + 3)


def test_a_question_holds_its_row_and_nothing_else(sources: dict[str, list[str]]) -> None:
    question = asked(parse(sources, answer_seeds="all"))[1]
    text = question.text()
    for part in ("Say 0\n", "word word\n", "a 7 row-0\n"):
        assert part in text
    assert "a 3" not in text
    assert "row-1" not in text


def test_pairs_are_judged_in_both_orders(sources: dict[str, list[str]]) -> None:
    first, second = asked(parse(sources, mode="pairwise", sets="e"))[:2]
    assert about([first, second]) == [
        ("e", "row-0", "b", 0, "a", 3, False),
        ("e", "row-0", "b", 0, "a", 3, True),
    ]
    assert first.text().index("b row-0") < first.text().index("a 3 row-0")
    assert second.text().index("b row-0") > second.text().index("a 3 row-0")


def test_a_baseline_decides_who_is_asked_about_first(sources: dict[str, list[str]]) -> None:
    found = asked(parse(sources, mode="pairwise", baseline="b", limit=1))
    assert {(question.model, question.other) for question in found} == {("a", "b")}


def test_rows_are_limited_and_drawn(sources: dict[str, list[str]]) -> None:
    def names(**options: Any) -> list[str]:
        return [question.row.example_id for question in asked(parse(sources, only="b", sets="d", **options))]

    everything = names()
    assert names(limit=2) == everything[:2]
    assert names(sample=99) == everything
    drawn = {seed: names(sample=3, seed=seed) for seed in range(8)}
    for seed, some in drawn.items():
        assert len(some) == 3
        assert some == sorted(some)  # the order of the set
        assert set(some) < set(names(sample=4, seed=seed))  # a larger sample holds a smaller one
    assert len({tuple(some) for some in drawn.values()}) > 3
    assert set(names(limit=2, sample=1)) <= set(everything[:2])


def test_names_that_are_not_there(sources: dict[str, list[str]]) -> None:
    for options, message in (
        ({"only": "c"}, r"no model of this name: found 'c', expected a, b \(in --only\)"),
        ({"sets": "f"}, r"no data set of this name: found 'f', expected d, e \(in --sets\)"),
        ({"baseline": "c"}, r"no model of this name: found 'c', expected a, b \(in --baseline\)"),
        ({"baseline": "a", "only": "b"}, r"no model of this name: found 'a', expected b \(in --baseline\)"),
        ({"mode": "pairwise", "only": "b"}, r"pairs need two models: found b"),
        (
            {"mode": "pairwise", "answer_seeds": "all"},
            r"different numbers of answers to a row of data d: found 1 and 2",
        ),
    ):
        with pytest.raises(UserError, match=message):
            asked(parse(sources, **options))


def test_a_set_that_no_chosen_model_has_answered_is_left_out(
    sources: dict[str, list[str]], make_config: Callable[..., EvalConfig], tmp_path: Path
) -> None:
    (_, a_e, b_d, _), (d, e) = sources["predictions"], sources["data"]
    apart = [
        evaluate(make_config(predictions=given, data=data, seeds="none", out=tmp_path / data[0])).parent
        for given, data in ((b_d, d), (a_e, e))
    ]
    places = {"evaluations": tuple(map(str, apart)), "out": tmp_path / "merged"}
    merged = merge(MergeConfig.parse(places | {"allow_different_decoding": True}, where="a test")).parent
    config = parse({"report": merged}, only="a")
    assert [judged.name for judged in choose(read_answers(config), config)] == ["e"]
    assert {question.data for question in asked(config)} == {"e"}
    with pytest.raises(UserError, match=r"chosen models have not answered the chosen data sets: found d .*--only a"):
        asked(parse({"report": merged}, only="a", sets="d"))


def test_a_directory_without_an_evaluation(
    tmp_path: Path, sources: dict[str, list[str]], make_config: Callable[..., EvalConfig]
) -> None:
    with pytest.raises(
        UserError, match=r"holds no finished evaluation: found no report\.json .*of a finished `dpkd eval`"
    ):
        read_answers(parse({"report": tmp_path}))
    out = evaluate(make_config(**sources, seeds="none")).parent
    report = json.loads((out / "report.json").read_text())
    del report["models"]["a"]["fingerprint"]
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"the evaluation cannot be read: KeyError 'fingerprint'"):
        read_answers(parse({"report": out}))
    (out / "per_example.parquet").unlink()
    with pytest.raises(UserError, match=r"the evaluation has no per_example\.parquet"):
        read_answers(parse({"report": out}))


def test_an_evaluation_that_lacks_answers(
    sources: dict[str, list[str]], make_config: Callable[..., EvalConfig]
) -> None:
    import pyarrow.parquet as pq

    out = evaluate(make_config(**sources, seeds="none")).parent
    table = pq.read_table(out / "per_example.parquet")
    pq.write_table(table.slice(1), out / "per_example.parquet")
    with pytest.raises(UserError, match=r"rows do not match its report: model a, data d"):
        read_answers(parse({"report": out}))
