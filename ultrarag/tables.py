"""Plain tables for a terminal: columns as wide as they need to be, numbers to the right."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned lines: header, rule, rows; no line ends in blanks."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(width(row[i]) for row in cells) for i in range(len(header))]
    right = [i for i in range(len(header)) if rows and all(_number(row[i]) for row in rows)]
    lines = ["  ".join(_fit(cell, widths[i], i in right) for i, cell in enumerate(row)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * size for size in widths), *lines[1:]])


def width(text: str) -> int:
    """Columns that `text` takes on a terminal: two for a wide (Chinese, Japanese, Korean) character."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fit(text: str, size: int, right: bool) -> str:
    blanks = " " * (size - width(text))
    return blanks + text if right else text + blanks
