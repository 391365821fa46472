"""The frame of an HTML page that stands alone: style inline, no script, no external file, every text escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ultrarag.evaluation import Significance

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --line: #d9dee6; --paper: #fff; --panel: #f5f7fa;
  --blue: #2459c4; --good: #14713c; --good-paper: #e4f5ea; --bad: #a8271c; --bad-paper: #fdeae7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a0a9b8; --line: #39414f; --paper: #14181f;
  --panel: #1d232d; --blue: #83a9ff; --good: #7fd6a0; --good-paper: #14301f; --bad: #ff9d92; --bad-paper: #3a1b18; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.banner { margin: 1rem 0; padding: .75rem 1rem; border-left: .35rem solid; border-radius: .25rem; }
.banner.good { border-color: var(--good); background: var(--good-paper); }
.banner.bad { border-color: var(--bad); background: var(--bad-paper); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr > th[scope=row] { color: var(--ink); font-size: 1rem; }
.wide { width: 100%; }
.up { color: var(--good); } .down { color: var(--bad); }
code { font: .85em ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.chart { width: 100%; height: auto; background: var(--panel); border-radius: .4rem; }
.chart text { font-size: 12px; fill: var(--soft); } .chart line { stroke: var(--line); }
.chart polyline { fill: none; stroke: var(--blue); stroke-width: 2; stroke-linejoin: round; }
.chart circle { fill: var(--blue); }
.chart:has(.average) polyline:not(.average) { stroke-width: 1; opacity: .45; }
.chart:has(.average) circle { opacity: .55; } .chart .average { stroke-width: 3; }
.interval line { stroke: var(--soft); } .interval rect { fill: var(--blue); opacity: .4; }
.interval circle { fill: var(--blue); }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: .4rem; }
summary { cursor: pointer; padding: .6rem .9rem; display: flex; gap: .8rem; align-items: baseline; }
summary::before { content: "\\25B8"; color: var(--soft); } details[open] > summary::before { content: "\\25BE"; }
summary::-webkit-details-marker { display: none; }
summary .query { flex: 1; overflow-wrap: anywhere; font-weight: 600; }
summary .number { white-space: nowrap; font-variant-numeric: tabular-nums; }
details > .inside { padding: 0 .9rem .9rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.sides h3 { margin: .2rem 0 .4rem; font-size: .9rem; color: var(--soft); }
ol.hits { list-style: none; margin: 0; padding: 0; }
ol.hits li { padding: .5rem .7rem; margin: 0 0 .4rem; background: var(--panel); border-radius: .35rem;
  border-left: .25rem solid transparent; overflow-wrap: anywhere; }
ol.hits li.right { border-left-color: var(--good); background: var(--good-paper); }
ol.hits .rank { color: var(--soft); font-variant-numeric: tabular-nums; }
ol.hits .score { float: right; color: var(--soft); font-variant-numeric: tabular-nums; margin-left: .6rem; }
ol.hits .mark { color: var(--good); font-weight: 600; }
ol.hits p { margin: .15rem 0 0; font-size: .88rem; color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { details > .inside { display: block; } body { max-width: none; } }
"""


def document(title: str, body: str) -> str:
    """Return the whole page; `body` is HTML."""
    # the policy forbids what the page does not need, should a text ever slip through unescaped
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Escape a text; what no HTML page may hold (lone surrogates, control characters) is shown as a replacement."""
    shown = "".join("\ufffd" if _unfit(character) else character for character in str(value))
    return escape(shown)


def _unfit(character: str) -> bool:
    number = ord(character)
    return 0xD800 <= number <= 0xDFFF or (number < 32 and character not in "\t\n\r") or number == 127


def section(title: str, content: str) -> str:
    """A heading and what stands below it; nothing where there is nothing to show."""
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table whose first column names the rows; cells are HTML, `numbers` the columns set to the right."""
    kinds = ["number" if column in numbers else "" for column in range(len(header))]
    head = "".join(
        f'<th scope="col" class="{kind}">{text(name)}</th>' for name, kind in zip(header, kinds, strict=True)
    )
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>\n" if any(header) else ""
    return f'<div class="scroll"><table>\n{top}<tbody>\n{body}\n</tbody>\n</table></div>'


def signed(value: float, digits: int = 4) -> str:
    """A change, coloured and with its sign."""
    kind = "up" if value > 0 else "down" if value < 0 else ""
    return f'<span class="{kind}">{value:+.{digits}f}</span>'


def interval(change: Significance, reach: float) -> str:
    """A change as a number and, on a line from -reach to reach, its interval as a bar with a dot; SVG."""

    def place(value: float) -> float:
        return 60 + 56 * (value / reach if reach else 0.0)

    low, middle, high = (place(value) for value in (change.low, change.difference, change.high))
    drawn = (
        f'<svg class="interval" viewBox="0 0 120 16" width="120" height="16" role="img" '
        f'aria-label="95 % interval {change.low:+.4f} to {change.high:+.4f}">'
        f'<line x1="60" y1="0" x2="60" y2="16"/><rect x="{low:.1f}" y="5" width="{max(high - low, 1):.1f}" height="6"/>'
        f'<circle cx="{middle:.1f}" cy="8" r="4"/></svg>'
    )
    return f"{signed(change.difference)}<br>{drawn}"


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
