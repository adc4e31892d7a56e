"""Figures of matplotlib: no global state, one palette, PNG and SVG from one drawing."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow (too pale on white)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
#: a second sign, for more series than colours and for print in grey
HATCHES = ("", "//", "..", "xx")
GRID = "#DDDDDD"
_DPI = 150
_LEGEND_CHARACTERS, _COMMAND_CHARACTERS = 110, 360


def require_matplotlib() -> None:
    """Raise `UserError` when matplotlib is missing; call it before long work whose end is a plot."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "plots need matplotlib, which is not installed", advice="In the clone: pip install -e '.[report]'"
        )


def new_figure(
    width: float, height: float, num_panels: int = 1, *, side_by_side: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` by `height` inches and its panels, one below the other or side by side."""
    # the object API keeps no global state: the caller's own figures and backend stay as they are
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    shape = (1, num_panels) if side_by_side else (num_panels, 1)
    panels = list(figure.subplots(*shape, squeeze=False).flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure, panels


def grouped_bars(
    panel: Axes,
    series: Mapping[str, Sequence[Mapping[str, Any] | None]],
    labels: Sequence[str],
    colours: Mapping[str, int] | None = None,
) -> None:
    """Draw a bar with its interval (`mean`, `low`, `high`) for each value of each series, side by side by label.

    A value that is None, or whose mean is None, has no bar and leaves its space empty. `colours` are indices by name;
    None: in the order of the series.
    """
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        shift = (index - (len(series) - 1) / 2) * width
        shown = {place + shift: value for place, value in enumerate(values) if value and value["mean"] is not None}
        means = [value["mean"] for value in shown.values()]
        # rounding may put an end of the interval just on the wrong side of the mean
        # and one row has no interval
        below = [max(0.0, value["mean"] - _end(value, "low")) for value in shown.values()]
        above = [max(0.0, _end(value, "high") - value["mean"]) for value in shown.values()]
        colour = colours[name] if colours else index
        panel.bar(
            list(shown),
            means,
            width * 0.92,
            yerr=[below, above],
            label=name,
            color=COLOURS[colour % len(COLOURS)],
            hatch=HATCHES[colour // len(COLOURS) % len(HATCHES)],
            edgecolor="white",
            error_kw={"elinewidth": 1.0, "capsize": 2.5, "ecolor": "#333333"},
        )
    panel.set_xticks(range(len(labels)), labels)
    panel.set_xlim(-0.6, len(labels) - 0.4)
    panel.grid(axis="y", color=GRID, linewidth=0.8)


def _end(interval: Mapping[str, Any], name: str) -> float:
    return float(interval["mean"] if interval[name] is None else interval[name])


def caption_text(lines: Sequence[str], command: str, whole: str, width: int) -> str:
    """`lines` and the command, wrapped to `width` characters; the file `whole` has a long command in full."""
    if len(command) > _COMMAND_CHARACTERS:
        command = f"{command[:_COMMAND_CHARACTERS]} ... (complete in {whole})"
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in (*lines, command))


def frame_figure(figure: Figure, panels: Sequence[Axes], caption: str, title: str | None = None) -> None:
    """Put one legend of all panels above them, with the title, and the caption below."""
    # names and paths are text: a $ in them starts no formula
    figure.supxlabel(caption, fontsize=6.5, color="#555555", x=0.01, ha="left", parse_math=False)
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        # as many entries per line as fit, so that long names stay inside the figure
        num_columns = max(1, min(4, len(handles), _LEGEND_CHARACTERS // (max(map(len, handles)) + 6)))
        # the title belongs to the legend: the layout would put a figure's title and a legend in the same place
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=num_columns,
            frameon=False,
            fontsize=9,
            title=title,
            title_fontsize=11,
        )
    elif title:
        figure.suptitle(title, fontsize=11)


def save_figure(figure: Figure, path: Path, description: str) -> list[Path]:
    """Write `figure` to `path` (without suffix) as PNG and SVG; returns the paths. Equal figures give equal files."""
    import matplotlib

    figure.draw_without_rendering()  # lay out once, for all formats
    figure.set_layout_engine("none")
    described = {"Title": path.name, "Description": description}
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    # text stays text in the SVG
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpkd"}):
        for file in paths:
            with replacing(file) as temporary:
                metadata = described | ({"Date": None} if file.suffix == ".svg" else {})
                figure.savefig(temporary, dpi=_DPI, metadata=metadata)
    return paths
