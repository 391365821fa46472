"""What is forgotten in the log goes from the rows that refreshes have taken from it as well."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Set
from pathlib import Path

#: Folder in the index with the rows of each output folder.
FOLDER = "feedback_rows"
ROWS, JUDGED = "rows.jsonl", "judged.json"


def discard_forgotten(index: Path, known: Set[int], days: float = 0) -> None:
    """Remove the rows of refreshes that hold a query which the log does not hold any more.

    A refresh that was cut off cannot go on then, and is begun again in another output folder.

    Args:
        known: keys of the queries whose text is in the log.
        days: leave rows that are younger, for a refresh that goes on.
    """
    folder = index / FOLDER
    for place in folder.iterdir() if folder.is_dir() else ():
        if place.stat().st_mtime > time.time() - days * 86_400:
            continue
        if not {_key(id) for id in _queries(place)} <= known:
            shutil.rmtree(place, ignore_errors=True)


def _queries(place: Path) -> Iterator[str]:
    """The ids of the queries in a folder of rows; one that cannot be read holds an unknown one."""
    try:
        with open(place / ROWS, encoding="utf-8") as file:
            yield from (json.loads(line)["id"] for line in file)
        yield from json.loads((place / JUDGED).read_text(encoding="utf-8"))["queries"]
    except (OSError, ValueError, KeyError, TypeError):
        yield ""


def _key(id: str) -> int:
    """The key of a query, of the id that its row has."""
    number = id.removeprefix("feedback-")
    return int(number) if number.lstrip("-").isdigit() else -1
