"""Generations of an index: their states, which of them is live, where each lies, and how far a build has come."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ultrarag.errors import IndexStateError
from ultrarag.io import write_json
from ultrarag.retrieve.passages import Store

#: building -> ready -> live -> previous -> retired; a rollback exchanges live and previous.
STATES = ("building", "ready", "live", "previous", "retired")
#: Of the table, in the order in which `Generation` has them.
COLUMNS = "id, fingerprint, state, backend, heads, precision, base_seq, applied_seq, created, forced, metrics"

#: Whose vectors a generation has, where they are not simply its own; came later than format 1, as UNENCODED did.
VECTORS = """
CREATE TABLE IF NOT EXISTS vectors (
    generation INTEGER PRIMARY KEY, vectors_of INTEGER NOT NULL, passage_fingerprint TEXT NOT NULL, mapped_from INTEGER
)
"""
#: Value of the index that says which generation went live last, and when: [id, seconds since 1970].
_LIVE_SINCE = "live_since"


@dataclass(frozen=True)
class Generation:
    """One generation, as the catalog has it; `id` is what `swap` takes."""

    id: int
    #: of its encoder
    fingerprint: str
    state: str
    #: name of the vector engine
    backend: str
    #: the heads that are stored
    heads: tuple[str, ...]
    #: fp32, bf16, fp16 or int8:CALIBRATION: what passages and queries are encoded in
    precision: str
    #: entry of the write log that its build began after
    base_seq: int
    #: last entry of the write log that its vectors durably contain
    applied_seq: int
    created: str
    #: it went live although the gate said no
    forced: bool
    #: what the gate measured
    metrics: dict[str, Any]
    #: of the passage side of its encoder: whose vectors these are
    passage_fingerprint: str
    #: the generation that made its vectors: itself, or the one whose vectors it shares
    vectors_of: int
    #: the generation whose vectors were mapped into its own; None where its passages were encoded
    mapped_from: int | None = None

    @property
    def shares(self) -> bool:
        """Its vectors are those of another generation."""
        return self.vectors_of != self.id

    @property
    def encodes(self) -> bool:
        """Its passages are, or were, encoded to build it."""
        return not self.shares and self.mapped_from is None

    def how_built(self) -> str:
        """In words, where its vectors come from."""
        if self.shares:
            return f"no passage was encoded: generation {self.id} shares the vectors of generation {self.vectors_of}"
        if self.mapped_from is not None:
            return (
                f"no stored passage was encoded: the vectors of generation {self.mapped_from} were mapped into those "
                f"of generation {self.id}"
            )
        return f"the passages were encoded for generation {self.id}"


@dataclass(frozen=True)
class Origin:
    """Where the vectors of a new generation come from."""

    #: of the passage side of its encoder; "": of an encoder with one side
    passage_fingerprint: str = ""
    #: whose vectors it shares; None: it has its own
    vectors_of: int | None = None
    #: whose vectors are mapped into its own; None: its passages are encoded
    mapped_from: int | None = None

    def is_of(self, generation: Generation) -> bool:
        """Whether a generation's vectors come from there."""
        shared = generation.vectors_of if generation.shares else None
        return (shared, generation.mapped_from) == (self.vectors_of, self.mapped_from)


class IndexLayout:
    """Where things lie below an index directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bm25 = root / "bm25"
        self.generations = root / "generations"

    def final(self, generation: int) -> Path:
        """The directory of a finished generation."""
        return self.generations / str(generation)

    def building(self, generation: int) -> Path:
        """The directory of one that is being built."""
        return self.generations / f"{generation}.tmp"

    def is_building(self, path: Path) -> bool:
        """Whether a path lies in a generation that is being built, maybe by another process."""
        below = path.relative_to(self.root).parts
        return len(below) > 1 and below[0] == self.generations.name and below[1].endswith(".tmp")

    def directory(self, generation: int) -> Path:
        """Where a generation lies now."""
        final = self.final(generation)
        return final if final.exists() else self.building(generation)

    @staticmethod
    def checkpoint(directory: Path) -> Path:
        """A generation's own copy of its encoder's checkpoint."""
        return directory / "checkpoint"

    @staticmethod
    def consent(directory: Path) -> Path:
        """The record that code which comes with the encoder may be run, and which; only where there is such code."""
        return directory / "consent.json"

    @staticmethod
    def calibration(directory: Path) -> Path:
        """The texts that a generation in int8 is calibrated on; only where its checkpoint came without int8."""
        return directory / "calibration.json"

    @staticmethod
    def vectors(directory: Path) -> Path:
        """The vector engine's directory."""
        return directory / "vectors"

    @staticmethod
    def progress(directory: Path) -> Path:
        """How far a build has come."""
        return directory / "progress.json"


