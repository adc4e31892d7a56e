"""Every chart of a report as SVG: inline in the page, whose style colours it for light and dark, and as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

NUM_COLOURS = 10
_WIDTH, _RIGHT = 560, 12
_CURVE_WIDTH, _CURVE_HEIGHT, _LEFT, _TOP, _BOTTOM = 400, 210, 48, 10, 44
_NUM_TICKS = 5
_LABEL_HEIGHT = 28  # of the two lines beside a group of a plot
_NAME_CHARACTERS = 20
_CHARACTER = 6.6  # width of one, in the chart's units

Interval = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: its name, its colour, whether its points are few and shown (a validation), and its points."""

    name: str
    colour: int
    dotted: bool
    x: Sequence[float]
    y: Sequence[float]


def interval_bar(interval: Interval, top: float, colour: int) -> str:
    """A line from `low` to `high` with a dot at the mean, on an axis from 0 to `top`, for a cell of a table."""
    low, mean, high = (120 * min(1.0, value / (top or 1.0)) for value in _ends(interval))
    return (
        f'<svg class="bar" viewBox="-4 0 128 14" aria-hidden="true"><path class="grid" d="M0 7H120"/>'
        f'<path class="thick c{colour}" d="M{low:.1f} 7H{high:.1f}"/>'
        f'<circle class="s{colour}" cx="{mean:.1f}" cy="7" r="4"/></svg>'
    )


def dot_plot(
    groups: Sequence[tuple[str, Sequence[tuple[str, int, Interval]]]], title: str, label: str, height: float = 330
) -> str:
    """Groups of rows, one below the other: a dot with its interval for each model, and the name at the dot.

    A row is a name, a colour and an interval; one without a mean is left out. `height` is that of all rows, if they
    are not closer than 12 then.
    """
    shown = [(name, [row for row in rows if row[2]["mean"] is not None]) for name, rows in groups]
    values = [value for _, rows in shown for _, _, interval in rows for value in _ends(interval)]
    top = _round_up(max([*values, 0.0]) or 1.0)
    left, size = 118, min(20.0, max(12.0, (height - 12 * len(shown)) / max(1, sum(len(rows) for _, rows in shown))))
    heights = [max(size * len(rows), _LABEL_HEIGHT) + 12 for _, rows in shown]
    bottom = sum(heights)
    x = _Scale(0, top, left, _WIDTH - _RIGHT)
    parts, y = _axis(x, bottom, label), 6.0
    for (group, rows), height_of_group in zip(shown, heights, strict=True):
        for index, line in enumerate(group.split("\n")):
            parts.append(_text(0, y + 13 + 14 * index, line, "axis" if index else "", "start"))
        for place, (name, colour, interval) in enumerate(rows):
            middle = y + size * (place + 0.5)
            parts.append(_dot(x, middle, name, colour % NUM_COLOURS, interval, group.replace("\n", " ")))
        y += height_of_group
        parts.append(f'<path class="grid" d="M0 {y - 6:.1f}H{_WIDTH}"/>')
    return _svg(_WIDTH, bottom + 38, title, parts)


def length_boxes(rows: Sequence[tuple[str, Sequence[float], int | None]], title: str, label: str) -> str:
    """A line a model: 5% to 95% of its lengths, a box from 25% to 75%, a stroke at the median; None is uncoloured."""
    left, size = 160, 26
    quantiles = [np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() for _, values, _ in rows]
    top = _round_up(max((found[-1] for found in quantiles), default=1.0) or 1.0)
    bottom = size * len(rows)
    x = _Scale(0, top, left, _WIDTH - _RIGHT)
    parts = _axis(x, bottom, label)
    for place, ((name, _, colour), found) in enumerate(zip(rows, quantiles, strict=True)):
        y = size * place + size / 2
        low, first, median, third, high = found
        text = (
            f"{name}: median {median:g}, half between {first:g} and {third:g}, 90% between {low:g} and {high:g} words"
        )
        kind = "plain" if colour is None else f"s{colour % NUM_COLOURS}"
        parts.append(
            f"<g><title>{escape(text)}</title>{_text(left - 10, y + 4, shortened(name), anchor='end')}"
            f'<path class="bar-end" d="M{x(low):.1f} {y}H{x(high):.1f}"/>'
            f'<rect class="{kind}" x="{x(first):.1f}" y="{y - 7}" width="{max(1.0, x(third) - x(first)):.1f}" '
            f'height="14"/><path class="bar-end" d="M{x(median):.1f} {y - 7}v14"/></g>'
        )
    return _svg(_WIDTH, bottom + 40, title, parts)


