"""The source of truth of an index: its passages, and the ordered log of every write to them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from ultrarag.errors import ExistsError, IndexStateError
from ultrarag.retrieve.passages.database import UNENCODED, Database, counted
from ultrarag.retrieve.passages.files import Record, content_hash
from ultrarag.types import Passage

#: What becomes of a passage whose id is there already.
OnExisting = Literal["replace", "skip", "fail"]
DATABASE_FILE = "passages.sqlite"
#: The named value that says which shared index a store mirrors.
URI = "shared_uri"
#: Ids asked for in one statement; SQLite takes 32,766 variables.
_VARIABLES = 5000


@dataclass(frozen=True)
class Written:
    """What a call of `add` did."""

    added: int = 0
    #: another text or title: encoded anew
    changed: int = 0
    #: only the metadata is new: nothing was encoded
    metadata: int = 0
    unchanged: int = 0

    def __add__(self, other: Written) -> Written:
        return Written(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Changes:
    """A part of the write log, reduced to what each passage is now."""

    #: the last entry that is covered
    seq: int
    #: passages whose text may be new
    content: list[Passage]
    #: passages of which only the metadata is new
    metadata: list[Passage]
    deleted: list[str]


class Store:
    """Passages and write log in one SQLite file; what a write returned for survives a crash of the machine."""

    def __init__(self, database: Database) -> None:
        self.database = database
        #: what `changes` returned last, and to which question, up to which entry of the log: words and vectors both ask
        self._changes: tuple[tuple[int, int, int], Changes] | None = None

    @classmethod
    def create(cls, directory: Path) -> Store:
        """Create an empty store in a directory."""
        return cls(Database.create(directory / DATABASE_FILE))

    @classmethod
    def open(cls, directory: Path, read_only: bool = False) -> Store:
        """Open the store of an index."""
        return cls(Database.open(directory / DATABASE_FILE, read_only))

    def write(self, records: Iterable[Record], on_existing: OnExisting = "replace") -> Written:
        """Insert passages in one transaction, and do with those that exist what is asked.

        Of an id twice, the last wins; the first with "skip", and neither with "fail".

        Raises:
            ExistsError: with "fail", when one exists; nothing is written then.
        """
        wanted: dict[str, Record] = {}
        for record in records:
            if record.id in wanted and on_existing == "fail":
                raise ExistsError(f"passage {record.id!r} is twice in one call, which adds passages that are new")
            if record.id not in wanted or on_existing == "replace":
                wanted[record.id] = record
        with self.database.transaction() as db:
            held = _held(db, list(wanted))
            there = [id for id, (*_, deleted) in held.items() if not deleted]
            if there and on_existing == "fail":
                raise ExistsError(
                    f"{len(there)} of {len(wanted)} passages exist already, such as {there[0]!r}; nothing was added "
                    f"(on_existing='replace' or 'skip' adds the others)"
                )
            if on_existing == "skip":
                for id in there:
                    del wanted[id]
            ops = {id: _operation(record, held.get(id)) for id, record in wanted.items()}
            first = _last_seq(db) + 1
            log = [(wanted[id], op) for id, op in ops.items() if op in ("added", "changed", "metadata")]
            _write(db, log, first)
        found = list(ops.values())
        written = Written(*(found.count(name) for name in vars(Written())))
        if on_existing == "skip":
            written += Written(unchanged=len(there))
        return written

    def delete(self, ids: Iterable[str]) -> int:
        """Delete passages in one transaction; return how many there were."""
        with self.database.transaction() as db:
            return delete_rows(db, list(dict.fromkeys(ids)))

    def get(self, ids: Sequence[str]) -> dict[str, Passage]:
        """Return the passages that exist of these ids; IndexStateError names one whose text is damaged."""
        found = {}
        with self.database.reading() as db:
            for chunk in _chunks(ids, _VARIABLES):
                marks = ",".join("?" * len(chunk))
                query = f"SELECT id, text, title, metadata, hash FROM passages WHERE id IN ({marks}) AND deleted = 0"
                for row in db.execute(query, chunk).fetchall():
                    found[row[0]] = self.passage(*row)
        return found

    def of_document(self, name: str) -> Iterator[Passage]:
        """Yield the passages whose ids are of the form NAME#3."""
        with self.database.reading() as db:
            query = "SELECT id, text, title, metadata, hash FROM passages WHERE id > ? AND id < ? AND deleted = 0"
            rows = db.execute(query, (f"{name}#", f"{name}$")).fetchall()  # '$' is what comes after '#'
        yield from (self.passage(*row) for row in rows)

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Return those of these ids that are passages; their texts are not read."""
        found: set[str] = set()
        with self.database.reading() as db:
            for chunk in _chunks(ids, _VARIABLES):
                marks = ",".join("?" * len(chunk))
                query = f"SELECT id FROM passages WHERE id IN ({marks}) AND deleted = 0"
                found.update(id for (id,) in db.execute(query, chunk))
        return found

    def count(self) -> int:
        """The number of passages; it is kept, not counted."""
        with self.database.reading() as db:
            return counted(db)

    def last_seq(self) -> int:
        """The number of the last write."""
        with self.database.reading() as db:
            return _last_seq(db)

    def last_row(self) -> int:
        """The highest row number; 0 where there is no passage."""
        with self.database.reading() as db:
            return int(db.execute("SELECT coalesce(max(row), 0) FROM passages").fetchone()[0])

    def changes(self, after: int, limit: int) -> Changes | None:
        """Return what the next `limit` entries of the log did, or None when there are none."""
        with self.database.reading() as db:
            asked = after, limit, _last_seq(db)
            if (known := self._changes) is not None and known[0] == asked:
                return known[1]
            entries = db.execute(
                "SELECT seq, id, op FROM log WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)
            ).fetchall()
        if not entries:
            return None
        ops: dict[str, set[str]] = {}
        for _, id, op in entries:
            ops.setdefault(id, set()).add(op)
        passages = self.get(list(ops))
        only_metadata = {id for id, seen in ops.items() if seen == {"metadata"}}
        found = Changes(
            seq=entries[-1][0],
            content=[passage for id, passage in passages.items() if id not in only_metadata],
            metadata=[passage for id, passage in passages.items() if id in only_metadata],
            deleted=[id for id in ops if id not in passages],
        )
        self._changes = asked, found
        return found

    def scan(self, after_row: int = 0, limit: int = 1000, up_to_seq: int | None = None) -> list[tuple[int, Passage]]:
        """Return the next passages and their row numbers, in the order in which ids were first added.

        Args:
            up_to_seq: leave out what was written after this entry of the log.
        """
        query = (
            "SELECT row, id, text, title, metadata, hash FROM passages "
            "WHERE row > ? AND deleted = 0 AND seq <= ? ORDER BY row LIMIT ?"
        )
        with self.database.reading() as db:
            rows = db.execute(query, (after_row, 1 << 62 if up_to_seq is None else up_to_seq, limit)).fetchall()
        return [(row, self.passage(*rest)) for row, *rest in rows]

    def passages(self) -> Iterator[Passage]:
        """Iterate over all passages, in the order in which they were first added; writes may go on."""
        row = 0
        while chunk := self.scan(row):
            yield from (passage for _, passage in chunk)
            row = chunk[-1][0]

    def sample(self, size: int, up_to_seq: int) -> list[Passage]:
        """Return up to `size` passages written up to an entry of the log, spread evenly, the same ones each time."""
        last = self.last_row()
        step = max(1, last // size)
        found = {passage.id: passage for row in range(0, last, step) for _, passage in self.scan(row, 1, up_to_seq)}
        return list(found.values())[:size]

    def get_meta(self, name: str, default: str = "") -> str:
        """Return a named value."""
        with self.database.reading() as db:
            row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else default

    def set_meta(self, **values: str) -> None:
        """Set named values durably."""
        with self.database.transaction() as db:
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))

    def unencoded(self, generation: int) -> dict[str, str]:
        """Id -> reason, of the passages that have no vectors in a generation because they cannot be encoded."""
        query = (
            "SELECT u.id, u.reason FROM unencoded u JOIN passages p ON p.id = u.id AND p.deleted = 0 "
            "WHERE u.generation = ? ORDER BY p.row"
        )
        with self.database.reading() as db:
            there = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'unencoded'").fetchone()
            return dict(db.execute(query, (generation,)).fetchall()) if there else {}

    def note_unencoded(self, generation: int, failed: Mapping[str, str], cured: Iterable[str] = ()) -> None:
        """Enter passages that cannot be encoded, and strike out those that can."""
        with self.database.transaction() as db:
            db.execute(UNENCODED)
            db.executemany("DELETE FROM unencoded WHERE generation = ? AND id = ?", [(generation, id) for id in cured])
            rows = [(generation, id, reason) for id, reason in failed.items()]
            db.executemany("INSERT OR REPLACE INTO unencoded VALUES (?, ?, ?)", rows)

    def forget(self, up_to_seq: int) -> None:
        """Drop log entries and tombstones that every generation has applied, and shrink the file."""
        with self.database.transaction() as db:
            db.execute("DELETE FROM log WHERE seq <= ?", (up_to_seq,))
            db.execute("DELETE FROM passages WHERE deleted = 1 AND seq <= ?", (up_to_seq,))
        self.database.vacuum()

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def passage(self, id: str, text: str, title: str, metadata: str, hash: bytes) -> Passage:
        """Make a passage of its columns; IndexStateError when its text is not what was written."""
        passage = Passage(id, text, title, json.loads(metadata))
        if content_hash(passage.content) != hash:
            raise IndexStateError(
                f"'{self.database.path}' is damaged: the text of passage {id!r} is not what was written (checksum); "
                f"add it again, or restore the file from a copy"
            )
        return passage


def _held(db: sqlite3.Connection, ids: Sequence[str]) -> dict[str, tuple[bytes, str, str, int]]:
    """What the store holds of these ids: hash, title, metadata, and whether it is deleted."""
    found = {}
    for chunk in _chunks(ids, _VARIABLES):
        marks = ",".join("?" * len(chunk))
        query = f"SELECT id, hash, title, metadata, deleted FROM passages WHERE id IN ({marks})"
        for id, *rest in db.execute(query, chunk):
            found[id] = tuple(rest)
    return found


def _operation(record: Record, held: tuple[bytes, str, str, int] | None) -> str:
    """Name what storing a record does, in the terms of `Written`."""
    if held is None or held[3]:
        return "added"
    if held[0] != record.hash:
        return "changed"
    return "unchanged" if held[1:3] == (record.title, record.metadata) else "metadata"


def _write(db: sqlite3.Connection, log: list[tuple[Record, str]], first: int) -> None:
    """Store records and log them under consecutive numbers; a change of metadata leaves the content's number."""
    full = [(r.id, r.text, r.title, r.metadata, r.hash, first + n) for n, (r, op) in enumerate(log) if op != "metadata"]
    db.executemany(
        "INSERT INTO passages (id, text, title, metadata, hash, seq) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET text = excluded.text, title = excluded.title, metadata = excluded.metadata, "
        "hash = excluded.hash, seq = excluded.seq, deleted = 0",
        full,
    )
    light = [(r.text, r.title, r.metadata, r.id) for r, op in log if op == "metadata"]
    db.executemany("UPDATE passages SET text = ?, title = ?, metadata = ? WHERE id = ?", light)
    entries = [
        (first + n, r.id, "metadata" if op == "metadata" else "content", r.hash) for n, (r, op) in enumerate(log)
    ]
    db.executemany("INSERT INTO log VALUES (?, ?, ?, ?)", entries)


