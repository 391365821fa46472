"""The plots of the benchmarks' page: bars and lines as inline SVG, by the name of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ultrarag.report.page import line_chart, text

WIDTH, ROW, LABEL, VALUE = 720, 26, 250, 110


def charts(name: str, report: Any) -> str:
    """The plots of a result, as HTML; empty where there are none for it."""
    found = PLOTS.get(name, lambda _: iter(()))(report)
    return "\n".join(f"<h3>{text(title)}</h3>\n{drawn}" for title, drawn in found if drawn)


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars from zero, in one unit.

    Args:
        rows: label, value, and the value as it is to be read.
    """
    if not rows:
        return ""
    most, room = max(value for _, value, _ in rows) or 1.0, WIDTH - LABEL - VALUE
    drawn = "".join(
        _bar(number, label, room * value / most, shown) for number, (label, value, shown) in enumerate(rows)
    )
    described = "; ".join(f"{label}: {shown}" for label, _, shown in rows)
    height = ROW * len(rows) + 8
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(described)}">{drawn}</svg>'


def _bar(number: int, label: str, length: float, shown: str) -> str:
    top = ROW * number + 4
    return (
        f'<text x="{LABEL - 8}" y="{top + 16}" text-anchor="end">{text(label)}</text>'
        f'<rect x="{LABEL}" y="{top + 3}" width="{max(1.0, length):.1f}" height="{ROW - 8}" rx="2" '
        f'style="fill: var(--blue)"/><text x="{LABEL + max(1.0, length) + 8:.1f}" y="{top + 16}">{text(shown)}</text>'
    )


Plots = Iterator[tuple[str, str]]


def _encode(report: Any) -> Plots:
    rows = report["results"]
    shown = [(row["name"], row["texts_per_second"], f"{row['texts_per_second']:.0f}") for row in rows]
    yield "Texts per second", bars(shown)
    yield "Peak memory, GiB", bars([(row["name"], row["peak"], f"{row['peak']:.2f}") for row in rows])


def _train_step(report: Any) -> Plots:
    rows = report["median seconds"].items()
    yield "Processor seconds of a step", bars([(name, r["processor"], f"{r['processor']:.2f}") for name, r in rows])


def _unified_step(report: Any) -> Plots:
    for row in report["rows"]:
        size = f"{row['vocabulary']}, batch {row.get('queries', 16)}"
        found = [(name, one) for name, one in row["contenders"].items() if "ended" not in one]
        seconds = [(name, row["median"][name]["wall"]) for name, _ in found]
        yield f"Seconds of a step, vocabulary {size}", bars([(name, s, f"{s:.2f}") for name, s in seconds])
        peaks = [(name, one["peak_mib"], f"{one['peak_mib']:.0f}") for name, one in found]
        yield f"Peak memory, MiB, vocabulary {size}", bars(peaks)


def _gradcache(report: Any) -> Plots:
    rows = [report["plain"], *report["batches"]]
    named = [(f"batch {r['batch']}, " + (f"chunk {r['chunk']}" if r["chunk"] else "one piece"), r) for r in rows]
    yield "Peak memory, MiB", bars([(name, row["peak_mib"], f"{row['peak_mib']:.0f}") for name, row in named])


def _scaling(report: Any) -> Plots:
    for curve in report["curves"]:
        for key, name in (("rate", f"{curve['unit']}/s"), ("peak_mib", "peak MiB")):
            points = [(float(point["x"]), float(point[key])) for point in curve["points"]]
            yield f"{curve['title']}: {name}", line_chart(points, curve["x"], name)


def _gpu(report: Any) -> Plots:
    for task in report["tasks"]:
        ran = {name: row for name, row in task["contenders"].items() if "failed" not in row}
        rates = [(name, row["tokens_per_second"], f"{row['tokens_per_second']:.0f}") for name, row in ran.items()]
        yield f"{task['name']}: tokens per second", bars(rates)
        yield (
            f"{task['name']}: peak memory, GiB",
            bars([(name, row["peak_gib"], f"{row['peak_gib']:.2f}") for name, row in ran.items()]),
        )


def _hybrid_quality(report: Any) -> Plots:
    for row in report["data"]:
        points = [(float(weight), value) for weight, value in row["tuned"]["train"].items()]
        yield f"{row['name']}: nDCG@10 on train queries", line_chart(points, "weight of BM25", "nDCG@10")


def _live_index(report: Any) -> Plots:
    for size in sorted({row["passages"] for row in report["search"]}):
        found = [
            (f"{row['contender']}: {kind}", times["p50"], f"{times['p50']:.2f} ms")
            for row in report["search"]
            if row["passages"] == size
            for kind, times in row["search"].items()
        ]
        yield f"Median search time, {size} passages", bars(found)


def _finetune(report: Any) -> Plots:
    rows = report["median"].items()
    yield "Seconds of training", bars([(name, row["training"], f"{row['training']:.1f}") for name, row in rows])
    yield "Peak memory, MiB", bars([(name, row["peak_mib"], f"{row['peak_mib']:.0f}") for name, row in rows])


def _retrieve_backends(report: Any) -> Plots:
    for key, title in (("dense_p50_ms", "Median dense search, ms"), ("upsert_per_s", "Passages written per second")):
        found = [(name, row[key]) for name, row in report["backends"].items()]
        yield title, bars([(name, value, f"{value:.4g}") for name, value in found])


PLOTS: dict[str, Callable[[Any], Plots]] = {
    "encode": _encode,
    "train_step": _train_step,
    "unified_step": _unified_step,
    "gradcache": _gradcache,
    "scaling": _scaling,
    "gpu": _gpu,
    "hybrid_quality": _hybrid_quality,
    "live_index": _live_index,
    "finetune_20_steps": _finetune,
    "retrieve_backends": _retrieve_backends,
}