def line_chart(lines: Sequence[Line], title: str, label: str) -> str:
    """Curves over a shared axis from 0; dotted ones show their points. `label` is that of the axis below."""
    low, high = _span([value for line in lines for value in line.y])
    ticks = _ticks(low, high)
    right = max((value for line in lines for value in line.x), default=1.0) or 1.0
    x = _Scale(0, right, _LEFT, _CURVE_WIDTH - _RIGHT)
    y = _Scale(min(low, ticks[0]), max(high, ticks[-1]), _CURVE_HEIGHT - _BOTTOM, _TOP)
    parts = [_text((_LEFT + _CURVE_WIDTH) / 2, _CURVE_HEIGHT - 6, label, "axis")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_CURVE_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y(tick) + 4, f"{tick:g}", anchor="end"))
    parts += [_text(x(tick), _CURVE_HEIGHT - 26, f"{tick:g}") for tick in _ticks(0, right) if tick <= right]
    for line in lines:
        colour = line.colour % NUM_COLOURS
        points = [(x(a), y(b)) for a, b in zip(line.x, line.y, strict=True)]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        dots = [f'<circle class="s{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
        parts.append(
            f"<g><title>{escape(f'{line.name}: last {line.y[-1]:.4g}')}</title>"
            f'<path class="curve c{colour}{" dotted" if line.dotted else ""}" d="{path}"/>'
            f"{''.join(dots) if line.dotted or len(points) == 1 else ''}</g>"
        )
    return _svg(_CURVE_WIDTH, _CURVE_HEIGHT, title, parts)


def standalone(charts: Sequence[tuple[str, str]], style: str, caption: Sequence[str]) -> str:
    """A file of charts, one below the other, each a title and its SVG; `caption` has the lines of small print below."""
    parts, y = [], 0.0
    for title, chart in charts:
        width, height = chart.split('viewBox="0 0 ')[1].split('"')[0].split()
        parts.append(_text(0, y + 16, title, "title", "start"))
        parts.append(chart.replace("<svg ", f'<svg y="{y + 26:.0f}" width="{width}" height="{height}" ', 1))
        y += float(height) + 44
    parts += [_text(0, y + 10 + 11 * index, line, "caption", "start") for index, line in enumerate(caption)]
    inner = f'<style>{style}</style><rect class="back" x="-10" width="100%" height="100%"/>{"".join(parts)}'
    across, down = _WIDTH + 20, round(y + 16 + 11 * len(caption))
    size = f'width="{across}" height="{down}" viewBox="-10 0 {across} {down}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{inner}</svg>\n'


def shortened(name: str, characters: int = _NAME_CHARACTERS) -> str:
    """`name` with its middle left out if it is longer: names often differ at the end."""
    if len(name) <= characters:
        return name
    tail = characters // 2
    return f"{name[: characters - 1 - tail]}\u2026{name[-tail:]}"


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values from `low` to `high` to positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def _axis(x: _Scale, bottom: float, label: str) -> list[str]:
    """The axis below a plot from 0: five ticks with lines up to the top, and its label."""
    parts = []
    for tick in (x.high * step / 4 for step in range(5)):
        below = _text(x(tick), bottom + 15, f"{tick:g}")
        parts.append(f'<path class="grid" d="M{x(tick):.1f} 0V{bottom:.0f}"/>{below}')
    return [*parts, _text((x.start + x.end) / 2, bottom + 33, label, "axis")]


def _ends(interval: Interval) -> list[float]:
    """Low, mean and high; one row has no interval, and its ends are the mean."""
    mean = float(interval["mean"])
    return [mean if interval[key] is None else float(interval[key]) for key in ("low", "mean", "high")]


def _dot(x: _Scale, y: float, name: str, colour: int, interval: Interval, group: str) -> str:
    low, mean, high = _ends(interval)
    text = f"{name}, {group}: {mean:.2f}" + ("" if interval["low"] is None else f" [{low:.2f}, {high:.2f}]")
    label = shortened(name)
    inside = x(high) + 8 + _CHARACTER * len(label) <= _WIDTH
    at, anchor = (x(high) + 7, "start") if inside else (x(low) - 7, "end")
    return (
        f'<g><title>{escape(text)}</title><path class="thick c{colour}" d="M{x(low):.1f} {y:.1f}H{x(high):.1f}"/>'
        f'<circle class="s{colour}" cx="{x(mean):.1f}" cy="{y:.1f}" r="4.5"/>'
        f"{_text(at, y + 4, label, 'name', anchor)}</g>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text{of_kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    label = escape(title)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 3, 4, 5, 6, 8 or 10 times a power of ten: a top whose quarters are round."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * power >= value)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value, moved apart if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)


def _ticks(low: float, high: float) -> list[float]:
    """Round values from at or below `low` to at or above `high`, some five of them."""
    rough = (high - low) / (_NUM_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    return [step * place for place in range(math.floor(low / step), math.ceil(high / step) + 1)]
