"""The page: self-contained, safe with any model's text, and equal to the report."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toys import ROOT

from dpkd.core.prompts.examples import Example
from dpkd.evaluate.answers.answers import Answer
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.metrics.rouge import tokenize
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.views.charts import NUM_COLOURS
from dpkd.evaluate.views.page import examples

_STYLES = [(ROOT / f"evaluate/views/page/{name}.css").read_text(encoding="utf-8") for name in ("charts", "style")]
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

    def unpacked(self) -> Any:
        """What the page's script reads."""
        (packed,) = [text for tag, text in self.texts if tag == "script" and "use strict" not in text]
        return json.loads(gzip.decompress(base64.b64decode(packed)))


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
    (shown,) = page.unpacked()["sets"]
    assert shown["models"] == ["evil", "gold"]
    first = shown["rows"][0]
    assert first["messages"] == [["user", _EVIL]]
    assert first["id"] == first["answers"][0][0][0] == _EVIL
    assert shown["rows"][1]["references"][1] == _EVIL
    # text, Rouge-L, exact match, words, bucket, cut off
    assert shown["rows"][1]["answers"][1][0][1:] == [100.0, 1, 30, 1, 0]


def test_stems_are_those_of_the_library() -> None:
    words = {"running": "run", "cats": "cat", "the": "the", "flies": "fli"}
    rows = [{"references": ["Running CATS"], "answers": [[["the flies"]]]}]
    assert examples._stems(rows) == {word: stem for word, stem in sorted(words.items()) if word != stem}
    assert [tokenize(word, "default") for word in words] == [(stem,) for stem in words.values()]


def test_the_script_writes_texts_as_text_alone(page: _Page) -> None:
    (script,) = [text for tag, text in page.texts if tag == "script" and "use strict" in text]
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "http"):
        assert danger not in script


def test_the_page_loads_nothing(page: _Page) -> None:
    assert not [attrs for _, attrs in page.elements if {"src", "srcset", "action"} & set(attrs)]
    assert not [attrs for _, attrs in page.elements if "href" in attrs]
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
    (controls,) = re.findall(r"CONTROLS = \[(.*?)\]", script)
    wanted |= set(re.findall(r"\w+", controls))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert wanted <= set(ids)
    assert len(ids) == len(set(ids))
    assert page.count("label") == page.count("select") + page.count("input")


def test_tables_and_charts_have_text_alternatives(page: _Page) -> None:
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.elements if tag == "th")
    charts = [attrs for tag, attrs in page.elements if tag == "svg" and "aria-hidden" not in attrs]
    assert len(charts) == 3
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in charts)
    # what scrolls can be reached by keyboard, and says what it is
    scrolling = [attrs for _, attrs in page.elements if attrs.get("class") == "scroll"]
    assert all(attrs.get("tabindex") == "0" and attrs.get("aria-label") for attrs in scrolling)
    assert len({attrs["aria-label"] for attrs in scrolling}) == len(scrolling)


def test_everything_but_the_message_is_in_sections_that_open(page: _Page) -> None:
    titles = [text.strip() for tag, text in page.texts if tag == "summary" and text.strip()]
    assert titles == [
        "Rouge-L by length",
        "Rouge-L by category",
        "Paired differences",
        "Exact match",
        "Other scores",
        "How this was made",
    ]
    assert page.count("table") == 7


def test_the_page_says_how_it_was_made(page: _Page) -> None:
    terms = [text for tag, text in page.texts if tag == "dt"]
    texts = [text for tag, text in page.texts if tag == "code"]
    made = dict(zip(terms, texts[-len(terms) :], strict=True))  # after the names in the headline
    assert made["Command"].startswith("dpkd eval --predictions evil=")
    assert "6 rows (sha256 " in made["Data d"]
    assert re.search(r"p\.jsonl \([0-9a-f]{12}\)", made["Predictions evil"])
    assert made["Answers of gold"] == "given as text"
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


def _colours(mode: int) -> dict[str, str]:
    halves = [style.split("@media (prefers-color-scheme: dark)") for style in _STYLES]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", "".join(half[mode] for half in halves)))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_keep_the_contrast_of_wcag_aa(mode: int) -> None:
    colours = _colours(mode)
    assert len(colours) == 19
    for text in ("text", "soft", "mark", "warn"):
        for behind in ("back", "card"):
            assert _contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    assert _contrast(colours["text"], colours["same"]) >= 4.5  # a marked word
    for part in ("line", *(f"s{number}" for number in range(NUM_COLOURS))):
        assert _contrast(colours[part], colours["back"]) >= 3, part


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_ten_models_have_ten_colours(mode: int) -> None:
    colours = _colours(mode)
    places = [_lab(colours[f"s{number}"]) for number in range(10)]
    nearest = min(math.dist(a, b) for a, b in combinations(places, 2))
    assert nearest > 20  # a difference of 2 can just be seen side by side


def _lab(colour: str) -> tuple[float, float, float]:
    """CIE L*a*b* of an sRGB colour (D65)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    xyz = (
        (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
        0.2126 * red + 0.7152 * green + 0.0722 * blue,
        (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089,
    )
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_rows_and_seeds_are_left_out_when_they_do_not_fit(page: _Page, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page.unpacked()["sets"][0]["note"] == ""
    answers = [[Answer(f"r{n}", "x" * 10, [], None) for n in range(4)] for _ in range(3)]
    eval_set = EvalSet("d", {}, [Example(f"r{n}", n + 1, ("y",), prompt="p") for n in range(4)], {}, [])
    scored = ScoredSet("m", eval_set, (1, 2, 3), [["p"] * 4] * 3, answers, {}, np.zeros((3, 4), dtype=int))
    for budget, shown, note in (
        (1000, (4, 3), ""),
        (90, (4, 2), "Here are 2 of 3 seeds; per_example.parquet has all."),
        (25, (2, 1), "Here are the first 2 of 4 rows and 1 of 3 seeds; per_example.parquet has all."),
        (5, (1, 1), "Here are the first 1 of 4 rows and 1 of 3 seeds; per_example.parquet has all."),
    ):
        monkeypatch.setattr(examples, "MAX_CHARACTERS", budget)
        assert examples._shown([scored]) == shown
        assert examples._note([scored], *shown) == note
