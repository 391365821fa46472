"""Generations of an index: their states, which of them is live, where each lies, and how far a build has come."""

from __future__ import annotations

import json
import sqlite3
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
    #: fp32, bf16 or fp16: what passages and queries are encoded in
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
        self, fingerprint: str, backend: str, heads: Sequence[str], precision: str, state: str, base_seq: int
    ) -> Generation:
        """Enter a new generation."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        values = (fingerprint, state, backend, json.dumps(list(heads)), precision, base_seq, base_seq, created)
        with self._database.transaction() as db:
            found = db.execute(
                "INSERT INTO generations (fingerprint, state, backend, heads, precision, base_seq, applied_seq, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
            id = found.lastrowid
        assert id is not None
        return self.get(id)

    def all(self) -> list[Generation]:
        """Every generation, the oldest first."""
        with self._database.reading() as db:
            return self.read(db)

    @staticmethod
    def read(db: sqlite3.Connection) -> list[Generation]:
        """Every generation, as a transaction sees them."""
        return [_generation(row) for row in db.execute(f"SELECT {COLUMNS} FROM generations ORDER BY id").fetchall()]

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

    def set_state(self, id: int, state: str, only_from: Sequence[str]) -> bool:
        """Move a generation on, in one step, if it is in one of some states; return whether it was."""
        marks = ", ".join("?" for _ in only_from)
        with self._database.transaction() as db:
            statement = f"UPDATE generations SET state = ? WHERE id = ? AND state IN ({marks})"
            return bool(db.execute(statement, (state, id, *only_from)).rowcount)

    def set_applied(self, id: int, seq: int) -> None:
        """Note that a generation's vectors durably contain the log up to `seq`."""
        with self._database.transaction() as db:
            db.execute("UPDATE generations SET applied_seq = max(applied_seq, ?) WHERE id = ?", (seq, id))

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
            if metrics is not None or forced:
                values = (int(forced), json.dumps(metrics or {}), id)
                db.execute("UPDATE generations SET forced = ?, metrics = ? WHERE id = ?", values)


def _generation(row: Sequence[Any]) -> Generation:
    id, fingerprint, state, backend, heads, precision, base, applied, created, forced, metrics = row
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
    )
