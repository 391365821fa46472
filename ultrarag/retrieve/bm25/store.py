"""The state of a BM25 index on disk and in memory: parts, passages just written, and one SQLite file that names them.

What a flush acknowledges is in `bm25.sqlite`: which segments there are, the small ones themselves, and which rows of
each are dead. Large segments are files beside it, written and synced before the file names them, and removed after it
has ceased to. A kill leaves at most files that nobody names, which the next owner removes.
"""

from __future__ import annotations

import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ultrarag.errors import IndexStateError
from ultrarag.retrieve.bm25.gathering import Batch, merged
from ultrarag.retrieve.bm25.legacy import old_segment
from ultrarag.retrieve.bm25.part import Part
from ultrarag.retrieve.bm25.segment import Segment, id_hashes, in_memory, mapped, write
from ultrarag.retrieve.bm25.vocabulary import Vocabulary
from ultrarag.retrieve.passages import connect_for_reading

#: Changes when the tokens of a text or the layout change. Files of format 1 are read, and rewritten by their owner.
FORMAT = 2
#: Passages that are gathered before they become a segment, unless a search or a flush comes first; about 0.1 s.
BATCH_ROWS = 8192
#: A segment of fewer rows lies in the SQLite file, of more in a file of its own.
FILE_ROWS = 8192
#: Terms of the vocabulary of a writing process, about 100 bytes each.
MOST_TERMS = 1 << 20

