"""Progress on stderr: bars that appear after two seconds, and silence where stderr is no terminal."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def progress_bar(total: int | None, label: str, unit: str, wanted: bool | None = None) -> Any:
    """Return a tqdm bar.

    Args:
        wanted: True always, False never, None on a terminal and after two seconds.
    """
    from tqdm import tqdm

    delay = 0 if wanted else 2
    disable = None if wanted is None else not wanted
    return tqdm(total=total, desc=label, unit=unit, delay=delay, leave=False, disable=disable, dynamic_ncols=True)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep transformers' own bars off a stderr that is no terminal; the process's setting is restored."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


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
