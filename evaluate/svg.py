"""The charts of `report.html` as inline SVG; colours are classes that the page's style sets for light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

NUM_COLOURS = 7
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 280, 46, 44, 14
_ROW = 34


def grouped_bars(groups: Sequence[str], series: Sequence[tuple[str, Sequence[dict[str, Any]]]], title: str) -> str:
    """A group of bars for each bucket, a bar with its 95% interval for each model; an empty bucket has no bar."""
    highest = max((interval["high"] or 0.0 for _, found in series for interval in found), default=0.0)
    top = _round_up(highest or 1.0)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)

    parts = []
    for step in range(5):
        value = top * step / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    group_width = (_WIDTH - _LEFT) / max(1, len(groups))
    width = 0.8 * group_width / max(1, len(series))
    for group, label in enumerate(groups):
        start = _LEFT + group_width * (group + 0.1)
        parts.append(
            f'<text x="{_LEFT + group_width * (group + 0.5):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">'
            f"{escape(label)}</text>"
        )
        for place, (name, found) in enumerate(series):
            interval = found[group]
            if interval["mean"] is None:
                continue
            x, middle = start + width * place, start + width * (place + 0.46)
            text = f"{name}, {label}: {interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
            parts.append(
                f'<g><title>{escape(text)}</title><rect class="s{place % NUM_COLOURS}" x="{x:.1f}" '
                f'y="{y(interval["mean"]):.1f}" width="{width * 0.92:.1f}" '
                f'height="{max(0.0, y(0) - y(interval["mean"])):.1f}"/>'
                f'<path class="bar-end" d="M{middle - 4:.1f} {y(interval["low"]):.1f}h8m-4 0V'
                f'{y(interval["high"]):.1f}m-4 0h8"/></g>'
            )
    return _svg(_WIDTH, _HEIGHT, title, parts)


def length_boxes(rows: Sequence[tuple[str, Sequence[float], int | None]], title: str) -> str:
    """A line a model: 5% to 95% of its lengths, a box from 25% to 75%, a stroke at the median; None is uncoloured."""
    left = 190
    quantiles = [np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)) for _, values, _ in rows]
    top = _round_up(max((float(found[-1]) for found in quantiles), default=1.0) or 1.0)
    height = _ROW * len(rows) + 30

    def x(value: float) -> float:
        return left + (_WIDTH - left - 20) * value / top

    parts = []
    for step in range(5):
        at = x(top * step / 4)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height - 24}"/>'
            f'<text x="{at:.1f}" y="{height - 8}" text-anchor="middle">{top * step / 4:g}</text>'
        )
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


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}\u2026"


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 or 10 times a power of ten: a top whose quarters are round."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value)
