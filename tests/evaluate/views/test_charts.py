"""Charts: marks at their values, names at their marks, texts escaped; and files that stand alone."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from dpkd.evaluate.views.charts import (
    Line,
    _round_up,
    _ticks,
    dot_plot,
    interval_bar,
    length_boxes,
    line_chart,
    shortened,
    standalone,
)
from dpkd.evaluate.views.figures import resolved

_SCORE = {"mean": 50.0, "low": 40.0, "high": 100.0}


def test_dots_are_drawn_at_their_values_with_their_names() -> None:
    rows = [("<m>", 4, _SCORE), ("none", 5, {"mean": None, "low": None, "high": None})]
    svg = dot_plot([("[0,3)\nn = 2", rows)], "title & more", "words <i>")
    # the axis runs from x = 118 (0) to x = 548 (100)
    assert re.findall(r'<circle class="s4" cx="([\d.]+)"', svg) == ["333.0"]
    assert 'class="thick c4" d="M290.0 ' in svg
    assert "H548.0" in svg
    # at the right edge the name is to the left of the interval
    assert re.search(r'<text class="name" x="283.0" y="[\d.]+" text-anchor="end">&lt;m&gt;</text>', svg)
    assert "&lt;m&gt;, [0,3) n = 2: 50.00 [40.00, 100.00]" in svg
    assert "s5" not in svg
    assert "<i>" not in svg
    assert 'role="img" aria-label="title &amp; more"' in svg


def test_labels_of_empty_groups_do_not_overlap() -> None:
    groups = [("all\nn = 2", [("m", 0, _SCORE)]), *((f"[{low},9)\nn = 0", []) for low in range(3))]
    svg = dot_plot(groups, "t", "x")
    labels = [float(y) for y in re.findall(r'x="0.0" y="([\d.]+)"', svg)]
    assert len(labels) == 8
    assert min(below - above for above, below in pairwise(labels)) >= 14
    height = float(re.search(r'viewBox="0 0 560 (\d+)"', svg)[1])  # type: ignore[index]
    assert labels[-1] < height - 38  # the axis is below them


def test_one_row_has_a_dot_without_an_interval() -> None:
    svg = dot_plot([("all", [("m", 0, {"mean": 5.0, "low": None, "high": None})])], "t", "x")
    assert "m, all: 5.00</title>" in svg
    assert 'cx="' in interval_bar({"mean": 5.0, "low": None, "high": None}, 10.0, 3)


def test_a_bar_of_a_cell_is_at_its_values() -> None:
    bar = interval_bar(_SCORE, 100.0, 3)
    assert 'class="thick c3" d="M48.0 7H120.0"' in bar
    assert 'class="s3" cx="60.0"' in bar


def test_boxes_say_their_quantiles() -> None:
    svg = length_boxes([("<m>", list(range(101)), 1), ("gold", [0.0], None)], "t", "words")
    assert "&lt;m&gt;: median 50, half between 25 and 75, 90% between 5 and 95 words" in svg
    assert 'class="s1"' in svg


def test_curves_are_drawn_at_their_values() -> None:
    lines = [Line("a <run>", 2, False, [0, 50, 100], [0.0, 1.0, 4.0]), Line("v", 2, True, [100], [2.0])]
    svg = line_chart(lines, "loss by step", "step")
    # x runs from 48 (0) to 388 (100), y from 166 (0) to 10 (4)
    assert 'class="curve c2" d="M48.0 166.0L218.0 127.0L388.0 10.0"' in svg
    assert '<circle class="s2" cx="388.0" cy="88.0" r="3"/>' in svg
    assert svg.count("<circle") == 1
    assert "a &lt;run&gt;: last 4" in svg


def test_a_curve_without_a_rise_is_drawn() -> None:
    assert "nan" not in line_chart([Line("flat", 0, False, [1, 2], [0.0, 0.0])], "t", "x").lower()


def test_a_file_stands_alone() -> None:
    style = (
        ":root { --s0: #112233; --text: #445566; }\n@media (prefers-color-scheme: dark) { :root { --s0: #ffffff; } }\n"
        "text { fill: var(--text); } .s0 { fill: var(--s0); }"
    )
    chart = dot_plot([("all", [("m", 0, _SCORE)])], "t", "x")
    text = standalone([("One", chart), ("Two <b>", chart)], resolved(style), ["a & b", "c"])
    root = ElementTree.fromstring(text)  # well-formed
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("m") == 2
    assert [text for text in texts if text in ("One", "Two <b>", "a & b", "c")] == ["One", "Two <b>", "a & b", "c"]
    assert ".s0 { fill: #112233; }" in text
    assert "var(" not in text
    assert "#ffffff" not in text


@pytest.mark.parametrize(
    ("name", "short"),
    [("student", "student"), ("a" * 20, "a" * 20), ("dpkd-all-pairs-seed-0", "dpkd-all-\u2026irs-seed-0")],
)
def test_long_names_lose_their_middle(name: str, short: str) -> None:
    assert shortened(name) == short
    assert len(short) <= 20


@pytest.mark.parametrize(
    ("span", "ticks"),
    [
        ((0, 4), [0, 1, 2, 3, 4]),
        ((-0.6, 2.5), [-1, 0, 1, 2, 3]),
        ((20.1, 26), [20, 22, 24, 26]),
        ((3, 3.1), [3, 3.05, 3.1]),
    ],
)
def test_ticks_are_round_and_enclose(span: tuple[float, float], ticks: list[float]) -> None:
    assert _ticks(*span) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "top"), [(1.0, 1.0), (1.1, 2.0), (37.0, 40.0), (41.0, 50.0), (81.0, 100.0), (0.3, 0.3), (0.31, 0.4)]
)
def test_axes_end_at_round_values(value: float, top: float) -> None:
    assert _round_up(value) == pytest.approx(top)
