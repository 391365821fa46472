"""Journal: every answer on the disk before the next is awaited, in the order of arrival, found again by its passage."""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.errors import DataError
from ultrarag.io import identity
from ultrarag.mining import (
    BM25_HEAD,
    Asked,
    MiningSearch,
    MiningSources,
    candidate_heads,
    checked_weights,
    prepare,
    read_pool,
)

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


class Journal:
    """Answers by the number of their passage, in a file that only grows; what was paid for is never asked again."""

    def __init__(self, path: Path, made_by: Mapping[str, Any], overwrite: bool = False) -> None:
        """Open a journal, or begin one; with `overwrite` one that was begun with other arguments is emptied.

        Raises:
            DataError: it was begun with other arguments, or another process writes it.
        """
        self.path = path
        #: where each passage's answer begins in the file; -1: there is none yet
        self._places = array("q")
        #: all records, the failed ones too
        self.records = 0
        self._overwrite = overwrite
        self._file = open(path, "ab+")  # noqa: SIM115 (it stays open)
        try:
            self._lock()
            self._read(json.loads(json.dumps(made_by)))
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, number: int) -> bool:
        return number < len(self._places) and self._places[number] >= 0

    def get(self, number: int) -> dict[str, Any] | None:
        """Return the record of a passage."""
        if number not in self:
            return None
        self._file.seek(self._places[number])
        record: dict[str, Any] = json.loads(self._file.readline())
        return record

    def add(self, number: int, record: Mapping[str, Any]) -> None:
        """Write a passage's record; it is durable when this returns."""
        self._file.seek(0, os.SEEK_END)
        self._note(number, self._file.tell())
        line = json.dumps({"n": number, **record}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing '{self.path}'") from None

    def _note(self, number: int, place: int) -> None:
        if number >= len(self._places):
            self._places.extend([-1] * (number + 1 - len(self._places)))
        self._places[number] = place
        self.records += 1

    def _read(self, made_by: dict[str, Any]) -> None:
        """Find the records of earlier runs; a last line that was not finished is cut off."""
        self._file.seek(0)
        head = self._file.readline()
        if not head.endswith(b"\n") or not self._same(self._record(head), made_by):
            self._begin(made_by)
            return
        place = len(head)
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                break
            self._note(self._record(line)["n"], place)
            place += len(line)

    def _begin(self, made_by: dict[str, Any]) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(made_by, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _record(self, line: bytes) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise DataError(f"'{self.path}' is damaged ({error}); move it away to begin anew") from error
        return record

    def _same(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
        """Whether the journal is for these arguments.

        Raises:
            DataError: it is not, and may not be overwritten.
        """
        if found != wanted and not self._overwrite:
            other = [key for key in wanted if found.get(key) != wanted[key]]
            raise DataError(
                f"'{self.path}' holds paid answers to another {', '.join(other) or 'set of arguments'}: give the same "
                "again to go on, or begin anew with --overwrite"
            )
        return found == wanted


class RoundTrip:
    """Searches all passages of a file; use it as a context."""

    def __init__(
        self, folder: Path, source: Path, encoder: Encoder | None, weights: Mapping[str, float] | None, k: int
    ) -> None:
        """Encode the passages into `folder`, or go on with what is there."""
        self.k = k
        chosen = checked_weights(weights, encoder)
        heads = (*chosen, *candidate_heads(tuple(chosen), encoder))
        vectors = tuple(head for head in heads if head != BM25_HEAD)
        sources = MiningSources(lambda: (), lambda: (passage.content for passage in read_pool(source)))
        known = {"input": identity(source), "model": encoder.fingerprint if encoder else None, "heads": heads}
        self.prepared = prepare(folder, sources, encoder, vectors, BM25_HEAD in heads, known)
        parts = self.prepared.vectors, self.prepared.words
        self.search = MiningSearch(chosen, self.prepared.texts.pool, encoder, *parts)

    def __enter__(self) -> RoundTrip:
        return self

    def __exit__(self, *exception: object) -> None:
        self.search.cuts.tell()
        self.prepared.close()

    def keeps(self, asked: Sequence[tuple[str, str]]) -> list[bool]:
        """Return for each (query, passage) whether the passage is among the first k hits."""
        if not asked:
            return []
        nothing = np.zeros(0, np.int64)
        found = self.search.find([Asked(query, None, nothing) for query, _ in asked], self.k)
        wanted = self.prepared.texts.find([passage for _, passage in asked])
        return [bool((one.numbers == number).any()) for one, number in zip(found, wanted, strict=True)]
