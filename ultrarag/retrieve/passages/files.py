"""Passages and queries as they come in, from files or objects: checked whole before anything is done with them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ultrarag.errors import DataError, did_you_mean
from ultrarag.io import standard_input
from ultrarag.retrieve.passages.chunks import ChunkRows
from ultrarag.retrieve.search import facts
from ultrarag.rows import BadJson, raw_rows
from ultrarag.types import Passage, is_blank

#: Bad lines that an error lists; the rest is counted.
SHOWN = 20
#: The name of stdin on the command line, and in errors.
STDIN, STDIN_NAME = "-", "stdin"
#: plain: a row is a passage, and nothing else; ultrarag_v3: a chunk as UltraRAG's corpora hold them
Layout = Literal["plain", "ultrarag_v3"]


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
    #: passages whose id was there before, and that have got one of their own; and the first such id
    renamed: int = 0
    example: str = ""
    layout: Layout = "plain"

    def __iter__(self) -> Iterator[Passage]:
        chunks = ChunkRows() if self.layout == "ultrarag_v3" else None
        for place, row in _rows(self.path, self.name):
            passage = _passage(row, place, chunks)
            if not passage.blank:
                yield passage


@contextmanager
def passage_file(source: str | Path, stdin: BinaryIO | None = None, layout: Layout = "plain") -> Iterator[PassageFile]:
    """Open and check passages: JSONL, or a JSON list, of `_id`/`id`, `text`/`contents`, `title`, `metadata`.

    Blank ones, which collections have, are left out and counted in `blank`; one with a title only is none.

    Args:
        source: a file; a folder in BEIR's layout, which holds corpus.jsonl; or "-" for stdin.
        stdin: what "-" reads; default: the process's.
        layout: `ultrarag_v3` gives rows that repeat an id one of their own (`id#2`), counted in `renamed`, and puts
            fields that a passage has not into its metadata; `plain` refuses both.

    Raises:
        DataError: naming file and line of the first 20 rows that cannot be used, and how many there are.
    """
    if str(source) != STDIN:
        path = str(_file_of(Path(source)))
        yield _check(path, path, layout)
        return
    with tempfile.NamedTemporaryFile(prefix="ultrarag-", suffix=".jsonl") as spool:  # a pipe cannot be read twice
        shutil.copyfileobj(stdin or standard_input().buffer, spool)
        spool.flush()
        yield _check(spool.name, STDIN_NAME, layout)


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


def _check(path: str, name: str, layout: Layout) -> PassageFile:
    """Count the passages; raise DataError when one of them cannot be used, or there are none."""
    chunks = ChunkRows()
    problems: list[str] = []
    bad = count = blank = 0
    places: dict[str, str] = {}
    for place, row in _rows(path, name, lenient=True):
        count += 1
        try:
            passage = _passage(row, place, chunks if layout == "ultrarag_v3" else None)
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
    return PassageFile(path, name, count - blank, blank, chunks.renamed, chunks.example, layout)


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


def _passage(row: Any, place: str, chunks: ChunkRows | None = None) -> Passage:
    """Make a passage of a row, and check that an index can hold it."""
    if isinstance(row, DataError):
        raise row
    if chunks is not None and isinstance(row, dict):
        row = chunks(row)
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


#: The names under which a mapping may give each field; the layouts of BEIR and of pyserini are among them.
FIELDS = {"id": ("id", "_id"), "text": ("text", "contents"), "title": ("title",), "metadata": ("metadata",)}
#: Metadata as it is stored.
_ENCODE = json.JSONEncoder(ensure_ascii=False, sort_keys=True, allow_nan=False).encode


@dataclass(frozen=True)
class Record:
    """A checked passage as the store keeps it."""

    id: str
    text: str
    title: str
    #: JSON
    metadata: str
    #: of what is encoded
    hash: bytes

    @property
    def passage(self) -> Passage:
        """The passage as a user sees it."""
        return Passage(self.id, self.text, self.title, json.loads(self.metadata))

    @property
    def content(self) -> str:
        """What is encoded."""
        return Passage(self.id, self.text, self.title).content


def records(passages: Iterable[Passage | Mapping[str, Any]]) -> Iterator[Record]:
    """Check passages, or mappings with the same fields, one by one.

    A mapping has `id` (or `_id`), `text` (or `contents`), and may have `title` and `metadata`. NUL bytes, slashes and
    any script are kept as they are; the text may be empty where there is a title.

    Raises:
        DataError: for an id or text that is no text (a lone surrogate, another type), an empty id, unknown fields,
            metadata that is not JSON, or a passage without a visible character; names the passage.
    """
    for number, item in enumerate(passages, 1):
        passage = item if isinstance(item, Passage) else _from_mapping(item, number)
        record = to_record(passage)
        if passage.blank:
            raise DataError(
                f"passage {passage.id!r} is blank: title and text have no visible character, and its vector would be "
                "near every short query; leave it out"
            )
        yield record


def to_record(passage: Passage) -> Record:
    """Check one passage."""
    _check_text(passage.id, "id", passage.id)
    if not passage.id:
        raise DataError("a passage's id is a non-empty string, not ''")
    _check_text(passage.id, "text", passage.text)
    _check_text(passage.id, "title", passage.title)
    metadata = metadata_text(passage.id, passage.metadata)
    return Record(passage.id, passage.text, passage.title, metadata, content_hash(passage.content))


def content_hash(content: str) -> bytes:
    """SHA-256 of what is encoded."""
    return hashlib.sha256(content.encode()).digest()


def _from_mapping(item: Any, number: int) -> Passage:
    if not isinstance(item, Mapping):
        raise DataError(f"passage {number} is {type(item).__name__}; give a Passage, or a dict with 'id' and 'text'")
    known = [name for names in FIELDS.values() for name in names]
    for name in item:
        if name not in known:
            raise DataError(
                f"passage {number} has the unknown field '{name}'{did_you_mean(str(name), known)}; "
                f"put what is neither id, text nor title into 'metadata'"
            )
    found = {field: _checked_value(item, names) for field, names in FIELDS.items()}
    if found["id"] is None or found["text"] is None:
        missing = "id" if found["id"] is None else "text"
        raise DataError(f"passage {number} ({found['id']!r}) has no '{missing}'")
    return Passage(found["id"], found["text"], found["title"] or "", found["metadata"] or {})


def _checked_value(item: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((item[name] for name in names if name in item), None)


def _check_text(id: object, field: str, value: object) -> None:
    if not isinstance(value, str):
        raise DataError(f"passage {id!r}: '{field}' is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"passage {id!r}: '{field}' holds a lone surrogate (character {error.start}), which is not text; "
            f"decode the source with errors='replace', or drop the passage"
        ) from error


def metadata_text(id: str, metadata: Any) -> str:
    """The metadata of a passage as JSON; DataError when no index could hold it, or filter by it."""
    if not isinstance(metadata, Mapping):
        raise DataError(f"passage {id!r}: 'metadata' is {type(metadata).__name__}; it must be a mapping")
    try:
        facts(metadata)  # engines could not filter by what this refuses
        text = _ENCODE(dict(metadata))
    except (DataError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"passage {id!r}: {error}") from error
    _check_text(id, "metadata", text)
    return text
