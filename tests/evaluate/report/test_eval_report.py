"""The report by value: means, buckets, seeds, Markdown, per-example rows and the plot of hand-made scores."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpkd.core.errors import UserError
from dpkd.core.files import write_json
from dpkd.core.progress import Progress
from dpkd.core.prompts.examples import Example, SkippedRow
from dpkd.core.prompts.templates import EncodedPrompt
from dpkd.evaluate.answers.answers import Answer
from dpkd.evaluate.answers.scoring import ScoredSet, score_sets, write_per_example
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.metrics.scores import Scores
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.report.build import build_report, compare
from dpkd.evaluate.views.figures import write_figures
from dpkd.evaluate.views.markdown import report_markdown
from dpkd.teacher_cache.engines.engine import FinishReason

_WORDS = (29, 30, 69, 5)  # two rows in [0,30), two in [30,70), none in [70,inf)


@pytest.fixture
def eval_set() -> EvalSet:
    examples = [
        Example(f"row-{i}", i + 1, (" ".join(["w"] * words),), instruction=f"say {i}", category="qa")
        for i, words in enumerate(_WORDS)
    ]
    prompts = {name: [EncodedPrompt(example.instruction or "", [1]) for example in examples] for name in "ab"}
    return EvalSet(
        "dolly",
        {"name": "d.jsonl", "sha256": "0"},
        examples,
        prompts,
        [SkippedRow(9, "too long")],
        num_rows=5,
        indices=[0, 1, 2, 3],
        lengths=list(_WORDS),
        edges=(30, 70),
    )


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    return EvalConfig.parse({"model": ["a=x", "b=y"], "data": "dolly=z", "out": tmp_path, "seeds": "10,20"}, where="")


@pytest.fixture
def scored_sets(eval_set: EvalSet) -> list[ScoredSet]:
    """Model a: seed 10 gives 10, 20, 30, 40 and seed 20 gives 20 more; model b is at 50 throughout."""

    def answers(num_unfinished: int) -> list[Answer]:
        reasons: list[FinishReason] = ["length"] * num_unfinished + ["stop"] * (4 - num_unfinished)
        return [
            Answer(example.example_id, "text", [5, 6, 7], reason)
            for example, reason in zip(eval_set.examples, reasons, strict=True)
        ]

    def scores(rouge_l: np.ndarray, exact_match: np.ndarray) -> dict[str, np.ndarray]:
        others = {name: np.full((2, 4), 7.0) for name in Scores._fields}
        return others | {"rouge_l": rouge_l, "exact_match": exact_match}

    a = np.array([[10.0, 20, 30, 40], [30, 40, 50, 60]])
    exact = np.array([[0.0, 100, 0, 0], [0, 100, 0, 0]])
    b = scores(np.full((2, 4), 50.0), np.zeros((2, 4)))
    buckets, prompts = np.array([[0, 1, 1, 0]] * 2), [[f"say {i}" for i in range(4)]] * 2
    return [
        ScoredSet("a", eval_set, (10, 20), prompts, [answers(0), answers(2)], scores(a, exact), buckets),
        ScoredSet("b", eval_set, (10, 20), prompts, [answers(0)] * 2, b, buckets),
    ]


@pytest.fixture
def report(config: EvalConfig, eval_set: EvalSet, scored_sets: list[ScoredSet]) -> dict[str, Any]:
    settings = config.model_dump(mode="json") | {"seeds": [10, 20]}
    identity = {"settings": settings, "models": {"a": {"x": 1}, "b": {}}, "data": {"dolly": eval_set.identity}}
    return build_report(config, identity, [eval_set], scored_sets, {})


def test_summary_by_hand(report: dict[str, Any]) -> None:
    summary = report["models"]["a"]["data"]["dolly"]
    assert summary["n"] == 4
    assert summary["rouge_l"]["mean"] == 35.0  # rows average to 20, 30, 40, 50 over the seeds
    # Student's t for 3 degrees of freedom, and the standard error of 20, 30, 40, 50
    assert summary["rouge_l"]["low"] == pytest.approx(35 - 3.1824 * 12.9099 / 2, abs=1e-3)
    assert summary["rouge_l"]["high"] == pytest.approx(35 + 3.1824 * 12.9099 / 2, abs=1e-3)
    assert summary["exact_match"]["mean"] == 25.0
    others = dict.fromkeys(("rouge_1", "rouge_2", "num_words", "self_repetition"), 7.0)
    assert summary["seeds"] == [
        {"seed": 10, "rouge_l": 25.0, "exact_match": 25.0, **others},
        {"seed": 20, "rouge_l": 45.0, "exact_match": 25.0, **others},
    ]
    assert summary["mean_response_tokens"] == 3.0
    assert summary["share_unfinished"] == 0.25


def test_buckets_by_hand(report: dict[str, Any]) -> None:
    buckets = report["models"]["a"]["data"]["dolly"]["buckets"]
    assert [(bucket["low"], bucket["high"], bucket["n"]) for bucket in buckets] == [
        (0, 30, 2),
        (30, 70, 2),
        (70, None, 0),
    ]
    # rows of 29 and 5 words: 20, 50; two rows say next to nothing, and a score ends at 0 and 100
    assert buckets[0]["rouge_l"] == {"mean": 35.0, "low": 0.0, "high": 100.0}
    assert buckets[1]["exact_match"]["mean"] == 50.0
    # Wilson with one hit of two rows, as both seeds agree: (0.5 + 3.8415 / 4 +- 1.96 sqrt(...)) / 2.9207
    assert buckets[1]["exact_match"]["low"] == pytest.approx(9.45, abs=0.01)
    assert buckets[1]["exact_match"]["high"] == pytest.approx(90.55, abs=0.01)
    assert [seed["rouge_l"] for seed in buckets[1]["seeds"]] == [25.0, 45.0]  # 20, 30 and 40, 50
    assert [seed["exact_match"] for seed in buckets[1]["seeds"]] == [50.0, 50.0]
    assert [seed["rouge_l"] for seed in buckets[2]["seeds"]] == [None, None]
    assert buckets[2]["rouge_l"] == {"mean": None, "low": None, "high": None}


def test_the_report_says_what_it_is_of(report: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", report)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read == report
    assert read["skipped"] == {"dolly": [{"line": 9, "reason": "too long"}]}
    assert read["settings"]["temperature"] == 1.0
    assert read["settings"]["buckets"] == [30, 70]
    assert read["identities"]["data"] == {"dolly": {"name": "d.jsonl", "sha256": "0"}}
    assert read["software"]["rouge-score"]


def test_markdown_by_value(report: dict[str, Any]) -> None:
    text = report_markdown(report)
    assert "Answers: template alpaca, temperature 1, top-p 1, seeds 10, 20, at most 256 tokens." in text
    assert "## dolly (4 rows, 1 left out)" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[:3] == ["| Model | Rouge-L |", "| :--- | ---: |", "| `b` | 50.00 [50.00, 50.00] |"]  # the best first
    assert lines[3].startswith("| `a` | 35.00 [")
    lines = lines[4:]
    assert lines[0] == "| Model | Rouge-L | [0,30) (n=2, few rows) | [30,70) (n=2, few rows) | [70,inf) (n=0) |"
    assert lines[3] == "| `b` | 50.00 [50.00, 50.00] | 50.00 [50.00, 50.00] | 50.00 [50.00, 50.00] | - |"
    assert lines[2].startswith("| `a` | 35.00 [")
    assert lines[4] == "| Model | Exact match | [0,30) (n=2, few rows) | [30,70) (n=2, few rows) | [70,inf) (n=0) |"
    assert lines[7] == "| `b` | 0.00 [0.00, 48.99] | 0.00 [0.00, 65.76] | 0.00 [0.00, 65.76] | - |"
    assert lines[8].split(" | ")[3:] == [
        "Words",
        "Tokens",
        "Unfinished %",
        "Distinct-1",
        "Distinct-2",
        "Self-repetition |",
    ]
    assert lines[10].split(" | ")[3:] == ["7.0", "3.0", "25.0", "25.0", "-", "7.0 |"]
    # rows are 30, 20, 10 and 0 apart: three won, one tied
    difference = lines[14].split(" | ")
    assert difference[0] == "| `b` - `a`"
    assert difference[1] == "+15.00 [-5.54, +35.54]"
    assert difference[4] == "3 / 1 / 0"
    assert difference[5] == "18.08"  # 2.8016 * 12.9099 / 2
    assert {line.count("|") for line in lines[:8]} == {6}
    assert "a true difference of 18.08 in Rouge-L is found at the 5% level in 80% of repetitions" in text


def test_a_baseline_is_compared_with_every_other_model(
    config: EvalConfig, eval_set: EvalSet, scored_sets: list[ScoredSet]
) -> None:
    third = dataclasses.replace(scored_sets[1], model="c")
    sets = [*scored_sets, third]
    pairs = compare(sets, config, by_bucket=True)
    assert [(row["model"], row["baseline"]) for row in pairs] == [("b", "a"), ("c", "a"), ("c", "b")]
    rows = compare(sets, config.model_copy(update={"baseline": "b"}), by_bucket=True)
    assert [(row["model"], row["baseline"]) for row in rows] == [("a", "b"), ("c", "b")]
    assert rows[0]["rouge_l"]["mean"] == -15.0
    # three of the four rows differ, on one side: 2 of 2 ** 3 sign flips, and Holm's family has two comparisons
    assert rows[0]["rouge_l"]["p_value"] == 0.25
    assert rows[0]["rouge_l"]["p_holm"] == 0.5
    assert compare(sets[:1], config.model_copy(update={"baseline": "b"}), by_bucket=True) == []


def test_roles_are_names_of_models(config: EvalConfig) -> None:
    assert config.roles(["a", "b"]) == {"teacher": None, "baseline": None}
    assert config.roles(["a", "teacher"]) == {"teacher": "teacher", "baseline": None}
    given = config.model_copy(update={"teacher_name": "a", "baseline": "b"})
    assert given.roles(["a", "b"]) == {"teacher": "a", "baseline": "b"}
    with pytest.raises(UserError, match=r"no evaluated model has this name: found 'b', expected a or c .*--baseline"):
        given.roles(["a", "c"])


def test_markdown_says_greedy(report: dict[str, Any]) -> None:
    greedy = {"temperature": 0.0, "seeds": [10]}
    for model in report["models"].values():
        model["decoding"] |= greedy
    assert "Answers: template alpaca, greedy, seed 10, at most 256 tokens." in report_markdown(report)


def test_markdown_says_whose_answers_were_drawn_otherwise(report: dict[str, Any]) -> None:
    report["models"]["b"]["decoding"] = None
    text = report_markdown(report)
    assert (
        "Answers: a: template alpaca, temperature 1, top-p 1, seeds 10, 20, at most 256 tokens; b: given as text."
        in text
    )


def test_perplexity_has_a_column_where_a_model_has_one(report: dict[str, Any]) -> None:
    assert "Perplexity" not in report_markdown(report)
    report["models"]["a"]["data"]["dolly"]["perplexity"] = {"mean": 8.0, "low": 7.0, "high": 9.5}
    report["models"]["b"]["data"]["dolly"]["perplexity"] = None
    header, _, a, b = [line for line in report_markdown(report).splitlines() if line.startswith("|")][12:16]
    place = header.split(" | ").index("Perplexity")
    assert a.split(" | ")[place] == "8.00 [7.00, 9.50]"
    assert b.split(" | ")[place] == "-"


def test_per_example_holds_a_row_for_every_answer(scored_sets: list[ScoredSet], tmp_path: Path) -> None:
    write_per_example(tmp_path / "rows.parquet", scored_sets)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [(row["model"], row["seed"], row["example_id"]) for row in rows] == [
        (model, seed, f"row-{i}") for model in "ab" for seed in (10, 20) for i in range(4)
    ]
    assert rows[5] == {
        "model": "a",
        "data": "dolly",
        "seed": 20,
        "example_id": "row-1",
        "category": "qa",
        "bucket": "[30,70)",
        "question": "say 1",
        "prompt": "say 1",
        "messages": [{"role": "user", "content": "say 1"}],
        "references": [" ".join(["w"] * 30)],
        "response": "text",
        "rouge_l": 40.0,
        "exact_match": 100.0,
        **dict.fromkeys(("rouge_1", "rouge_2", "num_words", "self_repetition"), 7.0),
        "reference_nll": None,
        "reference_tokens": None,
        "finish_reason": "length",
        "num_tokens": 3,
    }


def test_answers_are_scored_against_their_own_row_and_best_reference(config: EvalConfig) -> None:
    examples = [Example("x", 1, ("no", "the cat sat")), Example("y", 2, ("a dog",))]
    eval_set = EvalSet("d", {}, examples, {}, [], lengths=[1, 2], edges=(2,))
    by_seed = {
        1: [Answer("x", "The cat sat.", [1], "stop"), Answer("y", "a dog ran off", [1], "stop")],
        2: [Answer("x", "a dog", [1], "stop"), Answer("y", "the cat sat", [1], "stop")],
    }
    with Progress("scoring", 4, "responses") as progress:
        (scored,) = score_sets(config, [eval_set], {"m": {"d": by_seed}}, progress, {})
        own = config.model_copy(update={"bucket_of": "prediction"})
        (by_own_length,) = score_sets(own, [eval_set], {"m": {"d": by_seed}}, progress, {})
    assert progress.done == 8
    assert scored.seeds == (1, 2)
    assert scored.scores["rouge_l"] == pytest.approx(np.array([[100.0, 200 / 3], [0.0, 0.0]]))
    assert scored.scores["exact_match"].tolist() == [[100.0, 0.0], [0.0, 0.0]]
    assert scored.bucket_SN.tolist() == [[0, 1], [0, 1]]
    assert by_own_length.bucket_SN.tolist() == [[1, 1], [1, 1]]


def test_text_of_the_data_is_no_markup_in_the_report(report: dict[str, Any]) -> None:
    name = "`x`|<script>alert(1)</script>"
    for model in report["models"].values():
        part = {"category": name, "n": 2, "rouge_l": {"mean": 1.0, "low": None, "high": None}}
        model["data"]["dolly"]["categories"] = [part]
    report["comparisons"]["dolly"] = []
    (line,) = (line for line in report_markdown(report).splitlines() if "alert" in line)
    # the whole name is one span of code, in which Markdown reads no HTML
    assert line.startswith("| `'x'\\|<script>alert(1)</script> (n=2, few rows)` |")


def _svg_texts(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_charts_say_what_they_are_of(report: dict[str, Any], scored_sets: list[ScoredSet], tmp_path: Path) -> None:
    report["models"]["a"]["directory"] = "runs/<a>"
    write_figures(report, scored_sets, tmp_path)
    names = ("answer_lengths", "exact_match_by_length", "rouge_by_length")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.svg" for name in names]
    fingerprint = report["models"]["a"]["fingerprint"]
    for name in names:
        text = " ".join(_svg_texts(tmp_path / f"{name}.svg"))
        assert "Data: dolly 4 rows. Answers: template alpaca, temperature 1, top-p 1, seeds 10, 20, at most 256" in text
        assert f"a = runs/<a> ({fingerprint[:12]})" in text
        assert "rouge-score 0.1.2" in text
        assert "dpkd eval --model a=x --model b=y --data dolly=z" in text


def test_a_file_has_a_chart_for_each_data_set(
    report: dict[str, Any], scored_sets: list[ScoredSet], eval_set: EvalSet, tmp_path: Path
) -> None:
    report["data"]["other"] = report["data"]["dolly"]
    report["comparisons"]["other"] = report["comparisons"]["dolly"]
    for model in report["models"].values():
        model["data"]["other"] = model["data"]["dolly"]
    other = dataclasses.replace(eval_set, name="other")
    more = [dataclasses.replace(scored, eval_set=other) for scored in scored_sets]
    write_figures(report, [*scored_sets, *more], tmp_path)
    for name in ("rouge_by_length", "answer_lengths"):
        titles = [text.rpartition(". ")[2] for text in _svg_texts(tmp_path / f"{name}.svg")]
        assert {"dolly", "other"} < set(titles)


def test_an_evaluation_needs_no_matplotlib(
    make_config: Callable[..., EvalConfig],
    write_rows: Callable[..., Path],
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what the import system does for a blocked module
    given = write_rows([{"prediction": "word"}] * 6, "p.jsonl")
    path = evaluate(make_config(predictions=f"p={given}", data=f"d={write_rows(rows, 'd.jsonl')}"))
    assert (path.parent / "rouge_by_length.svg").is_file()
