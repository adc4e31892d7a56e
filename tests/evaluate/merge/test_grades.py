"""A judge's grades on the page of a merged report: pointwise, with the reference, and in pairs."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpkd.core.errors import UserError
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.judge.questions import read_prompt
from dpkd.evaluate.judge.report import write_per_verdict
from dpkd.evaluate.judge.rows import Question, choose, make_questions, read_answers
from dpkd.evaluate.judge.verdicts import Answered, Reply
from dpkd.evaluate.merge.merge import merge
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.options.merge import MergeConfig


@pytest.fixture
def report(make_config: Callable[..., EvalConfig], write_rows: Callable[..., Path], rows: list[dict[str, Any]]) -> Path:
    """An evaluation of `a` and `b`, whose answers to row i are `a i` and `b i`."""
    given = [
        f"{name}={write_rows([{'prediction': f'{name} {i}'} for i in range(6)], f'{name}.jsonl')}" for name in "ab"
    ]
    return evaluate(make_config(predictions=given, data=f"d={write_rows(rows, 'd.jsonl')}")).parent


def _judged(report: Path, out: Path, form: Any, say: Callable[[Question], str], **options: Any) -> Path:
    """The directory of a judging in which `say` gives the reply to each question."""
    values = {"report": report, "out": out, "judge_url": "http://h/v1", "judge_model": "j", **options}
    config = JudgeConfig.parse(values, where="a test")
    questions = list(make_questions(choose(read_answers(config), config), config, read_prompt(None, form)))
    answered = {q.key: Answered(q.key, (Reply(say(q), "stop", "m", 1, 1),)) for q in questions}
    out.mkdir()
    write_per_verdict(out / "per_verdict.parquet", questions, answered)
    return out


def _answers(merged: Path) -> list[dict[str, list[Any]]]:
    """By row, what the page has of each model's answer."""
    page = (merged / "report.html").read_text(encoding="utf-8")
    (packed,) = re.findall(r'id="examples">([^<]+)<', page)
    (found,) = json.loads(gzip.decompress(base64.b64decode(packed)))["sets"]
    return [dict(zip(found["models"], (seeds[0] for seeds in row["answers"]), strict=True)) for row in found["rows"]]


def _merge(report: Path, out: Path, *judges: Path) -> Path:
    options = {"evaluations": [str(report)], "judge": [str(folder) for folder in judges], "out": out}
    return merge(MergeConfig.parse(options, where="a test")).parent


def test_grades_and_reasons_are_beside_the_answers(report: Path, tmp_path: Path) -> None:
    def say(question: Question) -> str:
        return "Too short." if question.row.example_id == "row-1" else f"About {question.model}.\nScore: 7"

    judge = _judged(report, tmp_path / "judge", "score", say)
    rows = _answers(_merge(report, tmp_path / "merged", judge))
    assert rows[0]["a"][6:] == ["7", "About a.\nScore: 7"]
    assert rows[0]["b"][6:] == ["7", "About b.\nScore: 7"]
    assert rows[1]["a"][6:] == ["unreadable", "Too short."]
    assert len(_answers(report)[0]["a"]) == 6  # the evaluation itself is as it was


def test_pairs_are_told_from_both_sides_and_both_orders(report: Path, tmp_path: Path) -> None:
    def say(question: Question) -> str:
        # `a` is better, wherever it stands
        first = question.text().index("\na ") < question.text().index("\nb ")
        return f"Verdict: {'A' if first else 'B'}"

    judge = _judged(report, tmp_path / "judge", "verdict", say, mode="pairwise")
    first = _answers(_merge(report, tmp_path / "merged", judge))[0]
    assert first["a"][6] == "better than b, better than b"
    assert first["b"][6] == "worse than a, worse than a"


def test_of_two_grades_that_of_the_answer_is_shown(report: Path, tmp_path: Path) -> None:
    def say(question: Question) -> str:
        return "Scores: 9 3" if question.swapped else "Scores: 3 9"  # 3 to the answer

    judge = _judged(report, tmp_path / "judge", "scores", say, grade_reference=True)
    rows = _answers(_merge(report, tmp_path / "merged", judge))
    assert {row["a"][6] for row in rows} == {"3"}


def test_what_is_no_judging_of_the_report_is_refused(report: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished judging: found no per_verdict\.parquet.*`dpkd judge`"):
        _merge(report, tmp_path / "no", report)
    judge = _judged(report, tmp_path / "judge", "score", lambda _: "Score: 7")
    options = {"evaluations": [f"other={report}"], "judge": [str(judge)], "out": tmp_path / "no"}
    with pytest.raises(UserError, match="is about none of the answers of this report"):
        merge(MergeConfig.parse(options, where="a test"))
    assert not (tmp_path / "no").exists()
