"""Rows and JSON objects of files, one at a time, with file:line in every error and progress by bytes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ultrarag.errors import DataError
from ultrarag.finetune.json_rows import BadJson, raw_rows
from ultrarag.finetune.row import BadRow, Row, parse_row
from ultrarag.finetune.sources import find_files
from ultrarag.progress import progress_bar

#: What was left out or changed -> how often.
Counts = Counter[str]
#: A file, files, or directories of files.
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@contextmanager
def reading(sources: Paths, label: str, skip: int = 0) -> Iterator[Iterator[tuple[str, Any]]]:
    """Give ("file:line", raw row) of all files, the first `skip` left out unread, with a progress bar.

    Example:
        >>> with reading(["train.jsonl"], "clean", skip=out.done) as items:
        ...     for place, raw in items:
        ...         row = checked_row(place, raw)

    Raises:
        DataError: a file does not exist or cannot be read.
    """
    paths = file_paths(sources)
    with progress_bar(sum(map(os.path.getsize, paths)), label, "B") as bar:
        bar.unit_scale = True
        yield _raw(paths, skip, bar.update)


def file_paths(sources: Paths) -> list[str]:
    """Return the files that are meant, those of a directory sorted by name."""
    named = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    return [file.path for file in find_files(named)[0]]


def _raw(paths: Sequence[str], skip: int, told: Callable[[int], Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for path in paths:
        left = os.path.getsize(path)
        for place, raw in raw_rows(path):
            if number >= skip:
                yield place, raw
            number += 1
            if isinstance(raw, bytes):
                left -= len(raw)
                told(len(raw))
        told(left)


def checked_row(place: str, raw: Any, teacher: bool = False) -> Row:
    """Return a row of training data.

    Raises:
        DataError: it cannot be used; says where, why, and how to see all.
    """
    try:
        return parse_row(raw, teacher)
    except BadRow as error:
        raise DataError(f"{place}: {error} (ultrarag data check lists every bad row)") from error


def checked_object(place: str, raw: Any) -> dict[str, Any]:
    """Return a JSON object of any kind.

    Raises:
        DataError: it is none; says where and why.
    """
    if isinstance(raw, BadJson):
        raise DataError(f"{place}: {raw}")
    try:
        value = json.loads(raw) if isinstance(raw, bytes) else raw
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: {type(value).__name__} instead of a JSON object")
    return value


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as it stood in its file, unknown keys included."""
    return row.model_dump(exclude_unset=True)
