"""Line charts as inline SVG: no script, no external file, readable by a screen reader through its description."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 40
#: Lines of the grid, at about so many values.
TICKS = 5
#: From so many points on, a bold line shows their moving average.
NOISY = 10


def line_chart(points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> str:
    """Return an SVG element; an empty string for fewer than two finite points.

    Args:
        points: (x, y), in the order of x.
    """
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) < 2:
        return ""
    xs, ys = zip(*finite, strict=True)
    x_axis, y_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _Axis(*_span(ys), HEIGHT - BOTTOM, TOP)
    path = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in finite)
    smooth = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in zip(xs, _average(ys), strict=True))
    dots = "".join(_dot(x_axis.place(x), y_axis.place(y), x, y, x_name, y_name) for x, y in finite)
    described = f"{y_name} by {x_name}: from {_short(ys[0])} to {_short(ys[-1])} over {len(finite)} points"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(described)}">'
        f"{_grid(x_axis, y_axis)}"
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>'
        f'<polyline points="{path}"/>{dots}'
        f'{f"""<polyline class="average" points="{smooth}"/>""" if len(finite) >= NOISY else ""}</svg>'
    )


class _Axis:
    """Maps values to places."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        step = _round_step((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: that of the values, a little wider."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _round_step(raw: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(raw or 1.0))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def _average(values: Sequence[float]) -> list[float]:
    """The mean of the values around each, a tenth of them to either side."""
    reach = max(2, len(values) // 10)
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    lines = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value in x_axis.ticks():
        x = x_axis.place(value)
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(value)}</text>')
    return "".join(lines)


def _dot(x: float, y: float, x_value: float, y_value: float, x_name: str, y_name: str) -> str:
    label = f"{x_name} {_short(x_value)}: {y_name} {y_value:.4g}"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{escape(label)}</title></circle>'


def _short(value: float) -> str:
    return f"{value:.6g}" if abs(value) >= 1e-9 else "0"