@dataclass
class Progress:
    """How far the build of a generation has come, durably: its `progress.json`."""

    #: the last row of the store up to which every passage has its vectors
    row: int = 0
    #: passages up to that row
    encoded: int = 0
    #: passages after that row that have their vectors already
    ahead: int = 0
    #: last entry of the write log that the vectors contain
    applied: int = 0
    seconds: float = 0.0
    #: passages to encode in all; None before the first note
    total: int | None = None
    finished: bool = False
    #: id -> reason, of passages that have no vectors, for the encoder cannot encode them
    unencoded: dict[str, str] = field(default_factory=dict)
    #: what the way of encoding notes for itself, under names of its own
    own: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Progress | None:
        """The progress of the build in a directory, or None before its first note.

        Raises:
            IndexStateError: when the file is damaged.
        """
        path = IndexLayout.progress(directory)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            held = int(found.get("encoded", 0))
            up_to_row = int(found.pop("up_to_row", held))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise IndexStateError(f"'{path}' is damaged ({error}); delete '{directory}' and build again") from error
        names = {item.name for item in fields(cls)} - {"own"}
        own = {name: found.pop(name) for name in list(found) if name not in names}
        return cls(**{**found, "encoded": up_to_row, "ahead": held - up_to_row, "own": own})

    @property
    def held(self) -> int:
        """All passages that have their vectors."""
        return self.encoded + self.ahead

    def write(self, directory: Path) -> None:
        """Replace the file; `encoded` there is all that is held, for whoever asks how far the build is."""
        note = {**asdict(self), "encoded": self.held, **self.own}
        del note["own"], note["ahead"]
        if self.ahead:
            note["up_to_row"] = self.encoded
        write_json(IndexLayout.progress(directory), note)


