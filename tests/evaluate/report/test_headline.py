"""The headline and its cautions, for the cases that a report can have."""

from __future__ import annotations

from typing import Any

import pytest

from dpkd.evaluate.report.headline import cautions, headline, ranked, ranked_table, size_text


def _interval(mean: float, half: float = 1.0) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _model(score: float, size: int | None, share_cut: float = 0.0, temperature: float = 1.0) -> dict[str, Any]:
    buckets = [{"low": 0, "high": 30, "n": 71}, {"low": 30, "high": None, "n": 25}]
    summary = {
        "n": 96,
        "rouge_l": _interval(score),
        "seeds": [{"seed": 10}],
        "buckets": buckets,
        "share_unfinished": share_cut,
    }
    decoding = {"temperature": temperature, "max_new_tokens": 96}
    return {"decoding": decoding, "num_parameters": size, "data": {"d": summary}}


def _difference(model: str, baseline: str, mean: float, p_holm: float) -> dict[str, Any]:
    values = {"p_value": p_holm, "p_holm": p_holm, "wins": 3, "ties": 2, "losses": 1, "smallest_resolvable": 1.0}
    return {"model": model, "baseline": baseline, "rouge_l": _interval(mean, 0.5) | values}


@pytest.fixture
def report() -> dict[str, Any]:
    """The quickstart's three models."""
    return {
        "roles": {"teacher": "teacher", "baseline": "untrained"},
        "models": {
            "teacher": _model(12.5, 134_515_008, 0.68),
            "untrained": _model(0.25, 56_627_136),
            "trained": _model(6.4, 56_627_136, 0.74),
        },
        "data": {"d": {"n": 96, "lost_text": {"num_rows": 96, "num_all_lost": 0, "num_mostly_lost": 0}}},
        "comparisons": {
            "d": [_difference("teacher", "untrained", 12.25, 0.0001), _difference("trained", "untrained", 6.15, 0.001)]
        },
        "overlap": None,
        "duplicates": {"rows": {"d": ["row-1"]}},
        "skipped": {"d": [{"line": 3, "reason": "long"}] * 2},
    }


def test_the_message_with_teacher_and_baseline(report: dict[str, Any]) -> None:
    assert headline(report, "d") == (
        "`trained` (57M) keeps 51% of `teacher` (135M): Rouge-L 6.40 against 12.50; +6.15 [+5.65, +6.65] over "
        "`untrained`."
    )
    assert [(row.name, row.role) for row in ranked(report, "d")] == [
        ("teacher", "teacher"),
        ("trained", ""),
        ("untrained", "baseline"),
    ]
    table = ranked_table(report, "d")
    assert table.columns == ["Rouge-L", "over untrained", "of teacher", "Parameters"]
    assert [str(cell) for cell in table.rows[1][1]] == ["6.40 [5.40, 7.40]", "+6.15 [+5.65, +6.65]", "51%", "57M"]


def test_the_message_says_when_it_may_be_chance_or_is_worse(report: dict[str, Any]) -> None:
    report["comparisons"]["d"][1] = _difference("trained", "untrained", -0.3, 0.4)
    assert headline(report, "d").endswith(
        "; -0.30 [-0.80, +0.20] against `untrained`, which may be chance (p = 0.400)."
    )


def test_without_roles_the_best_model_is_compared_with_the_next(report: dict[str, Any]) -> None:
    report["roles"] = {"teacher": None, "baseline": None}
    # as dpkd compares without a baseline: each model with those before it
    report["comparisons"]["d"] = [_difference("trained", "teacher", -6.1, 0.001)]
    assert headline(report, "d") == (
        "`teacher` (135M) has the highest Rouge-L, 12.50; +6.10 [+5.60, +6.60] over `trained`."
    )


def test_equal_models_have_no_highest_score_and_no_negative_zero(report: dict[str, Any]) -> None:
    report["roles"] = {"teacher": None, "baseline": None}
    report["models"] = dict.fromkeys(("one", "two"), report["models"]["trained"])
    report["comparisons"]["d"] = [_difference("two", "one", 0.0, 1.0)]
    assert headline(report, "d") == (
        "`one` (57M) has Rouge-L 6.40; +0.00 [-0.50, +0.50] over `two`, which may be chance (p = 1.000)."
    )


def test_one_model_has_its_interval(report: dict[str, Any]) -> None:
    report["models"] = {"trained": report["models"]["trained"]}
    report["comparisons"]["d"] = []
    report["roles"] = {"teacher": None, "baseline": None}
    assert headline(report, "d") == "`trained` (57M) has Rouge-L 6.40 [5.40, 7.40] on 96 rows."


def test_a_teacher_alone_with_its_baseline(report: dict[str, Any]) -> None:
    del report["models"]["trained"]
    report["comparisons"]["d"].pop()
    assert headline(report, "d") == (
        "`teacher` (135M) has the highest Rouge-L, 12.50; +12.25 [+11.75, +12.75] over `untrained`."
    )


def test_cautions_of_everything(report: dict[str, Any]) -> None:
    assert cautions(report, "d") == [
        "Answers were cut off at 96 tokens: 68% of `teacher`, 74% of `trained`.",
        "One seed: how much other samples would differ is not known.",
        "Few rows: 25 in [30,inf).",
        "1 prompt also in the training data.",
        "2 rows left out.",
    ]


def test_nothing_to_be_careful_about(report: dict[str, Any]) -> None:
    for model in report["models"].values():
        model["data"]["d"]["share_unfinished"] = None
        model["data"]["d"]["buckets"][1]["n"] = 0  # no rows are not few rows
        model["decoding"]["temperature"] = 0.0  # another seed would give the same answers
    report["duplicates"], report["skipped"] = None, {"d": []}
    assert cautions(report, "d") == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, ""), (134_515_008, "135M"), (56_627_136, "57M"), (1_543_000_000, "1.5B"), (13e9, "13B"), (900, "900")],
)
def test_sizes_are_short(number: int | None, text: str) -> None:
    assert size_text(number) == text
