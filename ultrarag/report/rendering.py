"""The report of a fine-tuning run as one HTML file: what it gained and lost, shown and not only counted.

It needs no index: it reads plain data, and leaves out what it is not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrarag.evaluation import MAIN_METRIC, SHOWN, Measured, Significance, differences
from ultrarag.report.page import document, interval, line_chart, section, signed, table, text
from ultrarag.types import Passage

#: Hits of each side, characters of a passage, and queries in each list.
HITS, CHARACTERS, LISTED = 5, 280, 100


@dataclass(frozen=True)
class Rung:
    """One way to train, as it was tried."""

    name: str
    #: on the held-out queries; None where the gate measured it
    gain: Significance | None
    #: on what was not to be forgotten; None where nothing was given
    guard: Significance | None
    seconds: float
    #: passages encoded
    encoded: int
    taken: bool
    decision: str


@dataclass(frozen=True)
class Page:
    """What the report shows."""

    title: str
    #: one sentence: what came of it
    outcome: str
    good: bool
    #: "before" and "after": metric -> value, as the fine-tuning measured them
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    #: the trainer's log: entries with "step" and "loss" or evaluation metrics
    history: Sequence[Mapping[str, Any]] = ()
    #: both systems' answers to the same queries
    measured: Measured | None = None
    #: "before", "after" and more: metric -> value, on what was not to be forgotten
    guard: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    #: how the trained weights were averaged with an older model's: with, weight, tried
    merge: Mapping[str, Any] | None = None
    #: name and value of everything else worth knowing
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    #: the rungs of the ladder that were tried, in their order
    ladder: Sequence[Rung] = ()


def render(page: Page) -> str:
    """Return the HTML."""
    parts = [
        f"<h1>{text(page.title)}</h1>",
        f'<p class="banner {"good" if page.good else "bad"}">{text(page.outcome)}</p>',
        section("The ladder", _ladder(page.ladder)),
        _metrics(page),
        _guard(page.guard),
        _merge(page.merge) if page.merge else "",
        section("Loss while training", loss_curve(page.history)),
        section("Evaluation while training", evaluation_curve(page.history)),
        _changes(page.measured) if page.measured else "",
        section(
            "Lineage and run", table(("", ""), [(text(name), f"<code>{text(v)}</code>") for name, v in page.facts])
        ),
        section("Notes", "".join(f"<p>{text(note)}</p>" for note in page.notes)),
    ]
    return document(page.title, "\n".join(part for part in parts if part))


def loss_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """The training loss by step, as SVG."""
    points = [(float(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry and "step" in entry]
    return line_chart(points, "step", "loss")


def evaluation_curve(history: Sequence[Mapping[str, Any]], metric: str = f"eval_{MAIN_METRIC}") -> str:
    """A metric of the evaluations between, by step, as SVG; empty where there were fewer than two."""
    found = {
        entry["step"]: value for entry in history for name, value in entry.items() if name.lower() == metric.lower()
    }
    return line_chart([(float(step), float(value)) for step, value in found.items()], "step", MAIN_METRIC)


def _ladder(rungs: Sequence[Rung]) -> str:
    """One row for each rung, with its gain and interval as a picture."""
    if not rungs:
        return ""
    measured = [change for rung in rungs for change in (rung.gain, rung.guard) if change is not None]
    reach = max((abs(end) for change in measured for end in (change.low, change.high)), default=0.0)
    rows = [
        (
            text(rung.name) + (" ✓" if rung.taken else ""),
            interval(rung.gain, reach) if rung.gain else "the gate's",
            interval(rung.guard, reach) if rung.guard else "-",
            f"{rung.seconds:.0f}",
            str(rung.encoded),
            text(rung.decision),
        )
        for rung in rungs
    ]
    header = ("rung", "gain on held-out queries", "guard", "seconds", "passages encoded", "decision")
    return table(header, rows, (3, 4))


def _metrics(page: Page) -> str:
    if page.measured is not None:
        return section(f"Before and after: {page.measured.where}", _measured_metrics(page.measured))
    if not page.metrics.get("before"):
        return ""
    return section("Before and after", _two_columns(page.metrics))


def _two_columns(metrics: Mapping[str, Mapping[str, float]]) -> str:
    before, after = metrics["before"], metrics["after"]
    rows = [(text(m), f"{old:.4f}", f"{after[m]:.4f}", signed(after[m] - old)) for m, old in before.items()]
    return table(("metric", "before", "after", "change"), rows, (1, 2, 3))


def _guard(metrics: Mapping[str, Mapping[str, float]]) -> str:
    if not metrics.get("before"):
        return ""
    return section("Before and after: the guard, which was not to be forgotten", _two_columns(metrics))


def _merge(merge: Mapping[str, Any]) -> str:
    said = f"<p>{merge['weight']:g} of the trained weights, the rest of {text(merge['with'])}.</p>"
    rows = [
        (
            f"{trial['weight']:g}" + (" ✓" if trial["weight"] == merge["weight"] else ""),
            "-" if trial["domain"] is None else f"{trial['domain']:.4f}",
            "-" if trial["guard"] is None else f"{trial['guard']:.4f}",
        )
        for trial in merge["tried"]
    ]
    tried = (
        table(("weight of the trained model", MAIN_METRIC, f"{MAIN_METRIC} on the guard"), rows, (1, 2)) if rows else ""
    )
    return section("Merging", said + tried)


def _measured_metrics(measured: Measured) -> str:
    rows, before, after = [], measured.before, measured.after
    for name, change in differences(before, after).items():
        interval = f"{change.low:+.4f} to {change.high:+.4f}"
        old, new = (f"{side.metrics[name]:.4f}" for side in (before, after))
        values = (old, new, signed(change.difference), interval)
        rows.append((text(name), *values, f"{change.p_value:.4f}", _judgement(change)))
    header = ("metric", "before", "after", "change", "95 % interval of the change", "p", "")
    return table(header, rows, (1, 2, 3, 4, 5))


def _judgement(change: Significance) -> str:
    if not change.significant:
        return '<span class="soft">may be chance</span>'
    return '<span class="up">better</span>' if change.difference > 0 else '<span class="down">worse</span>'


def _changes(measured: Measured) -> str:
    gained, lost = measured.gained(), measured.lost()
    same = len(measured.qrels) - len(gained) - len(lost)
    counts = (
        f"<p>By {text(measured.metric)}: {len(gained)} queries gained, {len(lost)} lost, {same} did not change.</p>"
    )
    parts = [section("Queries", counts)]
    for name, changes in (("Gained most", gained), ("Lost most", lost)):
        shown = "\n".join(
            _example(measured, query_id, change, number == 0)
            for number, (query_id, change) in enumerate(changes[:SHOWN])
        )
        parts.append(section(name, shown))
    parts.append(_list(measured, "All that gained", gained) + _list(measured, "All that lost", lost))
    return "\n".join(part for part in parts if part)


def _example(measured: Measured, query_id: str, change: float, is_open: bool) -> str:
    sides = "\n".join(
        f"<div>\n<h3>{name}</h3>\n{_hits(measured, query_id, side.run.get(query_id, {}))}\n</div>"
        for name, side in (("Before", measured.before), ("After", measured.after))
    )
    return (
        f"<details{' open' if is_open else ''}>\n<summary>{_query(measured, query_id, change)}</summary>\n"
        f'<div class="inside">\n{_missed(measured, query_id)}<div class="sides">\n{sides}\n</div>\n</div>\n</details>'
    )


def _query(measured: Measured, query_id: str, change: float) -> str:
    old, new = (side.per_query[query_id][measured.metric] for side in (measured.before, measured.after))
    return (
        f'<span class="query">{text(_cut(measured.queries[query_id]))}</span>'
        f'<span class="number">{old:.3f} → {new:.3f} {signed(change, 3)}</span>'
    )


def _hits(measured: Measured, query_id: str, run: Mapping[str, float]) -> str:
    if not run:
        return '<p class="soft">no hits</p>'
    right = _right(measured, query_id)
    items = [
        _hit(rank, id, score, measured.passages.get(id), id in right)
        for rank, (id, score) in enumerate(list(run.items())[:HITS], 1)
    ]
    return '<ol class="hits">\n' + "\n".join(items) + "\n</ol>"


def _hit(rank: int, id: str, score: float, passage: Passage | None, right: bool) -> str:
    mark = '<span class="mark">✓ right</span> ' if right else ""
    title = f"<strong>{text(passage.title)}</strong> " if passage and passage.title else ""
    body = f"<p>{text(_cut(passage.text))}</p>" if passage else ""
    return (
        f'<li class="{"right" if right else ""}"><span class="score">{score:.3f}</span>'
        f'<span class="rank">{rank}.</span> {mark}{title}<code>{text(id)}</code>{body}</li>'
    )


def _missed(measured: Measured, query_id: str) -> str:
    """Where the right passages stand that are not among the hits shown."""
    shown = {id for side in (measured.before, measured.after) for id in list(side.run.get(query_id, {}))[:HITS]}
    missed = [id for id in _right(measured, query_id) if id not in shown]
    places = [
        f"<code>{text(id)}</code> ({_rank(measured.before.run, query_id, id)} before, "
        f"{_rank(measured.after.run, query_id, id)} after)"
        for id in missed[:HITS]
    ]
    return f'<p class="soft">Right, and not shown below: {", ".join(places)}</p>\n' if places else ""


def _rank(run: Mapping[str, Mapping[str, float]], query_id: str, id: str) -> str:
    found = list(run.get(query_id, {}))
    return f"rank {found.index(id) + 1}" if id in found else f"not among {len(found)} hits"


def _right(measured: Measured, query_id: str) -> list[str]:
    return [id for id, relevance in measured.qrels[query_id].items() if relevance > 0]


def _list(measured: Measured, name: str, changes: Sequence[tuple[str, float]]) -> str:
    if len(changes) <= SHOWN:
        return ""
    rows = []
    for query_id, change in changes[:LISTED]:
        old, new = (side.per_query[query_id][measured.metric] for side in (measured.before, measured.after))
        rows.append((text(_cut(measured.queries[query_id])), f"{old:.3f}", f"{new:.3f}", signed(change, 3)))
    more = f'<p class="soft">and {len(changes) - LISTED} more</p>' if len(changes) > LISTED else ""
    content = table(("query", "before", "after", "change"), rows, (1, 2, 3))
    return f'<details><summary>{name} ({len(changes)})</summary><div class="inside">{content}{more}</div></details>\n'


def _cut(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= CHARACTERS else line[: CHARACTERS - 1] + "…"
