"""How the commands of `ultrarag index` show their results on a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from ultrarag.evaluation import Significance
from ultrarag.io import table, visible, width
from ultrarag.retrieve.bridge import described
from ultrarag.types import Hit


def renamed(name: str, rows: int, example: str) -> str:
    """That rows of a file were given ids of their own."""
    them = "row repeats an id and is" if rows == 1 else "rows repeat an id and are"
    return f"{visible(name)}: {rows} {them} added under one of their own, such as '{visible(example)}'"


def hits(found: Sequence[Hit], query: str = "") -> str:
    """Rank, score and the beginning of each passage, as wide as the terminal."""
    title = [visible(query)] if query else []
    if not found:
        return "\n".join([*title, "no hits"])
    heads = [name for name in found[0].scores if len(found[0].scores) > 1]
    rows = [
        (rank, f"{hit.score:.4f}", *(_score(hit, name) for name in heads), hit.id) for rank, hit in enumerate(found, 1)
    ]
    header = ("", "score", *heads, "id")
    used = width(table(header, rows).splitlines()[1]) + 2
    room = max(20, shutil.get_terminal_size((100, 24)).columns - used)
    texts = [_cut(visible(" ".join(hit.passage.content.split())), room) for hit in found]
    shown = [(*row, text) for row, text in zip(rows, texts, strict=True)]
    return "\n".join([*title, table((*header, "passage"), shown)])


def _score(hit: Hit, head: str) -> str:
    return f"{hit.scores[head]:.4f}" if head in hit.scores else "-"


def _cut(text: str, room: int) -> str:
    """The beginning of a text that fits into `room` columns."""
    if width(text) <= room:
        return text
    end = len(text[:room])
    while end and width(text[:end]) > room - 3:
        end -= 1
    return f"{text[:end].rstrip()}..."


#: Passages that cannot be encoded of which the reasons are shown.
SHOWN_UNENCODED = 20


def status(found: Mapping[str, Any]) -> str:
    """An index and its generations."""
    owner = found["owner"]
    held = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "nobody"
    rows = [_generation(entry) for entry in found["generations"]]
    header = ("generation", "state", "encoder", "engine", "heads", "precision", "behind", "size", "created", "note")
    shown = len(header) if any(row[-1] for row in rows) else len(header) - 1
    holds = f"{found['passages']} passages, {found['writes']} writes, {size(found['bytes'])}"
    return "\n".join(
        [
            f"{found['path']}: {holds}, BM25 {'on' if found['bm25'] else 'off'}",
            f"owned by {held}",
            *([f"mirrors {shared['uri']}"] if (shared := found.get("shared")) else []),
            "",
            table(header[:shown], [row[:shown] for row in rows]),
            *unencoded(found["live"]["unencoded"] if found["live"] else {}),
        ]
    )


def retried(found: Mapping[str, Any]) -> str:
    """What `retry` encoded, and what it could not."""
    return "\n".join([f"{found['encoded']} passages encoded", *unencoded(found["unencoded"])])


def unencoded(found: Mapping[str, str]) -> list[str]:
    """Passages without vectors, each with the reason; the first of many."""
    lines = [f"  {id}: {reason}" for id, reason in list(found.items())[:SHOWN_UNENCODED]]
    more = [f"  and {len(found) - len(lines)} more (--json lists all)"] if len(found) > len(lines) else []
    advice = "their words alone can be searched; `ultrarag index retry` encodes them again, delete removes them"
    return [f"{len(found)} passages cannot be encoded: {advice}", *lines, *more] if found else []


def _generation(entry: Mapping[str, Any]) -> tuple[object, ...]:
    notes = [_progress(entry["progress"])] if "progress" in entry else []
    notes += [f"shares vectors of generation {entry['vectors_of']}"] if entry["vectors_of"] != entry["id"] else []
    notes += [f"vectors mapped from generation {entry['mapped_from']}"] if entry["mapped_from"] is not None else []
    note = ", ".join([*notes, *(["forced"] if entry["forced"] else [])])
    names = (entry["fingerprint"][:12], entry["backend"], ",".join(entry["heads"]), entry["precision"])
    return entry["id"], entry["state"], *names, entry["behind"], size(entry["bytes"]), entry["created"], note


def _progress(found: Mapping[str, Any]) -> str:
    if not found["total"]:
        return "starting"
    left = f", {duration(found['seconds_left'])} left" if found["seconds_left"] is not None else ""
    return f"{found['encoded']} of {found['total']} passages{left}"


def written(found: Mapping[str, Any]) -> str:
    """What `add` did."""
    parts = [f"{found['added']} added", f"{found['changed']} changed", f"{found['unchanged']} unchanged"]
    if found["metadata"]:
        parts.insert(2, f"{found['metadata']} with other metadata")
    if found["blank"]:
        parts.append(f"{found['blank']} blank passages left out")
    return f"{', '.join(parts)}; the index holds {found['passages']} passages"


def deleted(found: Mapping[str, Any]) -> str:
    """What `delete` did."""
    unknown = f" ({found['unknown']} ids were not there)" if found["unknown"] else ""
    return f"{found['deleted']} deleted{unknown}; the index holds {found['passages']} passages"


def built(found: Mapping[str, Any]) -> str:
    """What `build` made."""
    bridge = f"{described(found['bridge'])}\n" if found.get("bridge") else ""
    return f"{found['built']}\n{bridge}" + (
        f"generation {found['id']} is {found['state']} (encoder {found['fingerprint'][:12]}, "
        f"heads {', '.join(found['heads'])}); ultrarag index swap makes it live"
    )


def flip(found: Mapping[str, Any]) -> str:
    """What `swap` or `rollback` did."""
    lines = [
        f"generation {found['new']['id']} is live in place of {found['old']['id']}; writers waited "
        f"{1000 * found['seconds']:.1f} ms, searches did not"
    ]
    if verdict := found["verdict"]:
        change = Significance(**verdict["change"])
        lines.append(f"gate: {verdict['metric']} {verdict['old']:.4f} -> {verdict['new']:.4f}: {change}")
        lines += _notes(verdict)
    if found["new"]["forced"]:
        judged = verdict is None or verdict["old"] or verdict["new"]
        lines.append(f"forced: {'it is significantly worse than the one before' if judged else 'nothing was judged'}")
    return "\n".join(lines)


def evaluation(found: Mapping[str, Any]) -> str:
    """Metrics, beside those of another run if there is one, then those of each query."""
    compared = found.get("compared")
    if compared:
        rows = [_compared(name, value, compared) for name, value in found["metrics"].items()]
        lines = [table(("metric", compared["run"], "index", "difference", "95 % interval", "p"), rows)]
    else:
        lines = [table(("metric", "mean"), [(name, f"{value:.4f}") for name, value in found["metrics"].items()])]
    lines.append(f"{found['queries']} queries")
    lines += _notes(found)
    if per_query := found.get("per_query"):
        names = list(found["metrics"])
        values = [(id, *(f"{row[name]:.4f}" for name in names)) for id, row in per_query.items()]
        lines += ["", table(("query", *names), values)]
    return "\n".join(lines)


def _notes(found: Mapping[str, Any]) -> list[str]:
    return [f"note: {note}" for note in found.get("notes", ())]


def _compared(name: str, value: float, other: Mapping[str, Any]) -> tuple[str, ...]:
    change = Significance(**other["change"][name])
    interval = f"{change.low:+.4f} to {change.high:+.4f}"
    before = f"{other['metrics'][name]:.4f}"
    return name, before, f"{value:.4f}", f"{change.difference:+.4f}", interval, f"{change.p_value:.4f}"


def vacuumed(found: Mapping[str, Any]) -> str:
    """What `vacuum` gave back."""
    return f"{size(found['before'])} before, {size(found['after'])} now"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as h, min or s."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