class Catalog:
    """The table of generations."""

    def __init__(self, store: Store) -> None:
        self._database = store.database

    def add(
        self,
        fingerprint: str,
        backend: str,
        heads: Sequence[str],
        precision: str,
        state: str,
        base_seq: int,
        origin: Origin = Origin(),
    ) -> Generation:
        """Enter a new generation; one that shares vectors has applied what they have."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        values = (fingerprint, state, backend, json.dumps(list(heads)), precision, base_seq, base_seq, created)
        passages = origin.passage_fingerprint or fingerprint
        with self._database.transaction() as db:
            found = db.execute(
                "INSERT INTO generations (fingerprint, state, backend, heads, precision, base_seq, applied_seq, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
            id = found.lastrowid
            assert id is not None
            if origin != Origin() or passages != fingerprint:
                note_vectors(db, id, origin.vectors_of or id, passages, origin.mapped_from)
            if origin.vectors_of is not None:
                held = (origin.vectors_of, origin.vectors_of, id)
                applied = (
                    "SELECT max(applied_seq) FROM generations WHERE id = ? OR id IN "
                    "(SELECT generation FROM vectors WHERE vectors_of = ? AND generation != ?)"
                )
                db.execute(f"UPDATE generations SET applied_seq = ({applied}) WHERE id = ?", (*held, id))
        return self.get(id)

    def all(self) -> list[Generation]:
        """Every generation, the oldest first."""
        with self._database.reading() as db:
            return self.read(db)

    @staticmethod
    def read(db: sqlite3.Connection) -> list[Generation]:
        """Every generation, as a transaction sees them."""
        there = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'vectors'").fetchone()
        noted = {id: rest for id, *rest in db.execute("SELECT * FROM vectors").fetchall()} if there else {}
        rows = db.execute(f"SELECT {COLUMNS} FROM generations ORDER BY id").fetchall()
        return [_generation(row, noted.get(row[0])) for row in rows]

    def get(self, id: int) -> Generation:
        """One generation; IndexStateError names those that exist."""
        known = self.all()
        for generation in known:
            if generation.id == id:
                return generation
        names = ", ".join(f"{g.id} ({g.state})" for g in known)
        raise IndexStateError(f"the index has no generation {id!r}; it has {names}")

    def in_state(self, state: str) -> list[Generation]:
        """The generations in a state, the oldest first."""
        return [generation for generation in self.all() if generation.state == state]

    def live(self) -> Generation:
        """The one that answers searches."""
        found = self.in_state("live")
        if len(found) != 1:
            raise IndexStateError(f"'{self._database.path}' names {len(found)} live generations instead of one")
        return found[0]

    def live_since(self) -> float | None:
        """When the live generation went live, in seconds since 1970; None where an earlier version did it."""
        with self._database.reading() as db:
            live = db.execute("SELECT id FROM generations WHERE state = 'live'").fetchone()
            noted = db.execute("SELECT value FROM meta WHERE name = ?", (_LIVE_SINCE,)).fetchone()
        id, since = json.loads(noted[0]) if noted else (None, None)
        return since if live and live[0] == id else None

    def set_state(self, id: int, state: str, only_from: Sequence[str]) -> bool:
        """Move a generation on, in one step, if it is in one of some states; return whether it was."""
        marks = ", ".join("?" for _ in only_from)
        with self._database.transaction() as db:
            statement = f"UPDATE generations SET state = ? WHERE id = ? AND state IN ({marks})"
            return bool(db.execute(statement, (state, id, *only_from)).rowcount)

    def set_applied(self, vectors_of: int, seq: int) -> None:
        """Note that the vectors of a generation durably contain the log up to `seq`; so do all that share them."""
        with self._database.transaction() as db:
            db.execute(VECTORS)
            db.execute(
                "UPDATE generations SET applied_seq = max(applied_seq, ?) WHERE id = ? OR id IN "
                "(SELECT generation FROM vectors WHERE vectors_of = ?)",
                (seq, vectors_of, vectors_of),
            )

    def flip(self, id: int, forced: bool = False, metrics: dict[str, Any] | None = None) -> None:
        """Make a generation the live one, and the live one the previous, in one transaction."""
        with self._database.transaction() as db:
            db.execute("UPDATE generations SET state = 'retired' WHERE state = 'previous' AND id != ?", (id,))
            # no two 'previous' meanwhile
            found = db.execute("UPDATE generations SET state = 'ready' WHERE id = ? AND state != 'retired'", (id,))
            if not found.rowcount:
                raise IndexStateError(f"generation {id} was discarded meanwhile; the live one stays")
            db.execute("UPDATE generations SET state = 'previous' WHERE state = 'live'")
            db.execute("UPDATE generations SET state = 'live' WHERE id = ?", (id,))
            note_live(db, id)
            if metrics is not None or forced:
                values = (int(forced), json.dumps(metrics or {}), id)
                db.execute("UPDATE generations SET forced = ?, metrics = ? WHERE id = ?", values)


def note_live(db: sqlite3.Connection, id: int) -> None:
    """Enter that a generation goes live now."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_LIVE_SINCE, json.dumps([id, time.time()])))


def note_vectors(
    db: sqlite3.Connection, id: int, vectors_of: int, passage_fingerprint: str, mapped_from: int | None
) -> None:
    """Enter whose vectors a generation has."""
    db.execute(VECTORS)
    values = (id, vectors_of, passage_fingerprint, mapped_from)
    db.execute("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)", values)


def _generation(row: Sequence[Any], noted: Sequence[Any] | None) -> Generation:
    id, fingerprint, state, backend, heads, precision, base, applied, created, forced, metrics = row
    vectors_of, passages, mapped_from = noted or (id, fingerprint, None)
    return Generation(
        id,
        fingerprint,
        state,
        backend,
        tuple(json.loads(heads)),
        precision,
        base,
        applied,
        created,
        bool(forced),
        json.loads(metrics),
        passages,
        vectors_of,
        mapped_from,
    )
