"""The files of the engine: its manifest, which is replaced last, what it counts, and what nobody counts any more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultrarag.errors import IndexStateError
from ultrarag.io import replacing, resource_error, write_json
from ultrarag.retrieve.engines.ivf.codes import Codes

MANIFEST = "manifest.json"
#: What the names of the engine's files begin with, before the number of the table. `codes` are those of turbovec, of an
#: older engine: they are made anew.
OWN_FILES = ("vectors", "passages", "ends", "dead", "weights", "weightends", "run", "postings", "codes", "lists")
_KEYS = {"number", "rows", "text", "dead", "norm", "runs"}


def read_manifest(directory: Path) -> dict[str, Any]:
    """What was durable at the last flush: `Table.state`, and of how many rows codes are written.

    Raises:
        IndexStateError: it is missing or damaged.
    """
    path = directory / MANIFEST
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        if missing := _KEYS - state.keys():
            raise ValueError(f"'{min(missing)}' is missing")
    except FileNotFoundError:
        raise IndexStateError(f"'{path}' is missing; rebuild the vectors from the passages") from None
    except ValueError as error:
        raise IndexStateError(f"'{path}' is damaged ({error}); rebuild the vectors from the passages") from None
    return {"lists": 0, **state}


def write_manifest(directory: Path, table: Mapping[str, Any], coded: int) -> None:
    """Replace it: from here on the table counts, with codes of its first `coded` rows."""
    write_json(directory / MANIFEST, {**table, "lists": coded})


def codes_path(directory: Path, table: int, rows: int) -> Path:
    """Where the codes of so many rows of a table lie."""
    return directory / f"lists-{table}-{rows}"


def write_codes(path: Path, codes: Codes) -> None:
    """Write codes durably."""
    with replacing(path) as file:
        codes.write(file)


def read_codes(path: Path) -> Codes:
    """Read what `write_codes` wrote.

    Raises:
        IndexStateError: the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            return Codes.read(file)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise IndexStateError(f"'{path}' is damaged ({error}); rebuild the vectors from the passages") from None


def remove_left_over(directory: Path, state: Mapping[str, Any]) -> None:
    """Remove files of tables and codes that a manifest does not count."""
    number, runs = state["number"], {f"{first}-{last}" for first, last in state["runs"]}
    kept = (
        {f"{kind}-{number}" for kind in OWN_FILES}
        | {f"run-{number}-{rows}" for rows in runs}
        | {f"postings-{number}-{first}-{last}" for first, last in state.get("postings", [])}
        | {codes_path(directory, number, state["lists"]).name}
    )
    for path in directory.iterdir():
        if path.name.partition("-")[0] in OWN_FILES and path.name not in kept:
            path.unlink()


@contextmanager
def named_errors(directory: Path) -> Iterator[None]:
    """Say which directory an error of the file system is about."""
    try:
        yield
    except OSError as error:
        if found := resource_error(error, directory):
            raise found from error
        raise IndexStateError(
            f"'{directory}' cannot be written ({error}); what was flushed before is untouched"
        ) from error
