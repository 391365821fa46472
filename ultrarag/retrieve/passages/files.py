"""Files of passages and of queries: read line by line, checked whole before anything is done with them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ultrarag.errors import DataError, did_you_mean
from ultrarag.io import standard_input
from ultrarag.retrieve.passages.incoming import FIELDS, to_record
from ultrarag.rows import BadJson, raw_rows
from ultrarag.types import Passage, is_blank

#: Bad lines that an error lists; the rest is counted.
SHOWN = 20
#: The name of stdin on the command line, and in errors.
STDIN, STDIN_NAME = "-", "stdin"


class TabSeparated(dict[str, str]):
    """A line of id, tab, text; such a file may have a header."""


@dataclass(frozen=True)
class PassageFile:
    """A JSONL file whose every line is a passage, checked; iterating reads it again, so it may be of any size."""

    path: str
    #: how errors call it
    name: str
    #: passages, blank ones not counted
    count: int
    #: passages without a visible character in title and text: left out
    blank: int = 0

    def __iter__(self) -> Iterator[Passage]:
        for place, row in _rows(self.path, self.name):
            passage = _passage(row, place)
            if not passage.blank:
                yield passage


@contextmanager
def passage_file(source: str | Path, stdin: BinaryIO | None = None) -> Iterator[PassageFile]:
    """Open and check passages: JSONL, or a JSON list, of `_id`/`id`, `text`/`contents`, `title`, `metadata`.

    Blank ones, which collections have, are left out and counted in `blank`; one with a title only is none.

    Args:
        source: a file; a folder in BEIR's layout, which holds corpus.jsonl; or "-" for stdin.
        stdin: what "-" reads; default: the process's.

    Raises:
        DataError: naming file and line of the first 20 rows that cannot be used, and how many there are.
    """
    if str(source) != STDIN:
        path = str(_file_of(Path(source)))
        yield PassageFile(path, path, *_check(path, path))
        return
    with tempfile.NamedTemporaryFile(prefix="ultrarag-", suffix=".jsonl") as spool:  # a pipe cannot be read twice
        shutil.copyfileobj(stdin or standard_input().buffer, spool)
        spool.flush()
        yield PassageFile(spool.name, STDIN_NAME, *_check(spool.name, STDIN_NAME))


def read_queries(path: str | Path) -> dict[str, str]:
    """Read queries, id -> text: JSONL with `_id` (or `id`) and `text` (or `query`), or lines of id, tab, text.

    The lines may begin with a header, such as `query-id`, tab, `query`.

    Raises:
        DataError: naming file and line of what cannot be used.
    """
    queries: dict[str, str] = {}
    for number, (place, row) in enumerate(_rows(str(path), str(path), tab_separated=True)):
        if not number and _is_header(row):
            continue
        fields = _fields(row, place, {"id": ("id", "_id"), "text": ("text", "query")})
        id, text = _text(fields["id"], "id", place), _text(fields["text"], "text", place)
        if not id or is_blank(text):
            raise DataError(f"{place}: '{'text' if id else 'id'}' is empty")
        if id in queries:
            raise DataError(f"{place}: query '{id}' was there before; ids must differ")
        queries[id] = text
    if not queries:
        raise DataError(f"'{path}' holds no queries")
    return queries


#: What the columns of a table of queries are called in its first line, letters only.
_ID_NAMES, _TEXT_NAMES = {"id", "qid", "queryid"}, {"text", "query", "question", "querytext"}


def _is_header(row: Any) -> bool:
    """Whether a line of id, tab, text names these two columns."""
    if not isinstance(row, TabSeparated):
        return False
    id, text = ("".join(filter(str.isalpha, row[name].lower())) for name in ("id", "text"))
    return id in _ID_NAMES and text in _TEXT_NAMES


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    if not (path / "corpus.jsonl").is_file():
        raise DataError(f"the folder '{path}' holds no corpus.jsonl; name a JSONL file, or a folder in BEIR's layout")
    return path / "corpus.jsonl"


def _check(path: str, name: str) -> tuple[int, int]:
    """Return how many passages there are, and how many blank ones; raise DataError when one of them cannot be used,
    or there are none.
    """
    problems: list[str] = []
    bad = count = blank = 0
    places: dict[str, str] = {}
    for place, row in _rows(path, name, lenient=True):
        count += 1
        try:
            passage = _passage(row, place)
            if (before := places.setdefault(passage.id, place)) != place:
                raise DataError(f"{place}: id '{passage.id}' was used before, at {before}")
            blank += passage.blank
        except DataError as error:
            bad += 1
            problems += [str(error)] if bad <= SHOWN else []
    if bad:
        more = [f"... and {bad - SHOWN} more"] if bad > SHOWN else []
        rows = "row" if bad == 1 else "rows"
        raise DataError("\n".join([f"{bad} of {count} {rows} cannot be used; nothing was added:", *problems, *more]))
    if count == blank:
        raise DataError(f"'{name}' holds no passages" + (f" but {blank} blank ones" if blank else ""))
    return count - blank, blank


def _rows(path: str, name: str, lenient: bool = False, tab_separated: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield ("name:line", value); a line that is no JSON raises DataError, or is yielded as one when `lenient`."""
    for place, raw in raw_rows(path):
        place = name + place.removeprefix(path)
        try:
            value = _value(raw, place, tab_separated)
        except DataError as error:
            if not lenient:
                raise
            value = error
        yield place, value


def _value(raw: Any, place: str, tab_separated: bool) -> Any:
    if isinstance(raw, BadJson):
        raise DataError(f"{place}: {raw}")
    if not isinstance(raw, bytes):
        return raw  # an element of a JSON list
    try:
        line = raw.decode().rstrip("\r\n")
        if tab_separated and "\t" in line and not line.lstrip().startswith("{"):
            id, _, text = line.partition("\t")
            return TabSeparated(id=id, text=text)
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error


def _passage(row: Any, place: str) -> Passage:
    """Make a passage of a row, and check that an index can hold it."""
    if isinstance(row, DataError):
        raise row
    fields = _fields(row, place, FIELDS)
    metadata = fields["metadata"] if fields["metadata"] is not None else {}
    title = "" if fields["title"] is None else _text(fields["title"], "title", place)
    passage = Passage(_text(fields["id"], "id", place), _text(fields["text"], "text", place), title, metadata)
    try:
        return to_record(passage).passage
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _fields(row: Any, place: str, names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The values of a row by our names for them; None for what it lacks."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: {type(row).__name__} instead of a JSON object")
    known = [spelling for spellings in names.values() for spelling in spellings]
    for field in row:
        if field not in known and "metadata" in known:
            near = did_you_mean(field, known)
            raise DataError(f"{place}: unknown field '{field}'{near or '; put what else you have into metadata'}")
    found = {name: next((row[key] for key in keys if key in row), None) for name, keys in names.items()}
    for name in ("id", "text"):
        if found[name] is None:
            raise DataError(f"{place}: no '{name}' (known as {' or '.join(names[name])})")
    return found


def _text(value: Any, field: str, place: str) -> str:
    """A string; a number may be an id."""
    if field == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{place}: '{field}' is {type(value).__name__}, not a string")
    return value
