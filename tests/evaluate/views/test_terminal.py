"""Standard output: drawn tables on a terminal, `report.md` in a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.views.terminal import draw_report

_PRINT = (
    "import json, sys; from dpkd.evaluate.views.terminal import print_report;"
    "print_report(json.loads(open(sys.argv[1], encoding='utf-8').read()))"
)


@pytest.fixture
def report_path(
    make_config: Callable[..., EvalConfig], write_rows: Callable[..., Path], rows: list[dict[str, Any]]
) -> Path:
    """Model `good` is right throughout, `half` on rows 0, 2 and 4: one of each bucket."""
    good = [{"prediction": row["output"]} for row in rows]
    half = [{"prediction": row["output"] if i % 2 == 0 else "no"} for i, row in enumerate(rows)]
    return evaluate(
        make_config(
            predictions=[f"half={write_rows(half, 'h.jsonl')}", f"good={write_rows(good, 'g.jsonl')}"],
            data=f"d={write_rows(rows, 'd.jsonl')}",
        )
    )


def _drawn(report: dict[str, Any], width: int) -> list[str]:
    file = io.StringIO()
    draw_report(report, Console(file=file, width=width))
    return file.getvalue().splitlines()


def test_tables_are_drawn_with_intervals_and_the_best_marked(report_path: Path) -> None:
    lines = _drawn(json.loads(report_path.read_text()), 120)
    start = next(place for place, line in enumerate(lines) if line.startswith("Exact match, overall and by length"))
    header, below, half, ends, good = (lines[start + place] for place in (2, 3, 5, 6, 7))
    assert re.split(r"\s{2,}", header.strip()) == ["[0,30)", "[30,70)", "[70,inf)"]
    assert re.split(r"\s{2,}", below.strip()) == ["Model", "Exact match", *["(n=2, few rows)"] * 3]
    assert re.split(r"\s{2,}", half.strip()) == ["half", "50.00", "50.00", "50.00", "50.00"]
    assert len(re.findall(r"\[\d+\.\d\d, \d+\.\d\d\]", ends)) == 4
    assert re.split(r"\s{2,}", good.strip()) == ["good", *["100.00 \u2605"] * 4]
    (difference,) = [line for line in lines if "3 / 3 / 0" in line]
    assert difference.startswith(" good - half ")


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fit_a_narrow_terminal(report_path: Path, width: int) -> None:
    report = json.loads(report_path.read_text())
    name = "[bold]a-model-of-a-name-that-is-longer-than-many[/bold]"
    report["models"] = {name if key == "half" else key: model for key, model in report["models"].items()}
    report["comparisons"]["d"][0]["baseline"] = name
    report["roles"]["baseline"] = name
    lines = _drawn(report, width)
    assert max(map(len, lines)) <= width
    tables = [line for line in lines if re.match(r" (half|good|\[bold|- )", line)]
    assert any("[bold]" in line and "\u2026" in line for line in tables)  # cut in the middle, and no markup
    assert not [line for line in tables if re.search(r"\[[+-]?[\d.]+,?\s*$", line)]  # no interval is broken
    assert sum(line.count("100.00") for line in tables) >= 4


def test_a_real_terminal_gets_tables_and_a_pipe_gets_markdown(report_path: Path) -> None:
    command = [sys.executable, "-c", _PRINT, str(report_path)]
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    headline = (
        "good has the highest Rouge-L, 100.00; +50.00 [-7.48, +100.00] over half, which may be chance (p = 0.250)."
    )
    assert piped == (report_path.parent / "report.md").read_text() + f"\n{headline}\n"
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # what Linux says when the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode()
    assert "| ---" not in text
    assert re.search(r"\x1b\[1;36m *100\.00 \u2605", text)  # the best in bold colour
    assert "(n=2, few rows)" in text
    assert " ".join(text.split()).endswith("which may be chance (p = 0.250).\x1b[0m")  # it closes the output
