"""The page in a real Chromium: its first screen, and the examples: marks, filters, order, addresses, long answers."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
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
_LONG = "long " * 200_000
_NUM_ROWS = 24
_CATEGORIES = ("qa", "<i>brainstorm</i>", "qa")

Driver = Any


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows; `some` is right on every third of them, `base` on every fourth, in other words; two seeds of `some`."""
    folder = tmp_path_factory.mktemp("report")
    rows: list[dict[str, Any]] = [
        {
            "id": f"row-{i}",
            "instruction": f"Say {i}!",
            "output": " ".join(["running words"] * (1, 15, 35)[i % 3]),
            "category": _CATEGORIES[i % 3],
        }
        for i in range(_NUM_ROWS)
    ]
    rows[1] = {
        "id": "row-1",
        "category": _CATEGORIES[1],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Say 1!"},
            {"role": "assistant", "content": rows[1]["output"]},
        ],
    }
    gold = ["running words " * (1, 15, 35)[i % 3] for i in range(_NUM_ROWS)]
    some = [{"prediction": gold[i] if i % 3 == 2 else "no", "seed": 1} for i in range(_NUM_ROWS)]
    some += [{"prediction": f"Well, the WORD {i} runs.", "seed": 2} for i in range(_NUM_ROWS)]
    base = [{"prediction": gold[i] if i % 4 == 3 else "never"} for i in range(_NUM_ROWS)]
    base[0] = {"prediction": _EVIL}
    base[4] = {"prediction": _LONG}
    run = folder / "run"
    run.mkdir()
    _write(run / "metrics.jsonl", [{"step": step, "loss": 1 / step} for step in range(1, 9)])
    _write(run / "validation.jsonl", [{"step": 8, "loss": 0.2, "rouge_l": 12.5}])
    options = {
        "predictions": [f"base={_write(folder / 'q.jsonl', base)}", f"some={_write(folder / 'p.jsonl', some)}"],
        "data": f"d={_write(folder / 'd.jsonl', rows)}",
        "run": f"some={run}",
        "baseline": "base",
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
    _open(driver, report.as_uri())
    return driver


def _open(driver: Driver, address: str) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    driver.get("about:blank")  # another part after the # alone would not load the page again
    driver.get(address)
    WebDriverWait(driver, 20).until(lambda it: it.execute_script("return document.documentElement.dataset.ready"))


def _show_on(driver: Driver, width: int, height: int, mode: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _ids(page: Driver) -> list[str]:
    """The ids of the examples in the list, in order."""
    texts: list[str] = page.execute_script(
        "return [...document.querySelectorAll('#list small')].map(e => e.textContent)"
    )
    return [text.split(" ")[0] for text in texts]


def _choose(page: Driver, control: str, text: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(page.find_element(By.ID, control)).select_by_visible_text(text)


def _type(page: Driver, control: str, text: str) -> None:
    from selenium.webdriver.common.by import By

    page.find_element(By.ID, control).send_keys(text)


def _press(page: Driver, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def _focused(page: Driver) -> str:
    found: str = page.execute_script("return document.activeElement.id || document.activeElement.tagName")
    return found


def _blocks(page: Driver) -> dict[str, str]:
    """The texts of the example that is shown, by title."""
    found = page.execute_script(
        "return [...document.querySelectorAll('#example .text')]"
        ".map(e => [e.querySelector('h3').textContent, e.querySelector('pre').textContent])"
    )
    return dict(found)


def _marked(page: Driver, title: str) -> list[str]:
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll('#example .text')].filter(e => e.querySelector('h3').textContent ==="
        " arguments[0]).flatMap(e => [...e.querySelectorAll('mark')].map(mark => mark.textContent))",
        title,
    )
    return found


def test_it_loads_without_a_complaint_and_asks_for_nothing(page: Driver, report: Path) -> None:
    assert page.title == "Evaluation: base, some on d"
    assert page.get_log("browser") == []
    events = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert asked <= {report.as_uri(), "about:blank"}


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_to_mend(page: Driver, report: Path, mode: str, width: int) -> None:
    """Roles, labels, contrast and order, with all sections open and an example shown."""
    from axe_core_python.selenium import Axe

    _show_on(page, width, 900, mode)
    _open(page, report.as_uri() + "#example=row-1")
    page.execute_script("for (const section of document.querySelectorAll('details')) section.open = true")
    found = Axe().run(page)
    assert found["passes"]
    assert [f"{rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in found["violations"]] == []
    page.execute_script("document.querySelector('main').append(new Image())")  # without a text for those who hear it
    assert [rule["id"] for rule in Axe().run(page)["violations"]] == ["image-alt"]


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


def test_the_first_screen_has_message_cautions_table_and_plot(page: Driver) -> None:
    _show_on(page, 1280, 900, "light")
    bottoms = page.execute_script(
        "return ['.headline', '.cautions', '.ranked', '.first figure svg']"
        ".map(part => document.querySelector(part).getBoundingClientRect().bottom)"
    )
    assert 0 < max(bottoms) <= 900
    text = page.execute_script("return document.querySelector('.headline').textContent")
    # right on 8 of 24 rows with one seed of two, against 6 of 24
    assert text.startswith("some has Rouge\u2011L 24.22; -0.78 [")
    assert "] against base, which may be chance (p = 0." in text
    cautions = page.execute_script("return document.querySelector('.cautions').textContent")
    assert "Few rows: 24 in all." in cautions
    order = page.execute_script("return [...document.querySelectorAll('.ranked th .model')].map(e => e.textContent)")
    assert [name.strip() for name in order] == ["base", "some"]


def test_markup_of_a_model_is_text(page: Driver) -> None:
    assert _blocks(page)["base"] == _EVIL
    assert page.title == "Evaluation: base, some on d"
    assert (
        page.execute_script("return document.querySelectorAll('#browser img, #browser b, #browser script').length") == 0
    )
    assert page.get_log("browser") == []


def test_the_prompt_is_shown_as_messages(page: Driver) -> None:
    _press(page, "j")
    blocks = _blocks(page)
    assert list(blocks)[:3] == ["system", "user", "Reference"]
    assert (blocks["system"], blocks["user"]) == ("Be brief.", "Say 1!")


def test_the_words_that_rouge_counts_are_marked(page: Driver) -> None:
    """With the library's stems: `WORD` and `words` are one, and so are `runs` and `running`."""
    _choose(page, "seed", "2")
    assert _blocks(page)["some"] == "Well, the WORD 0 runs."
    # the reference is `running words`: of the two, one at most is in its order
    assert len(_marked(page, "some")) == len(_marked(page, "Reference")) == 1
    page.execute_script("document.activeElement.blur()")
    _press(page, "j", "j")
    # 35 times `running words`: both
    assert _marked(page, "some") == ["WORD", "runs"]
    assert [text.lower() for text in _marked(page, "Reference")] == ["words", "running"]
    detail = page.execute_script("return document.querySelectorAll('#example .answers small')[1].textContent")
    # 2 of 5 and of 70: an F-measure of 100 * 4 / 75
    assert detail == "Rouge-L 5.3 \u00b7 2 in common: 40% of the answer, 3% of the reference \u00b7 5 words"


def test_the_order_follows_the_difference(page: Driver) -> None:
    _choose(page, "sort", "largest gain")
    # right where the baseline is not: every third but 11 and 23, where both are
    assert _ids(page)[:6] == ["row-2", "row-5", "row-8", "row-14", "row-17", "row-20"]
    _choose(page, "sort", "largest loss")
    assert _ids(page)[:4] == ["row-3", "row-7", "row-15", "row-19"]
    _choose(page, "model", "base")
    _choose(page, "other", "some")
    assert _ids(page)[:6] == ["row-2", "row-5", "row-8", "row-14", "row-17", "row-20"]
    _choose(page, "sort", "highest score")
    assert _ids(page)[:3] == ["row-3", "row-7", "row-11"]


def test_it_filters_and_searches(page: Driver) -> None:
    from selenium.webdriver.common.by import By

    place = page.find_element(By.ID, "place")
    assert place.text == "24 of 24 rows, page 1 of 1"
    _choose(page, "bucket", "[70,inf)")
    assert _ids(page) == [f"row-{i}" for i in range(2, _NUM_ROWS, 3)]
    _choose(page, "outcome", "tied")
    assert _ids(page) == ["row-11", "row-23"]
    _choose(page, "bucket", "all")
    _choose(page, "outcome", "lost")
    assert _ids(page) == ["row-3", "row-7", "row-15", "row-19"]
    _choose(page, "outcome", "all")
    _type(page, "from", "50")
    assert _ids(page) == [f"row-{i}" for i in range(2, _NUM_ROWS, 3)]
    _type(page, "to", "60")
    assert _ids(page) == []
    assert page.find_element(By.ID, "example").text == "Choose a dot or a row."
    page.find_element(By.ID, "from").clear()
    page.find_element(By.ID, "to").clear()
    _choose(page, "category", "<i>brainstorm</i>")
    _type(page, "search", "SAY 7")
    assert _ids(page) == ["row-7"]
    assert place.text == "1 of 24 rows, page 1 of 1"


def test_a_dot_opens_its_row(page: Driver) -> None:
    dots = "[...document.querySelectorAll('#scatter circle')]"
    assert page.execute_script(f"return {dots}.length") == _NUM_ROWS
    page.execute_script(
        f"{dots}.find(e => e.row.id === 'row-5').dispatchEvent(new MouseEvent('click', {{bubbles: true}}))"
    )
    assert "row=row-5" in page.current_url
    assert page.execute_script(f"return {dots}.filter(e => e.classList.contains('chosen')).length") == 1
    assert page.execute_script(f"return {dots}.at(-1).row.id") == "row-5"  # drawn last, above the others
    assert _blocks(page)["user"] == "Say 5!"


def test_an_address_opens_one_example_with_its_settings(page: Driver, report: Path) -> None:
    _choose(page, "sort", "largest loss")
    _choose(page, "seed", "2")
    _choose(page, "category", "qa")
    page.execute_script("document.activeElement.blur()")
    _press(page, "j")
    address, shown, ids = page.current_url, _blocks(page), _ids(page)
    assert address.startswith(report.as_uri() + "#")
    _open(page, address)
    assert (_blocks(page), _ids(page)) == (shown, ids)
    assert page.current_url == address
    _open(page, f"{report.as_uri()}#row=row-9&model=base&other=some")
    assert list(_blocks(page))[1:] == ["Reference", "base", "some"]
    assert _blocks(page)["user"] == "Say 9!"
    # a name that is not in the report changes nothing
    _open(page, f"{report.as_uri()}#model=other&seed=77&row=none")
    assert _blocks(page)["user"] == "Say 0!"
    assert page.get_log("browser") == []


def test_seeds_are_switched(page: Driver) -> None:
    assert _blocks(page)["some"] == "no"
    before = page.execute_script("return document.querySelector('#list small').textContent")
    _choose(page, "seed", "2")
    assert _blocks(page)["some"] == "Well, the WORD 0 runs."
    assert _blocks(page)["base"] == _EVIL  # of its only seed
    assert page.execute_script("return document.querySelector('#list small').textContent") != before


def test_an_answer_of_a_megabyte_is_shown_in_parts(page: Driver) -> None:
    from selenium.webdriver.common.by import By

    started_s = time.monotonic()
    _press(page, *["j"] * 4)
    assert len(_blocks(page)["base"]) == 20_000
    assert time.monotonic() - started_s < 5
    (button,) = (found for found in page.find_elements(By.XPATH, "//button[contains(., 'more of')]") if found.text)
    assert button.text == "Show 20,000 more of 980,000 characters"
    button.click()
    assert len(_blocks(page)["base"]) == 40_000
    assert button.text == "Show 20,000 more of 960,000 characters"


def test_the_keyboard_reaches_everything_and_can_be_switched_off(page: Driver) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    _press(page, "/")
    assert _focused(page) == "search"
    _press(page, "j")
    assert page.execute_script("return document.getElementById('search').value") == "j"
    _press(page, Keys.BACKSPACE, Keys.ESCAPE, "j", "j", "k")
    assert _blocks(page)["user"] == "Say 1!"
    page.find_element(By.ID, "keys").click()
    assert "keys=off" in page.current_url
    _press(page, Keys.TAB, "j", "/")
    assert _blocks(page)["user"] == "Say 1!"
    assert _focused(page) != "search"


def test_tab_reaches_every_control_and_the_focus_is_seen(page: Driver) -> None:
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(60):
        _press(page, Keys.TAB)
        reached.append(_focused(page))
        outline = page.execute_script(
            "const style = getComputedStyle(document.activeElement); return [style.outlineStyle, style.outlineWidth]"
        )
        assert outline == ["solid", "3px"], reached
        if reached[-1] == "keys":
            break
    assert [name for name in reached if name.islower()] == [
        *("model", "other", "seed", "outcome", "bucket", "category", "from", "to", "search", "sort", "keys"),
    ]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_it_follows_the_mode_and_fits_a_phone(page: Driver, mode: str) -> None:
    _show_on(page, 390, 844, mode)
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[mode]
    page.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    widths = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths == [390, 390]
    sizes = page.execute_script(
        "return [...document.querySelectorAll('figure .scroll > svg')].map(svg =>"
        "  12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"
    )
    assert min(sizes) >= 10  # pixels of the charts' words, which stay readable: the charts scroll instead


def test_every_chart_is_drawn(page: Driver) -> None:
    from PIL import Image
    from selenium.webdriver.common.by import By

    page.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    figures = page.find_elements(By.CSS_SELECTOR, "figure")
    assert len(figures) == 6  # three of the set, two of the run, and the scatter
    for figure in figures:
        picture = Image.open(io.BytesIO(figure.screenshot_as_png)).convert("RGB")
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height) or []}
        assert any(max(colour) - min(colour) > 90 for colour in colours)  # dots, boxes or curves, not only grey


def test_print_opens_every_section(page: Driver) -> None:
    page.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert page.execute_script("return [...document.querySelectorAll('main > * details.part')].every(e => e.open)")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert page.execute_script("return getComputedStyle(document.getElementById('browser')).display") == "none"
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
