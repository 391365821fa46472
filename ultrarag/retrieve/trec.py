"""TREC run files: one line per hit, `query-id Q0 passage-id rank score tag`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ultrarag.errors import DataError, UsageError

_FIELDS = "query-id Q0 passage-id rank score tag"


def write_run(path: str | Path, run: Mapping[str, Mapping[str, float]], tag: str = "ultrarag") -> None:
    """Write a run; an existing file is replaced once the new one is whole.

    Args:
        run: query id -> passage id -> score. Hits are ranked by score, equal ones in the order given; the scores
            read back as the same numbers.
        tag: names the system.

    Raises:
        DataError: for an id that the format cannot hold (empty, or with white space), or when it cannot be written.
    """
    if not re.fullmatch(r"\S+", tag):
        raise UsageError(f"the tag of a run is one word, not '{tag}'")
    path = Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with staging.open("w", encoding="utf-8", newline="\n") as file:
                for query_id, hits in run.items():
                    file.writelines(_lines(query_id, hits, tag))
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror or error}") from error


def _lines(query_id: str, hits: Mapping[str, float], tag: str) -> list[str]:
    ranked = sorted(hits.items(), key=lambda hit: -hit[1])
    return [
        f"{_word(query_id)} Q0 {_word(passage_id)} {rank} {float(score)!r} {tag}\n"
        for rank, (passage_id, score) in enumerate(ranked, 1)
    ]


def _word(id: str) -> str:
    if not re.fullmatch(r"\S+", id):
        raise DataError(f"a TREC run cannot hold the id {id!r}: its fields are separated by white space; use --json")
    return id


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a run, query id -> passage id -> score, best first; the rank and the tag of a line are not used.

    Raises:
        DataError: naming file and line.

    Source:
        As in trec_eval, the scores make the ranking.
    """
    run: dict[str, dict[str, float]] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _add(run, line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text: {error.reason}") from error
    if not run:
        raise DataError(f"'{path}' holds no hits")
    return {query_id: dict(sorted(hits.items(), key=lambda hit: -hit[1])) for query_id, hits in run.items()}


def _add(run: dict[str, dict[str, float]], line: str, place: str) -> None:
    fields = line.split()
    if len(fields) != 6:
        raise DataError(f"{place}: {len(fields)} fields; a line of a TREC run has six: {_FIELDS}")
    query_id, _, passage_id, _, score, _ = fields
    hits = run.setdefault(query_id, {})
    if passage_id in hits:
        raise DataError(f"{place}: passage '{passage_id}' is there twice for query '{query_id}'")
    hits[passage_id] = _score(score, place)


def _score(text: str, place: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise DataError(f"{place}: the score '{text}' is not a number")
    return score
