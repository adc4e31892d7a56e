"""The charts of `report.html` as inline SVG; colours are classes that the page's style sets for light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

NUM_COLOURS = 7
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 560, 300, 58, 56, 14
_ROW = 34
_NAME_CHARACTERS = 20
_NUM_TICKS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: its name, its colour, whether its points are few and shown (a validation), and its points."""

    name: str
    colour: int
    dotted: bool
    x: Sequence[float]
    y: Sequence[float]


def grouped_bars(
    groups: Sequence[str],
    series: Sequence[tuple[str, int, Sequence[dict[str, Any]]]],
    title: str,
    labels: tuple[str, str] = ("", ""),
) -> str:
    """A group of bars for each bucket, a bar with its 95% interval for each model; an empty bucket has no bar.

    A series is a name, a colour and an interval for each group; `labels` are those of the two axes.
    """
    highest = max((interval["high"] or 0.0 for _, _, found in series for interval in found), default=0.0)
    top = _round_up(highest or 1.0)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)

    parts = [_axis_labels(*labels)]
    for step in range(5):
        parts.append(_grid_line(top * step / 4, y(top * step / 4)))
    group_width = (_WIDTH - _LEFT) / max(1, len(groups))
    width = 0.8 * group_width / max(1, len(series))
    for group, label in enumerate(groups):
        start = _LEFT + group_width * (group + 0.1)
        parts.append(_tick_label(_LEFT + group_width * (group + 0.5), _HEIGHT - 34, label))
        for place, (name, colour, found) in enumerate(series):
            interval = found[group]
            if interval["mean"] is None:
                continue
            x, middle = start + width * place, start + width * (place + 0.46)
            interval = {key: interval["mean"] if value is None else value for key, value in interval.items()}
            text = f"{name}, {label}: {interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
            parts.append(
                f'<g><title>{escape(text)}</title><rect class="s{colour % NUM_COLOURS}" x="{x:.1f}" '
                f'y="{y(interval["mean"]):.1f}" width="{width * 0.92:.1f}" '
                f'height="{max(0.0, y(0) - y(interval["mean"])):.1f}"/>'
                f'<path class="bar-end" d="M{middle - 4:.1f} {y(interval["low"]):.1f}h8m-4 0V'
                f'{y(interval["high"]):.1f}m-4 0h8"/></g>'
            )
    return _svg(_WIDTH, _HEIGHT, title, parts)


def length_boxes(rows: Sequence[tuple[str, Sequence[float], int | None]], title: str, label: str = "") -> str:
    """A line a model: 5% to 95% of its lengths, a box from 25% to 75%, a stroke at the median; None is uncoloured."""
    left = 160
    quantiles = [np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)) for _, values, _ in rows]
    top = _round_up(max((float(found[-1]) for found in quantiles), default=1.0) or 1.0)
    height = _ROW * len(rows) + 48

    def x(value: float) -> float:
        return left + (_WIDTH - left - 20) * value / top

    parts = [
        f'<text class="axis" x="{(left + _WIDTH - 20) / 2}" y="{height - 6}" text-anchor="middle">'
        f"{escape(label)}</text>"
    ]
    for step in range(5):
        at = x(top * step / 4)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height - 42}"/>')
        parts.append(_tick_label(at, height - 26, f"{top * step / 4:g}"))
    for place, ((name, _, colour), found) in enumerate(zip(rows, quantiles, strict=True)):
        middle = _ROW * place + _ROW / 2
        low, first, median, third, high = (float(value) for value in found)
        text = (
            f"{name}: median {median:g}, half between {first:g} and {third:g}, 90% between {low:g} and {high:g} words"
        )
        kind = "s6" if colour is None else f"s{colour % NUM_COLOURS}"
        parts.append(
            f'<g><title>{escape(text)}</title><text x="{left - 10}" y="{middle + 4:.1f}" text-anchor="end">'
            f'{escape(_short(name))}</text><path class="bar-end" d="M{x(low):.1f} {middle}H{x(high):.1f}"/>'
            f'<rect class="{kind}" x="{x(first):.1f}" y="{middle - 9}" width="{max(1.0, x(third) - x(first)):.1f}" '
            f'height="18"/><path class="bar-end" d="M{x(median):.1f} {middle - 9}v18"/></g>'
        )
    return _svg(_WIDTH, height, title, parts)


def line_chart(lines: Sequence[Line], title: str, labels: tuple[str, str]) -> str:
    """Curves over a shared axis from 0; dotted ones show their points. `labels` are those of the axes."""
    low, high = _span([value for line in lines for value in line.y])
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    right = max((value for line in lines for value in line.x), default=1.0) or 1.0

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 14) * value / right

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))

    parts = [_axis_labels(*labels), *(_grid_line(tick, y(tick)) for tick in ticks)]
    parts += [_tick_label(x(tick), _HEIGHT - 34, f"{tick:g}") for tick in _ticks(0, right) if tick <= right]
    for line in lines:
        points = [(x(a), y(b)) for a, b in zip(line.x, line.y, strict=True)]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        kind = f"curve c{line.colour % NUM_COLOURS}" + (" dotted" if line.dotted else "")
        dots = [f'<circle class="s{line.colour % NUM_COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
        parts.append(
            f'<g><title>{escape(f"{line.name}: last {line.y[-1]:.4g}")}</title><path class="{kind}" d="{path}"/>'
            f"{''.join(dots) if line.dotted or len(points) == 1 else ''}</g>"
        )
    return _svg(_WIDTH, _HEIGHT, title, parts)


def _grid_line(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    )


def _tick_label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'


def _axis_labels(below: str, beside: str) -> str:
    middle = _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    centred = 'class="axis" text-anchor="middle"'
    return (
        f'<text {centred} x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 10}">{escape(below)}</text>'
        f'<text {centred} transform="translate(13 {middle}) rotate(-90)">{escape(beside)}</text>'
    )


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}\u2026"


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 or 10 times a power of ten: a top whose quarters are round."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value)


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
