"""Files of training rows: found from the paths that were given, and read one raw row at a time, at any size.

A file holds JSON lines, or one JSON list; nothing is passed over silently.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ultrarag.errors import DataError

#: What a directory's files of rows are called (in any case); a file that is named itself may be called anything.
SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")

#: Files that look like data which nobody would want left out unseen.
_OTHER_DATA = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".parquet", ".arrow", ".csv", ".tsv", ".pkl")

#: A file or directory whose name ends in this takes no negatives from the other queries of its batch.
NO_IN_BATCH_NEG = "no_in_batch_neg"


@dataclass(frozen=True)
class DataFile:
    """A file of rows, which is a dataset."""

    path: str
    #: the directory that was given, where it came from one
    folder: str | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return without_suffix(Path(self.path).name)


def without_suffix(name: str) -> str:
    """Return a file's name without a suffix of data files, whatever other dots it has."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES and stem else name


def find_files(sources: Sequence[str | os.PathLike[str]]) -> tuple[list[DataFile], list[str]]:
    """Return the files of rows in the order given, those of a directory sorted by name; and remarks.

    Directories are read one level deep, as FlagEmbedding does.

    Raises:
        DataError: a path does not exist, a directory holds no data, or holds data in a format that is not read.
    """
    files: list[DataFile] = []
    notes: list[str] = []
    for source in sources:
        path = os.path.normpath(_utf8(os.fspath(source)))
        if os.path.isdir(path):
            files += _directory(path, notes)
        else:
            files.append(DataFile(_regular(path)))
    if not files:
        raise DataError("no training data was given: name JSONL files or directories of them")
    return files, notes + _repeated(files)


def _utf8(path: str) -> str:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"the name {os.fsencode(path)!r} is not UTF-8; rename it") from None
    return path


def _regular(path: str) -> str:
    if not os.path.exists(path):
        raise DataError(f"'{path}' does not exist")
    if not os.path.isfile(path):
        raise DataError(f"'{path}' is neither a file nor a directory; it is read twice, so save it as a file first")
    return path


def _directory(path: str, notes: list[str]) -> list[DataFile]:
    found, unread = [], []
    for name in sorted(os.listdir(path)):
        full = os.path.join(path, _utf8(name))
        if os.path.isfile(full) and name.lower().endswith(SUFFIXES) and not name.startswith("."):
            found.append(DataFile(full, path))
        else:
            _refuse_other_data(full)
            unread.append(f"{name}/" if os.path.isdir(full) else name)
    expected = ", ".join(SUFFIXES)
    if not found:
        raise DataError(f"directory '{path}' holds no file ending in {expected}; it holds {_listed(unread)}")
    if unread:
        notes.append(f"{len(unread)} entries of '{path}' are not read (not files in {expected}): {_listed(unread)}")
    return found


def _refuse_other_data(path: str) -> None:
    name = os.path.basename(path).lower()
    if os.path.isfile(path) and name.endswith(_OTHER_DATA) and not name.startswith("."):
        raise DataError(f"'{path}' looks like data in a format that is not read; convert it to JSONL, or move it away")


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(f"'{name}'" for name in names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown


def _repeated(files: Sequence[DataFile]) -> list[str]:
    times: dict[str, int] = {}
    for file in files:
        real = os.path.realpath(file.path)
        times[real] = times.get(real, 0) + 1
    return [
        f"'{path}' is given {count} times, so its rows count {count} times"
        for path, count in times.items()
        if count > 1
    ]


_MAGIC = {
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"(\xb5/\xfd": "is compressed (zstd): unpack it first",
    b"BZh": "is compressed (bzip2): unpack it first",
    b"\xfd7zXZ": "is compressed (xz): unpack it first",
    b"PAR1": "is a Parquet file: convert it to JSONL",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
}
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK_BYTES = 1 << 20
#: An element that has not ended after this many characters is a syntax error, not a row.
_LONGEST = 1 << 28


class BadJson(Exception):
    """A list cannot be read any further; the message says why."""


def raw_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", the line's bytes) of JSON lines, or ("file:row N", value) of a JSON list.

    The last value of a list with a syntax error is a `BadJson`. Blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or is no text.
    """
    try:
        with open(path, "rb") as file:
            start = _start(path, file)
            first = _first_byte(file)
            file.seek(start)
            yield from _list_rows(path, file) if first == b"[" else _lines(path, file)
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or error}") from error


def _start(path: str, file: BinaryIO) -> int:
    """Return where the text begins, after a byte order mark."""
    head = file.read(8)
    for magic, reason in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"'{path}' {reason}")
    file.seek(len(_BOM) if head.startswith(_BOM) else 0)
    return file.tell()


def _first_byte(file: BinaryIO) -> bytes:
    while chunk := file.read(_CHUNK_BYTES):
        if text := chunk.lstrip():
            return text[:1]
    return b""


def _lines(path: str, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(file, 1):
        if not line.isspace():
            yield f"{path}:{number}", line


def _list_rows(path: str, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    # bytes that are not UTF-8 become lone surrogates, which the check of the row then names
    reader = _ListReader(io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape"))
    number = 0
    try:
        for number, value in enumerate(reader.values(), 1):
            yield f"{path}:row {number}", value
    except BadJson as error:
        yield f"{path}:row {number + 1}", error
    finally:
        reader.text.detach()


class _ListReader:
    """Decodes one JSON list value by value, holding little more than one value in memory."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text
        self.buffer = ""
        #: where in the buffer the next value begins
        self.at = 0
        self.decoder = json.JSONDecoder()

    def values(self) -> Iterator[Any]:
        self._take("[")
        if self._next() == "]":
            self._take("]")
        else:
            yield self._value()
            while self._take(",]") == ",":
                yield self._value()
        if self._next():
            raise BadJson(f"text after the end of the list: {self.buffer[self.at :][:20]!r}")

    def _more(self) -> bool:
        rest = self.buffer[self.at :]
        # doubling, so that a long value is not decoded from its start too often
        chunk = self.text.read(max(_CHUNK_BYTES, len(rest)))
        self.buffer, self.at = rest + chunk, 0
        return bool(chunk)

    def _next(self) -> str:
        """Return the next character that is not space, without taking it; empty at the end."""
        while True:
            self.at = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer) or not self._more():
                return self.buffer[self.at : self.at + 1]

    def _take(self, allowed: str) -> str:
        found = self._next()
        if not found:
            raise BadJson("the file ends before the list does")
        if found not in allowed:
            wanted = " or ".join(f"'{character}'" for character in allowed)
            raise BadJson(f"not valid JSON: expected {wanted}, found '{found}'")
        self.at += 1
        return found

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                if len(self.buffer) - self.at > _LONGEST or not self._more():
                    raise BadJson(f"not valid JSON: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise BadJson(f"not valid JSON: {error}") from error
            else:
                return value
