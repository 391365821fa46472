"""What `scaling.py` found: the curves, where each bends and why (by least squares), and the page that shows them."""

from __future__ import annotations

from itertools import pairwise
from statistics import correlation, linear_regression, median
from typing import Any

#: A doubling that gains less than this brings no more; a fixed cost below it is nothing.
LITTLE = 0.05
#: The share of attention that is looked for.
SHARE = 0.25
#: Below this share of explained variance a fit says nothing.
EXPLAINED = 0.8


def curve(about: dict[str, Any], runs: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    """The medians of a curve's runs, point by point, and what they say.

    Args:
        about: title, kind ("length", "batch" or "size"), x (what changes), unit (what is counted), and for a batch
            per_x, the units that one more of x brings.
    """
    points = []
    for x in sorted({run["x"] for run in runs}):
        same = [run for run in runs if run["x"] == x]
        point = {key: median(run[key] for run in same) for key in ("wall", "processor", "peak_mib", "items")}
        points.append({"x": x, **point, "rate": point["items"] / point[clock]})
    model: dict[str, int] = {key: runs[0][key] for key in ("weights", "attention") if runs and key in runs[0]}
    remark = REMARKS[about["kind"]](points, about, clock, model) if len(points) > 2 else "too few points"
    return {**about, "points": points, "remark": remark}


def of_length(points: list[dict[str, Any]], about: dict[str, Any], clock: str, model: dict[str, int]) -> str:
    """Attention costs each token more the longer its text is; the rest costs the same."""
    best = max(points, key=lambda point: point["rate"])
    told = f"{peak(best, about)}."
    if best is not points[-1]:
        told += f" At {points[-1]['x']} it is {lost(best, points[-1])} lower."
    if best is not points[0]:
        below = f"At {points[0]['x']} it is {lost(best, points[0])} lower"
        told += f" {below}: short texts are many, and each has a cost of its own."
    after = points[points.index(best) :]
    found = fit([point["x"] for point in after], [point[clock] / point["items"] for point in after])
    if found and min(found) > 0:
        where, base = SHARE / (1 - SHARE) * found[0] / found[1], found[0] * 1e6
        told += (
            f" From there a token takes {base:.0f} µs and {1000 * found[1] * 1e6:.0f} µs more per 1,000 tokens of "
            f"length, which is attention: it passes {SHARE:.0%} of the time at {where:.0f} tokens"
        )
        if model:
            arithmetic = SHARE / (1 - SHARE) * model["weights"] / (2 * model["attention"])
            told += f" (of the arithmetic at {arithmetic:.0f})"
        told += "."
    return told + memory(points, about)


def of_batch(points: list[dict[str, Any]], about: dict[str, Any], clock: str, model: dict[str, int]) -> str:
    """Every forward has a cost of its own, which a larger one shares among more."""
    best = max(points, key=lambda point: point["rate"])
    enough = next((a for a, b in pairwise(points) if b["rate"] < (1 + LITTLE) * a["rate"]), None)
    told = f"{peak(best, about)}."
    if enough:
        told += f" The next larger one gains less than {LITTLE:.0%} from {enough['x']} on."
    else:
        told += f" Every step up to {points[-1]['x']} gains {LITTLE:.0%} or more."
    before = points[: points.index(best) + 1]
    per_item = [point[clock] / point["items"] for point in before]
    found = fit([1 / point["x"] for point in before], per_item)
    if found and min(found) > 0:
        told += (
            f" Up to the best, the times fit {found[1] * about.get('per_x', 1) * 1000:.1f} ms that each costs whatever "
            "its size: what larger ones share."
        )
    if points[-1]["rate"] < (1 - LITTLE) * best["rate"]:
        told += (
            f" At {points[-1]['x']} the rate is {lost(best, points[-1])} lower, likely as activations leave the caches."
        )
    return told + memory(points, about)


def of_size(points: list[dict[str, Any]], about: dict[str, Any], clock: str, model: dict[str, int]) -> str:
    """A run has a start that a larger corpus shares among more."""
    found = fit([point["x"] for point in points], [point[clock] for point in points])
    if not found or min(found) <= 0:
        return "The times do not lie on a line: see the points." + memory(points, about)
    start, each = found
    return (
        f"The whole run takes {start:.1f} s and {each * 1000:.2f} ms for each of the {about['unit']}: the start is "
        f"under {LITTLE:.0%} of the time from {start / each / LITTLE * (1 - LITTLE):.0f} on." + memory(points, about)
    )


def fit(xs: list[float], ys: list[float]) -> tuple[float, float] | None:
    """Intercept and slope of the line through the points; None where it explains too little, or there are too few."""
    if len(xs) < 3 or len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    slope, intercept = linear_regression(xs, ys)
    return (intercept, slope) if correlation(xs, ys) ** 2 >= EXPLAINED else None


def peak(point: dict[str, Any], about: dict[str, Any]) -> str:
    """The best point in words."""
    return f"The best rate, {point['rate']:.0f} {about['unit']}/s, is at {point['x']}"


def lost(best: dict[str, Any], other: dict[str, Any]) -> str:
    """How much lower the rate is, in percent."""
    return f"{1 - other['rate'] / best['rate']:.0%}"


def memory(points: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """What the peak does from one end to the other."""
    first, last = points[0], points[-1]
    return (
        f" Peak memory: {first['peak_mib']:.0f} MiB at {first['x']}, {last['peak_mib']:.0f} MiB at {last['x']} "
        f"({last['peak_mib'] / first['peak_mib']:.2f}x for {last['x'] / first['x']:.0f}x)."
    )


REMARKS = {"length": of_length, "batch": of_batch, "size": of_size}


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    lines = [
        "# Scaling",
        "",
        f"{report['machine']}; {report['date']}; load average {report['load_average']}. {settings['model']} on "
        f"{settings['device']}, fp32; every point is a process of its own, medians of {settings['rounds']} round(s); "
        f"rates and remarks by {settings['clock']} seconds. Peak memory is the process's, its libraries included (on "
        "a GPU: torch's there). The remarks are computed: lines through the points by least squares, left out where "
        f"they explain less than {EXPLAINED:.0%}. Written by `benchmarks/scaling.py`.",
    ]
    for found in report["curves"]:
        lines += ["", f"## {found['title']}", "", found["remark"], ""]
        lines += [f"| {found['x']} | {found['unit']}/s | wall s | processor s | peak MiB |", "|---|---|---|---|---|"]
        lines += [
            f"| {point['x']} | {point['rate']:.0f} | {point['wall']:.2f} | {point['processor']:.2f} "
            f"| {point['peak_mib']:.0f} |"
            for point in found["points"]
        ]
    return "\n".join(lines) + "\n"
