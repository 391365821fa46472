"""Raw rows of a file, one at a time, so that a file of any size can be read: JSON lines, or one JSON list."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from ultrarag.errors import DataError

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
_PIECE = 1 << 20
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
    while piece := file.read(_PIECE):
        if text := piece.lstrip():
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
        piece = self.text.read(max(_PIECE, len(rest)))
        self.buffer, self.at = rest + piece, 0
        return bool(piece)

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
