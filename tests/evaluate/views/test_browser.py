"""The page in a real Chromium: it loads without errors, sorts, filters, searches and opens examples."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig

#: 1 where a browser must be there (as in CI): without one the tests then fail instead of being skipped
REQUIRED = "DPKD_REQUIRE_BROWSER"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><b>bold</b>"
_NUM_ROWS = 24
_CATEGORIES = ("qa", "<i>brainstorm</i>", "qa")

Driver = Any


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows; `some` is right on every third of them, `other` on every fourth, and answers the first with markup."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {
            "id": f"row-{i}",
            "instruction": f"Say {i}!",
            "output": " ".join(["word"] * (2, 30, 70)[i % 3]),
            "category": _CATEGORIES[i % 3],
        }
        for i in range(_NUM_ROWS)
    ]
    some = [{"prediction": row["output"] if i % 3 == 2 else "no"} for i, row in enumerate(rows)]
    other = [{"prediction": row["output"] if i % 4 == 3 else "never"} for i, row in enumerate(rows)]
    other[0] = {"prediction": f"{_EVIL} {'long' * 300}"}
    run = folder / "run"
    run.mkdir()
    _write(run / "metrics.jsonl", [{"step": step, "loss": 1 / step} for step in range(1, 9)])
    _write(run / "validation.jsonl", [{"step": 8, "loss": 0.2, "rouge_l": 12.5}])
    options = {
        "predictions": [f"some={_write(folder / 'p.jsonl', some)}", f"other={_write(folder / 'q.jsonl', other)}"],
        "data": f"d={_write(folder / 'd.jsonl', rows)}",
        "run": f"some={run}",
        "out": folder / "out",
        "num_sign_flips": 100,
    }
    return evaluate(EvalConfig.parse(options, where="a test")).parent / "report.html"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One browser for all tests of this file."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    there = {"chromium": browser, "chromedriver": chromedriver, "selenium": find_spec("selenium")}
    if missing := ", ".join(name for name, found in there.items() if found is None):
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"not installed, and {REQUIRED}=1 asks for it: {missing}")
        pytest.skip(f"not installed: {missing}")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield found
    found.quit()


@pytest.fixture
def page(driver: Driver, report: Path) -> Driver:
    """The report, freshly loaded in a window of a desktop; older lines of the browser's logs are taken away."""
    _show_on(driver, 1200, 900, "light")
    driver.get_log("performance")
    driver.get_log("browser")
    driver.get(report.as_uri())
    return driver


