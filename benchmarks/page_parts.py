"""Parts of the benchmarks' page: Markdown that our scripts write, and plain values, as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from ultrarag.report.page import table, text

#: What of a report is no result of its own: single runs, and what stands in the page's line of origin.
LEFT_OUT = ("runs", "machine", "date", "command", "note", "what")


def markdown(source: str) -> str:
    """Headings (one level down, the first left out), tables, lists and paragraphs, as our scripts write them."""
    blocks = [list(lines) for filled, lines in groupby(source.splitlines(), lambda line: bool(line.strip())) if filled]
    return "\n".join(_block(block) for block in blocks if not block[0].startswith("# "))


def _block(lines: list[str]) -> str:
    if lines[0].startswith("#"):
        return f"<h3>{inline(lines[0].lstrip('# '))}</h3>"
    if lines[0].startswith("|"):
        return _table(lines)
    if lines[0].startswith("- "):
        return "<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>"
    return f"<p>{inline(' '.join(lines))}</p>"


def _table(lines: list[str]) -> str:
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    numbers = [place for place in range(1, len(header)) if all(_number(row[place]) for row in rows)]
    return table(header, [[inline(cell) for cell in row] for row in rows], numbers)


def _number(cell: str) -> bool:
    """Whether a cell holds a number, with its unit perhaps, or nothing."""
    return not cell or re.fullmatch(r"[*+-]*[\d.,]+(e[+-]?\d+)?( ?[%x])?\**", cell) is not None or cell == "-"


def inline(source: str) -> str:
    """Code, bold and emphasis in an escaped text."""
    parts = text(source).split("`")
    for place in range(0, len(parts), 2):
        bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", parts[place])
        parts[place] = re.sub(r"\*(\S[^*]*?)\*", r"<em>\1</em>", bold)
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


def values(report: Mapping[str, Any]) -> str:
    """Tables of a report that has no page of its own."""
    return "\n".join(_values("", {key: value for key, value in report.items() if key not in LEFT_OUT}))


def _values(title: str, found: Mapping[str, Any]) -> Iterator[str]:
    """What is plain in one table, and below it what is nested; dictionaries alike become one table."""
    plain = {key: value for key, value in found.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in found.items() if isinstance(value, dict) and value}
    if plain:
        yield _titled(title, table(("", ""), [(text(key), shown(value)) for key, value in plain.items()], (1,)))
    if nested and _alike(list(nested.values())):
        columns = list(next(iter(nested.values())))
        rows = [[text(key), *(shown(row[column]) for column in columns)] for key, row in nested.items()]
        yield _titled("" if plain else title, table(["", *columns], rows, range(1, len(columns) + 1)))
        return
    for key, value in nested.items():
        yield from _values(f"{title}: {key}" if title else key, value)


def _alike(rows: list[dict[str, Any]]) -> bool:
    """Whether all have the same keys, and nothing nested."""
    plain = all(not isinstance(value, dict) for row in rows for value in row.values())
    return plain and all(row.keys() == rows[0].keys() for row in rows)


def _titled(title: str, drawn: str) -> str:
    return f"<h3>{text(title)}</h3>\n{drawn}" if title else drawn


def shown(value: Any) -> str:
    """A value as HTML: numbers short."""
    if isinstance(value, list):
        return ", ".join(shown(item) for item in value)
    return text(f"{value:.4g}" if isinstance(value, float) else value)
