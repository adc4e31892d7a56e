"""The numbers of a judge's report, by hand: grades, ratios, wins in both orders, position bias, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpkd.core.prompts.examples import Example
from dpkd.evaluate.answers.answers import Answer
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.judge.markdown import judge_markdown
from dpkd.evaluate.judge.plot import plot_judge
from dpkd.evaluate.judge.questions import JudgePrompt, read_prompt
from dpkd.evaluate.judge.report import build_judge_report, write_per_verdict
from dpkd.evaluate.judge.rows import Answers, JudgedSet, Question, make_questions
from dpkd.evaluate.judge.scores import both_orders, mean_over_seeds
from dpkd.evaluate.judge.tokens import estimate_tokens
from dpkd.evaluate.judge.verdicts import Answered, Reply
from dpkd.evaluate.options.judge import JudgeConfig

ABOUT = {"directory": None, "files": {"d": "a.jsonl"}, "fingerprint": "0" * 64, "decoding": None}
EDGES = (30, 70)


def answers_of(models: Mapping[str, Sequence[int]], num_rows: int, by_prediction: bool = False) -> Answers:
    """Rows r0, r1, ... of set d, whose answers say which they are; even rows are short, odd ones long."""
    examples = [Example(f"r{n}", n + 1, (f"gold {n}",), instruction=f"task {n}") for n in range(num_rows)]
    eval_set = EvalSet("d", {}, examples, {}, [], edges=EDGES)
    scored = {
        model: ScoredSet(
            model,
            eval_set,
            tuple(seeds),
            [[f"task {n}" for n in range(num_rows)] for _ in seeds],
            [[Answer(f"r{n}", f"{model} {seed} {n}", [], None) for n in range(num_rows)] for seed in seeds],
            {},
            np.array([[2 if n % 2 else 0 for n in range(num_rows)] for _ in seeds]),
        )
        for model, seeds in models.items()
    }
    judged = JudgedSet(eval_set, scored, list(range(num_rows)), by_prediction)
    return Answers([judged], {}, dict.fromkeys(models, ABOUT))


def config_for(**options: Any) -> JudgeConfig:
    plain = {"report": "r", "out": "o", "judge_url": "http://h/v1", "judge_model": "judge", "num_sign_flips": 200}
    return JudgeConfig.parse(plain | {"answer_seeds": "all"} | options, where="a test")


def reply(text: str, **more: Any) -> Reply:
    return Reply(text, *({"finish_reason": "stop", "model": "m-1", "prompt": 10, "completion": 2} | more).values())


class Judging:
    """A report over `answers`, where `say` gives the judge's reply to each question (None: refused)."""

    def __init__(self, answers: Answers, say: Any, prompt: JudgePrompt, **options: Any) -> None:
        self.config = config_for(**options)
        self.questions = list(make_questions(answers.sets, self.config, prompt))
        self.answered = {}
        for question in self.questions:
            said = say(question)
            replies = () if said is None else tuple(reply(text) for text in ([said] if isinstance(said, str) else said))
            self.answered[question.key] = Answered(question.key, replies, None if replies else "HTTP 400: long")
        identity = {"settings": self.config.model_dump(mode="json"), "answers": {}, "prompt": {}}
        self.report = build_judge_report(
            self.config, prompt, identity, answers, answers.sets, self.questions, self.answered
        )


