"""The page: self-contained, safe with any model's text, and holding what the report holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dpkd.evaluate.config import EvalConfig
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.svg import _round_up, grouped_bars, length_boxes

MakeConfig = Callable[..., EvalConfig]
WriteRows = Callable[[list[Any], str], Path]
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


@pytest.fixture
def page(make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]]) -> _Page:
    rows[0] |= {"instruction": _EVIL, "category": _EVIL, "id": _EVIL}
    rows[1]["output"] = [rows[1]["output"], _EVIL]
    config = make_config(
        predictions=[
            f"evil={write_rows([{'prediction': _EVIL}] * 6, 'p.jsonl')}",
            f"gold={write_rows([{'prediction': 'word ' * 30}] * 6, 'q.jsonl')}",
        ],
        data=f"d={write_rows(rows, 'd.jsonl')}",
    )
    evaluate(config)
    text = (config.out / "report.html").read_text()
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
    assert not [attrs for _, attrs in page.elements if {"src", "href", "srcset", "action"} & set(attrs)]
    style = "".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
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


def test_the_best_model_is_marked(page: _Page) -> None:
    best = [attrs for tag, attrs in page.elements if tag == "td" and attrs.get("class") == "best"]
    assert len(best) >= 2
    assert page.count("figure") == 3
    assert any("evil" in text or "gold" in text for tag, text in page.texts if tag == "title")


def test_bars_stand_at_their_values() -> None:
    intervals = [{"mean": 50.0, "low": 40.0, "high": 100.0}, {"mean": None, "low": None, "high": None}]
    svg = grouped_bars(["[0,3)", "<b>"], [("m", intervals)], "title & more")
    (bar,) = re.findall(r'<rect class="s0" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', svg)
    # the axis runs from y = 236 (0) to y = 14 (100)
    assert [float(value) for value in bar] == [125.0, 111.0]
    assert "&lt;b&gt;" in svg
    assert "<b>" not in svg
    assert "title &amp; more" in svg
    assert "m, [0,3): 50.00 [40.00, 100.00]" in svg


def test_boxes_say_their_quantiles() -> None:
    svg = length_boxes([("<m>", list(range(101)), 1), ("gold", [0.0], None)], "t")
    assert "&lt;m&gt;: median 50, half between 25 and 75, 90% between 5 and 95 words" in svg
    assert 'class="s1"' in svg


@pytest.mark.parametrize(
    ("value", "top"), [(1.0, 1.0), (1.1, 2.0), (37.0, 40.0), (41.0, 50.0), (81.0, 100.0), (0.3, 0.4)]
)
def test_axes_end_at_round_values(value: float, top: float) -> None:
    assert _round_up(value) == pytest.approx(top)


@pytest.fixture
def browse(
    make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]]
) -> Callable[[list[list[str]]], dict[str, Any]]:
    """Do things in the browser of examples, and say what it shows: 12 rows and a model that is right on every third."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    rows = [row | {"id": f"row-{i}", "instruction": f"Say {i}!"} for i, row in enumerate(rows * 2)]
    some = [{"prediction": row["output"] if i % 3 == 2 else "no"} for i, row in enumerate(rows)]
    none = [{"prediction": _EVIL}] * len(rows)
    config = make_config(
        predictions=[f"some={write_rows(some, 'p.jsonl')}", f"none={write_rows(none, 'q.jsonl')}"],
        data=f"d={write_rows(rows, 'd.jsonl')}",
    )
    evaluate(config)
    script = str(Path(__file__).parent / "browse.js")

    def run(steps: list[list[str]]) -> dict[str, Any]:
        command = [node, script, str(config.out / "report.html"), json.dumps(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def test_the_browser_turns_pages_and_shows_texts_as_they_are(browse: Callable[..., dict[str, Any]]) -> None:
    first = browse([])
    assert first["place"] == "12 of 12 rows, page 1 of 2"
    assert len(first["rows"]) == 10
    assert first["rows"][0].startswith(
        "row-0 \u00b7 qa | Prompt | Say 0! | Reference | word word | some | Rouge-L 0.0, "
    )
    assert _EVIL in first["rows"][0]
    second = browse([["key", "j"], ["key", "j"], ["key", "/"]])
    assert second["place"] == "12 of 12 rows, page 2 of 2"
    assert [row.split()[0] for row in second["rows"]] == ["row-10", "row-11"]
    assert second["focused"] is True
    assert browse([["key", "j"], ["key", "k"]]) == first


def test_the_browser_sorts_filters_and_searches(browse: Callable[..., dict[str, Any]]) -> None:
    assert "some ahead of none" in browse([])["sorts"]
    ahead = browse([["sort", "gap 0 1"]])
    assert [row.split()[0] for row in ahead["rows"][:5]] == ["row-2", "row-5", "row-8", "row-11", "row-0"]
    worst = browse([["sort", "low 0"]])
    assert worst["rows"][0].startswith("row-0 ")
    long = browse([["bucket", "[70,inf)"]])
    assert long["place"] == "4 of 12 rows, page 1 of 1"
    found = browse([["bucket", "[70,inf)"], ["search", "SAY 8"]])
    assert [row.split()[0] for row in found["rows"]] == ["row-8"]
    assert browse([["search", "nothing like it"]])["place"] == "0 of 12 rows, page 1 of 1"
