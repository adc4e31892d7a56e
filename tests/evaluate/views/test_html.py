"""The page: self-contained, safe with any model's text, and equal to the report."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.toys import ROOT

from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.views.page.svg import NUM_COLOURS, Line, _round_up, _ticks, grouped_bars, length_boxes, line_chart

_STYLE = (ROOT / "evaluate/views/page/style.css").read_text(encoding="utf-8")
_EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 <!-- \u00e9"


class _Page(HTMLParser):
    """Elements with their attributes, the text of each kind of element, and the elements left open."""

    _VOID = frozenset({"meta", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> _Page:
    folder = tmp_path_factory.mktemp("page")

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    rows: list[dict[str, Any]] = [
        {"id": f"row-{i}", "instruction": f"Say {i}", "output": " ".join(["word"] * words), "category": "qa"}
        for i, words in enumerate((2, 30, 70, 2, 30, 70))
    ]
    rows[0] |= {"instruction": _EVIL, "category": _EVIL, "id": _EVIL}
    rows[1]["output"] = [rows[1]["output"], _EVIL]
    evil = write("p.jsonl", [{"prediction": _EVIL}] * 6)
    gold = write("q.jsonl", [{"prediction": "word " * 30}] * 6)
    options = {
        "predictions": [f"evil={evil}", f"gold={gold}"],
        "data": f"d={write('d.jsonl', rows)}",
        "out": folder / "out",
        "num_sign_flips": 100,
    }
    text = (evaluate(EvalConfig.parse(options, where="a test")).parent / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img" not in text
    return _Page(text)


def test_no_text_of_a_model_becomes_an_element(page: _Page) -> None:
    assert page.open == []
    assert page.count("script") == 2
    assert page.count("img") == 0
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    (content,) = [text for tag, text in page.texts if tag == "script" and text.startswith("{")]
    (browsed,) = json.loads(content)["sets"]
    assert browsed["models"] == ["evil", "gold"]
    first = browsed["rows"][0]
    assert first["prompt"] == first["id"] == first["answers"][0]["text"] == _EVIL
    assert browsed["rows"][1]["references"][1] == _EVIL
    assert browsed["rows"][1]["answers"][1] | {"text": ""} == {
        "text": "", "rouge_l": 100.0, "exact_match": 100.0, "num_words": 30, "bucket": "[30,70)", "unfinished": False,
    }  # fmt: skip


def test_the_script_writes_texts_as_text_alone(page: _Page) -> None:
    (script,) = [text for tag, text in page.texts if tag == "script" and "use strict" in text]
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "http"):
        assert danger not in script


def test_the_page_loads_nothing(page: _Page) -> None:
    assert not [attrs for _, attrs in page.elements if {"src", "srcset", "action"} & set(attrs)]
    links = [attrs["href"] or "" for _, attrs in page.elements if "href" in attrs]
    assert links
    assert {link.removeprefix("#") for link in links} <= {attrs.get("id") for _, attrs in page.elements}
    style = "".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    (script,) = [text for tag, text in page.texts if tag == "script" and "use strict" in text]
    for text in (style, script):  # the page's own, and no other
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert ("viewport", "width=device-width, initial-scale=1") in [
        (attrs.get("name"), attrs.get("content")) for tag, attrs in page.elements if tag == "meta"
    ]


def test_every_id_that_the_script_asks_for_is_there_once_and_labelled(page: _Page) -> None:
    (script,) = [text for tag, text in page.texts if tag == "script" and "use strict" in text]
    wanted = set(re.findall(r"find\('(\w+)'\)", script)) | {"examples"}
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert wanted <= set(ids)
    assert len(ids) == len(set(ids))
    assert page.count("label") == page.count("select") + page.count("input")


def test_tables_and_charts_have_text_alternatives(page: _Page) -> None:
    assert page.count("caption") == page.count("table") == 4
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.elements if tag == "th")
    charts = [attrs for tag, attrs in page.elements if tag == "svg" and "aria-hidden" not in attrs]
    assert len(charts) == 3
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in charts)
    # what scrolls can be reached by keyboard, and says what it is
    scrolling = [attrs for _, attrs in page.elements if attrs.get("class") == "scroll"]
    assert all(attrs.get("tabindex") == "0" and attrs.get("aria-label") for attrs in scrolling)


def test_the_page_says_how_it_was_made(page: _Page) -> None:
    terms = [text for tag, text in page.texts if tag == "dt"]
    texts = [text for tag, text in page.texts if tag == "code"]
    made = dict(zip(terms, texts, strict=True))
    assert made["Command"].startswith("dpkd eval --predictions evil=")
    assert "6 rows (sha256 " in made["Data d"]
    assert re.search(r"p\.jsonl \([0-9a-f]{12}\)", made["Predictions evil"])
    assert made["Answers of gold"] == "given as text, seed 0"
    assert "rouge-score 0.1.2" in made["Software"]


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_by_the_examples_of_the_standard() -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_keep_the_contrast_of_wcag_aa(mode: int) -> None:
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", _STYLE.split("@media (prefers-color-scheme: dark)")[mode]))
    assert len(colours) == 15
    for text in ("text", "soft", "mark"):
        for behind in ("back", "card"):
            assert _contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    for part in ("line", "warn", *(f"s{number}" for number in range(NUM_COLOURS))):
        assert _contrast(colours[part], colours["back"]) >= 3, part


def test_the_best_model_is_marked(page: _Page) -> None:
    best = [attrs for tag, attrs in page.elements if tag == "td" and attrs.get("class") == "best"]
    assert len(best) >= 2
    assert page.count("figure") == 3
    assert any("evil" in text or "gold" in text for tag, text in page.texts if tag == "title")


def test_bars_are_drawn_at_their_values() -> None:
    intervals = [{"mean": 50.0, "low": 40.0, "high": 100.0}, {"mean": None, "low": None, "high": None}]
    svg = grouped_bars(["[0,3)", "<b>"], [("m", 4, intervals)], "title & more", ("words", "<i>"))
    (bar,) = re.findall(r'<rect class="s4" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', svg)
    # the axis runs from y = 244 (0) to y = 14 (100)
    assert [float(value) for value in bar] == [129.0, 115.0]
    assert "&lt;b&gt;" in svg
    assert "<b>" not in svg
    assert 'role="img" aria-label="title &amp; more"' in svg
    assert ">words</text>" in svg
    assert ">&lt;i&gt;</text>" in svg
    assert "m, [0,3): 50.00 [40.00, 100.00]" in svg


def test_boxes_say_their_quantiles() -> None:
    svg = length_boxes([("<m>", list(range(101)), 1), ("gold", [0.0], None)], "t")
    assert "&lt;m&gt;: median 50, half between 25 and 75, 90% between 5 and 95 words" in svg
    assert 'class="s1"' in svg


def test_curves_are_drawn_at_their_values() -> None:
    lines = [Line("a <run>", 2, False, [0, 50, 100], [0.0, 1.0, 4.0]), Line("v", 2, True, [100], [2.0])]
    svg = line_chart(lines, "loss by step", ("step", "loss"))
    # x runs from 58 (0) to 546 (100), y from 244 (0) to 14 (4)
    assert 'class="curve c2" d="M58.0 244.0L302.0 186.5L546.0 14.0"' in svg
    assert '<circle class="s2" cx="546.0" cy="129.0" r="3"/>' in svg
    assert svg.count("<circle") == 1
    assert "a &lt;run&gt;: last 4" in svg


def test_a_curve_without_a_rise_is_drawn() -> None:
    assert "NaN" not in line_chart([Line("flat", 0, False, [1, 2], [0.0, 0.0])], "t", ("x", "y"))


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
    ("value", "top"), [(1.0, 1.0), (1.1, 2.0), (37.0, 40.0), (41.0, 50.0), (81.0, 100.0), (0.3, 0.4)]
)
def test_axes_end_at_round_values(value: float, top: float) -> None:
    assert _round_up(value) == pytest.approx(top)