def test_grades_by_model_seed_and_length() -> None:
    grades = {("a", 1): "1234", ("a", 2): "3x56", ("b", 1): "5678", ("b", 2): "5678"}  # x: cannot be read

    def say(question: Question) -> str:
        return f"Score: {grades[question.model, question.seed][int(question.row.example_id[1])]}"

    report = Judging(answers_of({"a": (1, 2), "b": (1, 2)}, 4), say, read_prompt(None, "score")).report
    a, b = (report["models"][model]["data"]["d"] for model in "ab")
    assert a["grade"]["mean"] == pytest.approx((1 + 2 + 3 + 4 + 3 + 5 + 6) / 7)
    assert (a["n"], a["num_answers"], a["num_grades"]) == (4, 8, 7)
    assert [seed["grade"] for seed in a["seeds"]] == [2.5, pytest.approx(14 / 3)]
    assert [seed["num_grades"] for seed in a["seeds"]] == [4, 3]
    assert b["grade"]["mean"] == 6.5
    short, middle, long = a["buckets"]
    assert (short["low"], short["high"], long["low"], long["high"]) == (0, 30, 70, None)
    assert short["grade"]["mean"] == pytest.approx((1 + 3 + 3 + 5) / 4)
    assert long["grade"]["mean"] == pytest.approx((2 + 4 + 6) / 3)
    assert middle["grade"] == {"mean": None, "low": None, "high": None}
    (difference,) = report["comparisons"]["d"]
    assert (difference["model"], difference["baseline"], difference["n"]) == ("b", "a", 4)
    assert difference["mean"] == pytest.approx(np.mean([5 - 2, 6 - 2, 7 - 4, 8 - 5]))
    assert (difference["wins"], difference["ties"], difference["losses"]) == (4, 0, 0)
    assert difference["buckets"][0]["mean"] == pytest.approx(3.0)
    assert report["unparsable"]["a"] == {
        "num_questions": 8, "num_unparsable": 1, "share": 0.125, "num_cut_off": 0, "num_refused": 0,
        "num_asked_again": 0,
    }  # fmt: skip
    assert report["unparsable"]["b"]["share"] == 0.0


def test_the_reference_is_graded_in_both_orders() -> None:
    def say(question: Question) -> str:
        # 4 to the answer and 8 to the reference, in the order in which the question shows them
        text = question.text()
        answer_first = text.index(f"a 1 {question.row.example_id[1:]}") < text.index(question.row.references[0])
        return "Scores: 4 8" if answer_first else "Scores: 8 4"

    judging = Judging(answers_of({"a": (1,)}, 12), say, read_prompt(None, "scores"), grade_reference=True)
    assert {question.swapped for question in judging.questions} == {False, True}
    summary = judging.report["models"]["a"]["data"]["d"]
    assert summary["grade"] == {"mean": 4.0, "low": 4.0, "high": 4.0}
    assert summary["reference_grade"]["mean"] == 8.0
    assert summary["ratio"] == {"mean": 50.0, "low": 50.0, "high": 50.0}


def test_a_ratio_is_of_sums() -> None:
    def say(question: Question) -> str:
        ours, theirs = {"r0": (2, 10), "r1": (10, 1)}[question.row.example_id]
        return f"Scores: {theirs} {ours}" if question.swapped else f"Scores: {ours} {theirs}"

    judging = Judging(answers_of({"a": (1,)}, 2), say, read_prompt(None, "scores"), grade_reference=True)
    ratio = judging.report["models"]["a"]["data"]["d"]["ratio"]
    assert ratio["mean"] == pytest.approx(100 * 12 / 11)
    # the errors are (2 - 10 r) / 5.5 and as much above 0; Student's t for 1 degree of freedom is 12.706
    assert (ratio["low"], ratio["high"]) == (0, pytest.approx(100 * (12 / 11 + 12.7062 * (98 / 11) / 5.5)))


@pytest.mark.parametrize(
    ("first", "swapped", "outcome", "lean"),
    [
        ("A", "B", 1, 0), ("B", "A", -1, 0), ("tie", "tie", 0, 0),
        ("A", "A", 0, 1), ("B", "B", 0, -1), ("A", "tie", 0, 0.5), ("tie", "B", 0, -0.5),
    ],
)  # fmt: skip
def test_a_win_needs_both_orders(first: str, swapped: str, outcome: float, lean: float) -> None:
    assert both_orders(first, swapped) == (outcome, lean)


def test_a_pair_without_a_verdict_is_undecided() -> None:
    for verdicts in ((None, "A"), ("A", None), (None, None)):
        assert np.isnan(both_orders(*verdicts)).all()


