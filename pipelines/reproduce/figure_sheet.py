"""A sheet of matplotlib with panels above and small print below, saved as PNG and SVG beside its data."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.files import replacing, write_text
from dpkd.pipelines.reproduce.sources import Made

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow (too pale on white)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANEL_INCHES, _DPI = 3.9, 150
_PRINT_SIZE, _LINE_INCHES, _CHARACTERS_PER_INCH = 5.5, 0.105, 25


def new_sheet(title: str, made: Made, notes: list[str], panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` panels side by side; below them the notes and how it was made."""
    # the object API keeps no global state: the caller's own figures and backend stay as they are
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width = max(8.0, 4.0 * panels)
    per_line = int(width * _CHARACTERS_PER_INCH)
    texts = [*notes, *(f"{what}: {text}" for what, text in made.lines)]
    lines = [line for text in texts for line in textwrap.wrap(text, per_line, subsequent_indent="    ")]
    print_inches = _LINE_INCHES * (len(lines) + 1)
    height = _PANEL_INCHES + print_inches + 0.5
    share = print_inches / height
    figure = Figure(
        figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1, rect=(0, share, 1, 1 - share))
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    # names and paths are text: a $ in them begins no formula
    figure.text(0.012, 0.006, "\n".join(lines), fontsize=_PRINT_SIZE, va="bottom", color="#333333", parse_math=False)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.grid(color="#DDDDDD", linewidth=0.8)
        panel.tick_params(labelsize=8)
        panel.locator_params(nbins=6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_sheet(figure: Figure, out: Path, name: str, data: dict[str, Any]) -> list[Path]:
    """Write `figure` to OUT/NAME.png and .svg, and `data`, which it shows, to OUT/NAME.json; the paths."""
    import matplotlib

    paths = [out / f"{name}.png", out / f"{name}.svg", out / f"{name}.json"]
    write_text(paths[2], json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    # texts stay texts in the SVG, and equal data give equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpkd"}):
        for path in paths[:2]:
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
