"""The file of a BM25 index: passages by row, and inverted lists of their terms and metadata facts in segments."""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ultrarag.errors import IndexStateError
from ultrarag.retrieve.bm25.terms import MOST_FREQUENT, Entry, Postings, entries, grouped, segment, unpack_forward
from ultrarag.retrieve.passages import connect_for_reading

#: Changes when the tokens of a text or the layout change: an older file is then rebuilt from its passages.
FORMAT = 1
#: Rows that are kept in memory before they are sealed; sealing takes about 0.2 s.
BUFFER_ROWS = 8192
#: SQLite's cache: sealing touches the tree of lists everywhere, of which its default of 2 MB holds little.
CACHE_KB = 65_536

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value REAL NOT NULL);
CREATE TABLE docs (row INTEGER PRIMARY KEY, id BLOB UNIQUE NOT NULL, length INTEGER NOT NULL, forward BLOB);
"""
#: A list lies in one piece, part after part: most have one row or two.
_POSTINGS = """
CREATE TABLE postings (
    key INTEGER, first INTEGER, rows BLOB NOT NULL, numbers BLOB NOT NULL, PRIMARY KEY (key, first)
) WITHOUT ROWID;
"""


class Bm25File:
    """One SQLite file; its caller holds a lock, and takes `rollback` when a write fails."""

    FILE = "bm25.sqlite"

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self._path = path
        self._db = connect_for_reading(path) if read_only else _connect(path)
        self._db.execute(f"PRAGMA cache_size=-{CACHE_KB}")

    @classmethod
    def create(cls, path: Path, k1: float, b: float) -> Bm25File:
        """Create the file."""
        store = cls(path)
        store._db.executescript(f"BEGIN; {_TABLES} {_POSTINGS}")
        meta = {"format": FORMAT, "k1": k1, "b": b, "sealed": 0}
        store._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        store._db.execute("COMMIT")
        store._load()
        return store

    @classmethod
    def open(cls, path: Path, read_only: bool = False) -> Bm25File:
        """Open the file."""
        store = cls(path, read_only)
        try:
            store._load()
        except BaseException:
            store._db.close()
            raise
        return store

    def _load(self) -> None:
        meta = dict(self._db.execute("SELECT name, value FROM meta"))
        if meta.get("format") != FORMAT:
            raise IndexStateError(
                f"'{self._path}' has format {meta.get('format')}, this version of ultrarag writes {FORMAT}; "
                f"delete its directory and add the passages again"
            )
        self.k1, self.b, self._sealed = meta["k1"], meta["b"], int(meta["sealed"])
        rows, lengths = self._row_lengths()
        #: rows handed out so far, dead ones included
        self.rows = max(self._sealed, int(rows[-1]) + 1 if len(rows) else 0)
        #: (capacity,): tokens of each row; -1 for a dead row
        self._lengths = np.full(max(1024, self.rows), -1, np.int64)
        self._lengths[rows] = lengths
        self.count, self._tokens = len(rows), int(lengths.sum())
        self._buffer = Postings()
        self._norms: np.ndarray | None = None
        for row, forward in self._db.execute("SELECT row, forward FROM docs WHERE forward IS NOT NULL ORDER BY row"):
            self._buffer_row(row, *(part.tolist() for part in unpack_forward(forward)))

    def _row_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = self._db.execute("SELECT row, length FROM docs ORDER BY row")
        flat = np.fromiter(itertools.chain.from_iterable(pairs), np.int64)
        return flat[::2], flat[1::2]

    def append(self, id: str, terms: Mapping[str, int], found: Iterable[tuple[str, float]]) -> None:
        """Add a passage that is not stored, with the frequencies of its terms and its facts."""
        self._begin()
        row, length = self.rows, sum(terms.values())
        frequencies = [min(n, MOST_FREQUENT) for n in terms.values()]
        keys = [_key("term", term) for term in terms]
        values: list[float] = [*frequencies]
        for fact, value in found:
            keys.append(_key("fact", fact))
            values.append(value)
        forward = np.array(keys, "<i8").tobytes() + np.array(values, "<f8").tobytes()
        self._db.execute("INSERT INTO docs VALUES (?, ?, ?, ?)", (row, _encode(id), length, forward))
        self._buffer_row(row, keys, values)
        self._grow()
        self._lengths[row] = length
        self.rows, self.count, self._tokens, self._norms = row + 1, self.count + 1, self._tokens + length, None
        if self.rows - self._sealed >= BUFFER_ROWS:
            self._seal()

    def delete(self, ids: Sequence[str]) -> None:
        """Leave the rows of these ids dead."""
        self._begin()
        for id in ids:
            row = self.row_of(id)
            if row is not None:
                self._db.execute("DELETE FROM docs WHERE row = ?", (row,))
                self.count, self._tokens = self.count - 1, self._tokens - int(self._lengths[row])
                self._lengths[row], self._norms = -1, None

    def commit(self) -> None:
        """Make the writes durable."""
        if self._db.in_transaction:
            self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Return to the last commit."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._load()

    def close(self) -> None:
        """Close the file; it is one file then, without a log beside it."""
        self._db.close()

    def row_of(self, id: str) -> int | None:
        """The row of an id, None if it is not stored."""
        found = self._db.execute("SELECT row FROM docs WHERE id = ?", (_encode(id),)).fetchone()
        return None if found is None else int(found[0])

    def ids_of(self, rows: np.ndarray) -> list[str]:
        """The ids of rows that are alive."""
        find = "SELECT id FROM docs WHERE row = ?"
        return [_decode(self._db.execute(find, (row,)).fetchone()[0]) for row in rows.tolist()]

    def first_ids(self, rows: np.ndarray, count: int) -> list[str]:
        """The first so many ids of rows that are alive, in their order."""
        if len(rows) <= 2 * count:
            return sorted(self.ids_of(rows))[:count]
        find = "SELECT id FROM docs WHERE row IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?"
        return [_decode(id) for (id,) in self._db.execute(find, (json.dumps(rows.tolist()), count))]

    def all_ids(self) -> list[str]:
        """The ids of all passages."""
        return [_decode(id) for (id,) in self._db.execute("SELECT id FROM docs")]

    def postings(self, term: str) -> tuple[np.ndarray, np.ndarray]:
        """The living rows that hold a term, ascending, and its frequency in each."""
        rows, frequencies = self._read(_key("term", term))
        if self.count == self.rows:
            return rows, frequencies
        alive = self._lengths[rows] >= 0
        return rows[alive], frequencies[alive]

    def facts(self, fact: str) -> tuple[np.ndarray, np.ndarray]:
        """The rows that hold a fact of their metadata, dead ones included, and the number with each."""
        return self._read(_key("fact", fact))

    def norms(self) -> np.ndarray:
        """k1 (1 - b + b length / mean length) of each row, (rows,)."""
        if self._norms is None or len(self._norms) != self.rows:
            mean = self._tokens / self.count if self._tokens else 1.0
            self._norms = self.k1 * (1 - self.b + self.b * self._lengths[: self.rows] / mean)
        return self._norms

    def vacuum(self) -> None:
        """Number the living rows anew without gaps, and join segments while they fit into one."""
        self._begin()
        self._seal()
        alive = self._lengths[: self.rows] >= 0
        new_row = np.cumsum(alive) - 1
        self._db.execute("ALTER TABLE postings RENAME TO old")
        self._db.execute(_POSTINGS)
        for key, rows, numbers in _lists(self._db, "old"):
            held = alive[rows]
            self._insert(entries(key, new_row[rows[held]], numbers[held]))
        self._db.execute("DROP TABLE old")
        for old in np.flatnonzero(alive).tolist():  # ascending, so that the new number is always free
            if new_row[old] != old:
                self._db.execute("UPDATE docs SET row = ? WHERE row = ?", (int(new_row[old]), old))
        self._set_sealed(self.count)
        self._db.execute("COMMIT")
        self._db.execute("VACUUM")
        self._load()

    def _begin(self) -> None:
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")

    def _grow(self) -> None:
        if self.rows == len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.full(self.rows, -1, np.int64)])

    def _buffer_row(self, row: int, keys: Iterable[int], values: Iterable[float]) -> None:
        for key, value in zip(keys, values, strict=True):
            self._buffer.add(key, row, value)

    def _seal(self) -> None:
        """Write the buffer's lists without dead rows, and forget the passages' own."""
        self._insert(self._buffered())
        self._db.execute("UPDATE docs SET forward = NULL WHERE forward IS NOT NULL")
        self._set_sealed(self.rows)
        self._buffer = Postings()

    def _set_sealed(self, rows: int) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE name = 'sealed'", (rows,))
        self._sealed = rows

    def _buffered(self) -> Iterator[Entry]:
        """The lists of the passages not sealed yet, in the order of the table, which is the fastest to insert.

        All at once in numpy: searches wait meanwhile, and list by list it would take five times as long.
        """
        kept = self._db.execute("SELECT row, forward FROM docs WHERE row >= ? ORDER BY row", (self._sealed,)).fetchall()
        if not kept:
            return
        pairs = [unpack_forward(forward) for _, forward in kept]
        keys, values = (np.concatenate(part) for part in zip(*pairs, strict=True))
        rows = np.repeat([row for row, _ in kept], [len(part) for part, _ in pairs])
        order = np.argsort(keys, kind="stable")
        keys, values, rows = keys[order], values[order], rows[order]
        starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1)) if len(keys) else np.zeros(0, np.int64)
        yield from grouped(keys, values, rows, starts)

    def _insert(self, parts: Iterable[Entry]) -> None:
        self._db.executemany("INSERT INTO postings VALUES (?, ?, ?, ?)", parts)

    def _read(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        """A whole list: the sealed parts, then the buffer's."""
        find = "SELECT first, rows, numbers FROM postings WHERE key = ? ORDER BY first"
        parts = [segment(*part) for part in self._db.execute(find, (key,))]
        if key in self._buffer or not parts:
            parts.append(self._buffer.get(key))
        return np.concatenate([rows for rows, _ in parts]), np.concatenate([values for _, values in parts])


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, cached_statements=32)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
    except BaseException:
        db.close()
        raise
    return db


def _lists(db: sqlite3.Connection, table: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield every sealed list as a whole."""
    parts_of = db.execute(f"SELECT key, first, rows, numbers FROM {table} ORDER BY key, first")
    for key, group in itertools.groupby(parts_of, key=lambda entry: entry[0]):
        parts = [segment(*entry[1:]) for entry in group]
        yield key, np.concatenate([rows for rows, _ in parts]), np.concatenate([values for _, values in parts])


@lru_cache(maxsize=1 << 19)
def _key(kind: str, content: str) -> int:
    """The 64-bit digest under which a term or a fact is stored."""
    text = f"{kind}:{content}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _encode(id: str) -> bytes:
    return id.encode("utf-8", "surrogatepass")


def _decode(id: bytes) -> str:
    return id.decode("utf-8", "surrogatepass")