def test_pairs_by_model_seed_and_length() -> None:
    # what the judge says in the first order and in the swapped one; b is the model, a its baseline
    said = {
        "r0": ("A", "B"),
        "r1": ("B", "A"),
        "r2": ("A", "A"),
        "r3": ("tie", "tie"),
        "r4": ("A", "B"),
        "r5": ("A", "?"),
    }

    def say(question: Question) -> str:
        return f"Verdict: {said[question.row.example_id][question.swapped]}"

    judging = Judging(answers_of({"a": (1,), "b": (9,)}, 6), say, read_prompt(None, "verdict"), mode="pairwise")
    assert len(judging.questions) == 12
    (row,) = judging.report["pairs"]["d"]
    assert (row["model"], row["baseline"]) == ("b", "a")
    assert [row[f"num_{key}"] for key in ("wins", "ties", "losses", "undecided")] == [2, 2, 1, 1]
    assert [row[key]["mean"] for key in ("win", "tie", "loss")] == [pytest.approx(x) for x in (40, 40, 20)]
    assert row["net"]["mean"] == pytest.approx(20)
    assert row["n"] == 5
    assert row["seeds"] == [
        {"seed": 9, "other_seed": 1, "num_wins": 2, "num_ties": 2, "num_losses": 1, "num_undecided": 1}
    ]
    assert [bucket["num_wins"] for bucket in row["buckets"]] == [2, 0, 0]
    assert [bucket["num_losses"] for bucket in row["buckets"]] == [0, 0, 1]
    position = row["position"]
    assert position["num_pairs"] == 5
    assert position["share_agreeing"] == pytest.approx(4 / 5)
    assert (position["num_first_twice"], position["num_second_twice"]) == (1, 0)
    assert position["first_less_second"]["mean"] == pytest.approx(20)
    # an unreadable verdict counts for both models of the pair
    assert (
        judging.report["unparsable"]["a"]["num_unparsable"] == judging.report["unparsable"]["b"]["num_unparsable"] == 1
    )


def test_a_judge_that_sees_only_the_position_finds_no_winner() -> None:
    models = {"a": (1,), "b": (1,), "c": (1,)}
    judging = Judging(answers_of(models, 4), lambda _: "Verdict: A", read_prompt(None, "verdict"), mode="pairwise")
    rows = judging.report["pairs"]["d"]
    assert [(row["model"], row["baseline"]) for row in rows] == [("b", "a"), ("c", "a"), ("c", "b")]
    for row in rows:
        assert (row["num_wins"], row["num_ties"], row["num_losses"]) == (0, 4, 0)
        assert row["position"]["share_agreeing"] == 0.0
        # four rows of four do not show that it is always so: 3.8415 / 7.8415 of the 200 from 100 to -100
        preference = row["position"]["first_less_second"]
        assert (preference["mean"], preference["high"]) == (100.0, 100.0)
        assert preference["low"] == pytest.approx(100 - 200 * 0.48989, abs=0.01)


def test_a_perfect_judge_finds_the_winner_in_every_row() -> None:
    def say(question: Question) -> str:
        text = question.text()
        return f"Verdict: {'A' if text.index('b 1 ') < text.index('a 1 ') else 'B'}"

    options = {"mode": "pairwise", "baseline": "b"}
    judging = Judging(answers_of({"a": (1,), "b": (1,)}, 30), say, read_prompt(None, "verdict"), **options)
    (row,) = judging.report["pairs"]["d"]
    assert (row["model"], row["baseline"], row["num_losses"]) == ("a", "b", 30)
    assert row["p_value"] < 0.05
    assert row["position"]["share_agreeing"] == 1.0


def test_buckets_of_the_answers_themselves_are_compared_with_nothing() -> None:
    answers = answers_of({"a": (1,), "b": (1,)}, 4, by_prediction=True)
    pointwise = Judging(answers, lambda _: "Score: 5", read_prompt(None, "score")).report
    assert "buckets" not in pointwise["comparisons"]["d"][0]
    pairwise = Judging(answers, lambda _: "Verdict: A", read_prompt(None, "verdict"), mode="pairwise").report
    assert "buckets" not in pairwise["pairs"]["d"][0]


def test_holm_can_reach_significance_with_many_pairs_and_few_sign_flips() -> None:
    # 28 pairs: with 100 sign flips alone, Holm's smallest p-value would be 28 / 101
    models = dict.fromkeys("abcdefgh", (1,))

    def say(question: Question) -> str:
        return f"Score: {1 + 'abcdefgh'.index(question.model)}"

    report = Judging(answers_of(models, 30), say, read_prompt(None, "score"), num_sign_flips=100).report
    assert len(report["comparisons"]["d"]) == 28
    assert all(row["p_holm"] < 0.05 for row in report["comparisons"]["d"])


def test_means_over_seeds_leave_out_what_is_missing() -> None:
    nan = np.nan
    assert mean_over_seeds(np.array([[1.0, nan, nan], [3.0, 5.0, nan]])).tolist()[:2] == [2.0, 5.0]
    assert np.isnan(mean_over_seeds(np.array([[nan], [nan]]))).all()