def _show_on(driver: Driver, width: int, height: int, mode: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _ids(page: Driver) -> list[str]:
    """The ids of the examples that are shown, in order."""
    heads: list[str] = page.execute_script(
        "return [...document.querySelectorAll('#list small')].map(e => e.textContent)"
    )
    return [text.split(" ")[0] for text in heads if text.startswith("row-")]


def _choose(page: Driver, control: str, text: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(page.find_element(By.ID, control)).select_by_visible_text(text)


def _press(page: Driver, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def _focused(page: Driver) -> str:
    found: str = page.execute_script("return document.activeElement.id || document.activeElement.tagName")
    return found


def test_it_loads_without_a_complaint_and_asks_for_nothing(page: Driver, report: Path) -> None:
    assert page.title == "Evaluation: some, other on d"
    assert page.get_log("browser") == []
    events = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked == [report.as_uri()]


def test_a_request_that_the_page_would_make_is_stopped_by_its_policy(page: Driver) -> None:
    """The test above does not pass by accident: what a text injects is neither loaded nor run."""
    page.execute_script(
        "const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image);"
        "const script = document.createElement('script'); script.textContent = 'document.title = 1';"
        "document.body.append(script);"
    )
    assert page.title != "1"
    complaints = [line["message"] for line in page.get_log("browser")]
    assert any("Content Security Policy" in text for text in complaints)


def test_an_example_opens_and_its_markup_is_text(page: Driver) -> None:
    from selenium.webdriver.common.by import By

    head = page.find_element(By.CSS_SELECTOR, "#list summary")
    head.click()
    texts = [part.text for part in page.find_elements(By.CSS_SELECTOR, "#list details[open] .part")]
    assert texts[0] == "Prompt\nSay 0!"
    assert texts[1] == "Reference\nword word"
    assert texts[2] == "some\nRouge-L 0.0, exact match no, 1 words, [0,30)\nno"
    assert texts[3].startswith("other\nRouge-L ")
    assert _EVIL in texts[3]
    assert page.title == "Evaluation: some, other on d"
    assert (
        page.execute_script("return document.querySelectorAll('#browser img, #browser b, #browser script').length") == 0
    )
    assert page.get_log("browser") == []
    # the answers are side by side
    tops = {round(part.location["y"]) for part in page.find_elements(By.CSS_SELECTOR, "details[open] .part")}
    assert len(tops) == 1


def test_it_sorts_by_difference(page: Driver) -> None:
    _choose(page, "sort", "some ahead of other")
    # right where the other is not: every third but 11 and 23, where both are
    assert _ids(page)[:6] == ["row-2", "row-5", "row-8", "row-14", "row-17", "row-20"]
    _choose(page, "sort", "other ahead of some")
    assert _ids(page)[:4] == ["row-3", "row-7", "row-15", "row-19"]
    _choose(page, "sort", "some: best first")
    assert _ids(page)[:4] == ["row-2", "row-5", "row-8", "row-11"]


def test_it_filters_and_searches(page: Driver) -> None:
    from selenium.webdriver.common.by import By

    place = page.find_element(By.ID, "place")
    assert place.text == "24 of 24 rows, page 1 of 2"
    _choose(page, "bucket", "[70,inf)")
    assert _ids(page) == [f"row-{i}" for i in range(2, _NUM_ROWS, 3)]
    _choose(page, "bucket", "all lengths")
    _choose(page, "category", "<i>brainstorm</i>")
    assert _ids(page) == [f"row-{i}" for i in range(1, _NUM_ROWS, 3)]
    page.find_element(By.ID, "search").send_keys("SAY 7")
    assert _ids(page) == ["row-7"]
    assert place.text == "1 of 24 rows, page 1 of 1"
    page.find_element(By.ID, "search").send_keys("not there")
    assert _ids(page) == []


def test_the_keyboard_reaches_everything(page: Driver) -> None:
    from selenium.webdriver.common.keys import Keys

    _press(page, "/")
    assert _focused(page) == "search"
    _press(page, "j")
    assert page.execute_script("return document.getElementById('search').value") == "j"
    _press(page, Keys.BACKSPACE, Keys.ESCAPE, "j")
    assert _focused(page) == "SUMMARY"
    _press(page, "j", Keys.ENTER)
    shown = "return [...document.querySelectorAll('details')].map(e => e.open)"
    assert page.execute_script(shown)[:3] == [False, True, False]
    _press(page, "k")
    assert page.execute_script("return document.activeElement.textContent").startswith("Say 0!")
    _press(page, *["j"] * 20)  # past the last of the 20 of a page
    assert page.execute_script("return document.activeElement.textContent").startswith("Say 20!")
    _press(page, "k")
    assert page.execute_script("return document.activeElement.textContent").startswith("Say 19!")


def test_tab_reaches_every_control_and_the_focus_is_seen(page: Driver) -> None:
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(40):
        _press(page, Keys.TAB)
        reached.append(_focused(page))
        outline = page.execute_script(
            "const style = getComputedStyle(document.activeElement); return [style.outlineStyle, style.outlineWidth]"
        )
        assert outline == ["solid", "3px"], reached
        if reached[-1] == "SUMMARY":
            break
    assert [name for name in reached if name.islower()] == ["set", "sort", "bucket", "category", "search", "after"]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_it_follows_the_mode_and_fits_a_phone(page: Driver, mode: str) -> None:
    from selenium.webdriver.common.by import By

    _show_on(page, 390, 844, mode)
    page.find_element(By.CSS_SELECTOR, "#list summary").click()
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[mode]
    widths = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths == [390, 390]
    sizes = page.execute_script(
        "return [...document.querySelectorAll('figure .scroll svg')].map(svg =>"
        "  13 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"
    )
    assert min(sizes) >= 10  # pixels of the charts' words, which stay readable: the charts scroll instead


def test_every_chart_is_drawn(page: Driver) -> None:
    from PIL import Image
    from selenium.webdriver.common.by import By

    figures = page.find_elements(By.CSS_SELECTOR, "figure")
    assert len(figures) == 5  # three of the set, two of the run
    for figure in figures:
        picture = Image.open(io.BytesIO(figure.screenshot_as_png)).convert("RGB")
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height) or []}
        assert any(max(colour) - min(colour) > 100 for colour in colours)  # bars, boxes or curves, not only grey