TABLES = """
CREATE TABLE segments (number INTEGER PRIMARY KEY, rows INTEGER NOT NULL, crc INTEGER NOT NULL, content BLOB);
CREATE TABLE dead (segment INTEGER, row INTEGER, PRIMARY KEY (segment, row)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class View:
    """One state of the index, for one search."""

    parts: tuple[Part, ...]
    #: passages that live, and their tokens
    count: int
    tokens: int


class Bm25File:
    """The state; every method may be called from any thread, those that write from one at a time."""

    FILE = "bm25.sqlite"

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self._path, self._read_only = path, read_only
        self._db = connect_for_reading(path) if read_only else _connect(path)
        #: guards all that follows; held for no longer than a batch takes to become a segment
        self._mutex = threading.RLock()
        self.vocabulary = Vocabulary()
        #: numbers are never given twice, so that a file is never written over
        self._next = -1

    @classmethod
    def create(cls, path: Path, k1: float, b: float) -> Bm25File:
        """Create the file."""
        store = cls(path)
        meta = {"format": FORMAT, "k1": k1, "b": b}
        with store._transaction():
            store._db.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value REAL NOT NULL)")
            store._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            for statement in TABLES.split(";")[:-1]:
                store._db.execute(statement)
        store._load()
        return store

    @classmethod
    def open(cls, path: Path, read_only: bool = False, verify: bool = True) -> Bm25File:
        """Open the file and the segments that it names; `verify` compares these with their checksums."""
        store = cls(path, read_only)
        try:
            store._load(verify)
        except BaseException:
            store._db.close()
            raise
        return store

    def _load(self, verify: bool = False) -> None:
        meta = dict(self._db.execute("SELECT name, value FROM meta"))
        if meta.get("format") not in (1, FORMAT):
            raise IndexStateError(
                f"'{self._path}' has format {meta.get('format')}, this version of ultrarag writes {FORMAT}; "
                f"delete its directory and add the passages again"
            )
        self.k1, self.b = meta["k1"], meta["b"]
        if meta["format"] == 1 and self._read_only:
            parts = [Part.of(0, old_segment(self._db, self.k1, self.b))]
        else:
            if meta["format"] == 1:
                self._migrate()
            parts = [self._part(*row, verify) for row in self._named_segments()]
        with self._mutex:
            self.parts: tuple[Part, ...] = tuple(part for part in parts if part.count)
            #: what the file says: number -> rows of the part's log that it has
            self._saved = {part.number: len(part.log) for part in parts}
            self._next = max(self._next, *self._saved, -1) + 1
            self._forget()
        if not self._read_only:
            self._remove_unnamed()

    def _migrate(self) -> None:
        """Rewrite a file of format 1, once; a kill leaves the old one."""
        segment = old_segment(self._db, self.k1, self.b)
        content = bytes(segment.content)
        if segment.rows >= FILE_ROWS:
            write(self._file(0), [content])
        with self._transaction():
            self._db.execute("DROP TABLE docs")
            self._db.execute("DROP TABLE postings")
            for statement in TABLES.split(";")[:-1]:
                self._db.execute(statement)
            stored = None if segment.rows >= FILE_ROWS else content
            values = (0, segment.rows, zlib.crc32(content), stored)
            self._db.execute("INSERT INTO segments VALUES (?, ?, ?, ?)", values)
            self._db.execute("DELETE FROM meta WHERE name = 'sealed'")
            self._db.execute("UPDATE meta SET value = ? WHERE name = 'format'", (FORMAT,))
        self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        self._db.execute("VACUUM")

    def _named_segments(self) -> list[tuple[int, int, int, bytes | None]]:
        return self._db.execute("SELECT number, rows, crc, content FROM segments ORDER BY number").fetchall()

    def _part(self, number: int, rows: int, crc: int, content: bytes | None, verify: bool) -> Part:
        try:
            segment = mapped(self._file(number)) if content is None else Segment(content)
        except (ValueError, KeyError, TypeError) as error:
            raise IndexStateError(f"'{self._path}' is damaged ({error}): segment {number}") from None
        if segment.rows != rows or (verify and zlib.crc32(segment.content) != crc):
            where = self._file(number) if content is None else self._path
            raise IndexStateError(
                f"'{where}' does not have the content that was written (checksum); rebuild the words from the passages"
            )
        dead = self._db.execute("SELECT row FROM dead WHERE segment = ?", (number,)).fetchall()
        return Part.of(number, segment).without(np.array([row for (row,) in dead], np.int64))

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"segment-{number:08}.bm25")

    def _remove_unnamed(self) -> None:
        """Remove files that a process left which was killed, or that a search may have held open."""
        named = {self._file(part.number) for part in self.parts}
        for file in self._path.parent.glob("segment-*.bm25"):
            if file not in named:
                with suppress(OSError):
                    file.unlink()

    def _forget(self) -> None:
        """Begin with no passages gathered."""
        if len(self.vocabulary.keys) > MOST_TERMS:
            self.vocabulary = Vocabulary()
        self._batch = Batch(self.vocabulary)
        self._row_in_batch: dict[bytes, int] = {}

    @property
    def count(self) -> int:
        """Passages that live."""
        with self._mutex:
            return sum(part.count for part in self.parts) + len(self._row_in_batch)

    def view(self) -> View:
        """The state now."""
        with self._mutex:
            self._seal()
            parts = self.parts
        return View(parts, sum(part.count for part in parts), sum(part.tokens for part in parts))

    def batch(self) -> Batch:
        """A batch to fill and hand to `append`, before anything else is written."""
        with self._mutex:
            if len(self.vocabulary.keys) > MOST_TERMS:
                self._seal()
            return Batch(self.vocabulary)

    def append(self, batch: Batch) -> None:
        """Add passages, and take those with the same ids out; no id is in the batch twice."""
        with self._mutex:
            self.delete(batch.ids)
            first = len(self._batch)
            self._batch.extend(batch)
            self._row_in_batch.update(zip(batch.ids, range(first, first + len(batch)), strict=True))
            if len(self._batch) >= BATCH_ROWS:
                self._seal()

    def delete(self, ids: Sequence[bytes]) -> None:
        """Take passages out; ids that are not stored are ignored."""
        ids = list(dict.fromkeys(ids))
        with self._mutex:
            for id in ids:
                self._row_in_batch.pop(id, None)
            hashes = id_hashes(ids)
            parts = [part.without((rows := part.find(ids, hashes))[rows >= 0]) for part in self.parts]
            self.parts = tuple(parts)

    def commit(self) -> None:
        """Make the writes durable: files first, then all that changed in one transaction."""
        with self._mutex:
            self._seal()
            parts = self.parts = tuple(self._filed(part) for part in self.parts)
            gone = list(self._saved.keys() - {part.number for part in parts})
            new = [part for part in parts if part.number not in self._saved]
            died = [part for part in parts if len(part.log) > self._saved.get(part.number, 0)]
            if gone or new or died:
                self._save(new, gone, died)

    def _save(self, new: Sequence[Part], gone: Sequence[int], died: Sequence[Part]) -> None:
        """Write in one transaction which parts there are more and no more, and where rows have died."""
        numbers = [(number,) for number in gone]
        with self._transaction():
            self._db.executemany("DELETE FROM segments WHERE number = ?", numbers)
            self._db.executemany("DELETE FROM dead WHERE segment = ?", numbers)
            for part in new:
                self._insert(part)
            for part in died:
                rows = part.log[self._saved.get(part.number, 0) :].tolist()
                self._db.executemany("INSERT INTO dead VALUES (?, ?)", ((part.number, row) for row in rows))
        for number in gone:
            del self._saved[number]
        self._saved.update((part.number, len(part.log)) for part in (*new, *died))
        self._remove(gone)

    def _remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with suppress(OSError):
                self._file(number).unlink(missing_ok=True)

    def _insert(self, part: Part) -> None:
        content = part.segment.content
        stored = content if isinstance(content, bytes) else None
        values = (part.number, part.segment.rows, zlib.crc32(content), stored)
        self._db.execute("INSERT INTO segments VALUES (?, ?, ?, ?)", values)

    def rollback(self) -> None:
        """Return to the last commit."""
        with self._mutex:
            self._load()

    def close(self) -> None:
        """Close the file; it is one file then, without a log beside it."""
        with self._mutex:
            if not self._read_only:
                self._db.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page
            self._db.close()
            self.parts = ()

    def merge(self, parts: Sequence[Part], check: Callable[[], None] = lambda: None) -> None:
        """Put one part in the place of several; searches and writes go on meanwhile."""
        content = merged([(part.segment, part.dead) for part in parts], self.k1, self.b, check)
        with self._mutex:
            number, self._next = self._next, self._next + 1
        rows = sum(part.count for part in parts)
        segment = write(self._file(number), content)[0] if rows >= FILE_ROWS else in_memory(content)
        with self._mutex:
            self._install(parts, Part.of(number, segment))

    def _install(self, parts: Sequence[Part], made: Part) -> None:
        """Give the new part what died in the old ones while it was made, and take it into service."""
        now = {part.number: part for part in self.parts}
        if any(part.number not in now or not now[part.number].follows(part) for part in parts):
            return self._remove([made.number])  # another state was returned to
        base, died = 0, [np.zeros(0, np.int64)]
        for part in parts:
            kept = np.ones(part.segment.rows, bool) if part.dead is None else ~part.dead
            late = now[part.number].log[len(part.log) :]
            died.append(kept.cumsum()[late] - 1 + base)
            base += part.count
        gone = {part.number for part in parts}
        made = made.without(np.concatenate(died))
        if all(self._saved.get(number) == len(now[number].log) for number in gone):  # nothing but what was flushed
            self._save([made] if made.count else [], list(gone), [made] if len(made.log) else [])
        rest = [part for part in self.parts if part.number not in gone]
        self.parts = (*rest, made) if made.count else tuple(rest)
        self._remove(gone - self._saved.keys())  # the file never named them
        return None

    def _seal(self) -> None:
        """Make a part of the passages gathered."""
        if not len(self._batch):
            return
        alive = np.zeros(len(self._batch), bool)
        alive[list(self._row_in_batch.values())] = True
        if alive.any():
            segment = in_memory(self._batch.compressed(alive, self.k1, self.b))
            self.parts = (*self.parts, Part.of(self._next, segment))
            self._next += 1
        self._forget()

    def _filed(self, part: Part) -> Part:
        """The part, with its segment in a file when it is large."""
        if part.segment.rows < FILE_ROWS or not isinstance(part.segment.content, bytes) or part.number in self._saved:
            return part
        segment, _ = write(self._file(part.number), [part.segment.content])
        return Part(part.number, segment, part.count, part.tokens, part.dead, part.log, part.counted)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """All statements, or none."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                self._db.execute("COMMIT")
                return
            except BaseException:
                self._undo()
                raise
        self._undo()

    def _undo(self) -> None:
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, cached_statements=32)
    try:
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # before the file has a table; an older one keeps its setting
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
    except BaseException:
        db.close()
        raise
    return db