def test_refusals_second_replies_and_replies_cut_off_are_counted_apart() -> None:
    def say(question: Question) -> Any:
        return {"r0": None, "r1": ["what?", "Score: 4"], "r2": ["what?", "no"], "r3": "Score: 6"}[
            question.row.example_id
        ]

    judging = Judging(answers_of({"a": (1,)}, 4), say, read_prompt(None, "score"), price_in=1e5, price_out=1e6)
    report = judging.report
    assert report["unparsable"]["a"] == {
        "num_questions": 4, "num_refused": 1, "num_unparsable": 1, "share": 0.25, "num_cut_off": 0,
        "num_asked_again": 2,
    }  # fmt: skip
    assert report["refused"] == [
        {"data": "d", "example_id": "r0", "model": "a", "other": None, "reason": "HTTP 400: long"}
    ]
    assert report["models"]["a"]["data"]["d"]["grade"]["mean"] == 5.0
    # five replies of 10 and 2 tokens
    assert report["tokens"] == {"num_requests": 5, "num_without_usage": 0, "prompt": 50, "completion": 10, "cost": 15.0}
    assert report["judge"]["models_said"] == {"m-1": 5}


def test_what_the_server_calls_itself_is_no_markup() -> None:
    report = Judging(answers_of({"a": (1,)}, 1), lambda _: "Score: 5", read_prompt(None, "score")).report
    report["judge"]["models_said"] = {"x\n\n# <img src=y>": 1}
    assert "which calls itself x # &lt;img src=y> (1 replies)" in judge_markdown(report)


def test_the_estimate_goes_by_what_is_known() -> None:
    judging = Judging(answers_of({"a": (1,)}, 4), lambda _: "Score: 5", read_prompt(None, "score"), max_tokens=100)
    questions = judging.questions
    blind = estimate_tokens(judging.config, questions, questions, {})
    num_characters = sum(len(question.text()) for question in questions)
    assert (blind["prompt"], blind["completion"], blind["measured"]) == (round(num_characters / 4), 400, False)
    half = {question.key: judging.answered[question.key] for question in questions[:2]}
    seen = estimate_tokens(judging.config, questions, questions[2:], half)
    # the texts are of one length, each reply had 10 and 2 tokens
    assert (seen["num_questions"], seen["num_missing"], seen["prompt"], seen["completion"]) == (4, 2, 20, 4)
    assert seen["cost"] is None


def test_a_row_a_question_says_what_was_read(tmp_path: Path) -> None:
    answers = answers_of({"a": (1,), "b": (1,)}, 2)
    prompt = read_prompt(None, "verdict")
    judging = Judging(answers, lambda q: "Verdict: B" if q.swapped else "no", prompt, mode="pairwise")
    write_per_verdict(tmp_path / "v.parquet", judging.questions, judging.answered)
    rows = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert [row["read"] for row in rows] == [None, "B", None, "B"]
    assert [row["swapped"] for row in rows] == [False, True, False, True]
    assert {row["model"] for row in rows} == {"b"}
    assert {(row["other"], row["reply"], row["finish_reason"]) for row in rows} == {
        ("a", "no", "stop"), ("a", "Verdict: B", "stop"),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
@pytest.mark.parametrize("said", ["good", "nonsense"])
def test_tables_and_figures_hold_for_everything_and_for_nothing(tmp_path: Path, mode: str, said: str) -> None:
    word = {"pointwise": "Score: 5", "pairwise": "Verdict: A"}[mode] if said == "good" else "?"
    form = "score" if mode == "pointwise" else "verdict"
    models = {"a$_x": (1, 4), "b": (1, 9)}
    report = Judging(answers_of(models, 3), lambda _: word, read_prompt(None, form), mode=mode).report
    text = judge_markdown(report)
    assert "m-1 (" in text
    assert "| `b` | " in text
    assert "the answers of all seeds (1, 4, 9)" in text
    if said == "nonsense":
        assert "| 100.0 |" in text
    plot_judge(report, tmp_path / "judge")
    assert (tmp_path / "judge.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "judge.svg").read_text()
    assert "a$_x" in svg
    assert "unparsable" in svg.lower()
    plot_judge(report, tmp_path / "again" / "judge")
    assert (tmp_path / "again" / "judge.svg").read_text() == svg