def delete_rows(db: sqlite3.Connection, ids: Sequence[str]) -> int:
    """Delete passages, and log it; return how many there were."""
    gone = [id for id, (*_, deleted) in _held(db, ids).items() if not deleted]
    entries = [(_last_seq(db) + n, id) for n, id in enumerate(gone, 1)]
    db.executemany(
        "UPDATE passages SET text = '', title = '', metadata = '{}', hash = x'', seq = ?, deleted = 1 WHERE id = ?",
        entries,
    )
    db.executemany("INSERT INTO log VALUES (?, ?, 'delete', x'')", entries)
    return len(gone)


def log_metadata(db: sqlite3.Connection, changed: Sequence[tuple[str, str, bytes]]) -> None:
    """Give passages other metadata, and log it: (id, metadata as JSON, hash of the text) each."""
    first = _last_seq(db) + 1
    db.executemany("UPDATE passages SET metadata = ? WHERE id = ?", [(text, id) for id, text, _ in changed])
    entries = [(first + n, id, hash) for n, (id, _, hash) in enumerate(changed)]
    db.executemany("INSERT INTO log VALUES (?, ?, 'metadata', ?)", entries)


def _last_seq(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'log'").fetchone()
    return int(row[0]) if row else 0


def _chunks(items: Sequence[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
