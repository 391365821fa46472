"""The rows of the engine: files that only grow, so that a flush costs what is new, and a crash leaves what was flushed.

A passage that is written again gets a new row, and its old row dies. What a file holds beyond the sizes in the manifest
was not flushed: the next owner cuts it off, and whoever writes the log of all changes writes it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.retrieve.engines.ivf.growing import Growing
from ultrarag.retrieve.engines.ivf.lookup import Lookup
from ultrarag.retrieve.engines.ivf.postings import Postings
from ultrarag.retrieve.engines.ivf.weights import Row, Weights

#: Facts of a passage, as `ultrarag.retrieve.search.facts` gives them.
Facts = Sequence[tuple[str, float]]
#: Rows read at a time.
BLOCK_ROWS = 8192
#: Up to so many rows vectors are read where they are mapped; of more they are copied, at 1.4 microseconds a row and up:
#: what a process has mapped counts as its memory, 1,400 bytes a passage after 1,200 searches of a million.
MAPPED_ROWS = 65_536
#: Before an id, so that it is no fact: those begin with another character.
_ID = "\0"
_ENCODE, _DECODE = json.JSONEncoder(separators=(",", ":")).encode, json.JSONDecoder().raw_decode


def new_state(number: int, lexical: bool) -> dict[str, Any]:
    """What describes an empty table, for `Table`; with lexical weights or without."""
    return {"number": number, "pairs": 0} if lexical else {"number": number}


class Table:
    """Vectors, ids, facts and lexical weights by row."""

    def __init__(self, folder: Path, dim: int, state: dict[str, Any], read_only: bool = False) -> None:
        """Open what `state` described, or begin anew under its number."""
        self.folder, self.dim, self.number = folder, dim, int(state["number"])
        rows, name = int(state.get("rows", 0)), f"-{self.number}"
        #: the largest length of a vector, also of dead ones
        self.norm = float(state.get("norm", 0.0))
        #: lexical weights, where the state counts any pairs, or none
        self.weights: Weights | None = None
        #: of the first of their rows, in parts
        self.postings: list[Postings] = []
        self._files: list[Growing] = []
        self._bits: np.ndarray | None = None
        try:
            for kind, size in (
                ("vectors", rows * dim * 4),
                ("passages", int(state.get("text", 0))),
                ("ends", rows * 8),
                ("dead", int(state.get("dead", 0)) * 4),
            ):
                self._files.append(Growing(folder / f"{kind}{name}", size, read_only))
            self._vectors, self._text, self._ends, self._dead = self._files
            if "pairs" in state:
                self.weights = Weights(folder, self.number, state, read_only)
                self._files += self.weights.files()
                self.postings = [Postings.read(self.postings_path(*held), *held) for held in state.get("postings", [])]
            self.lookup = Lookup(folder, f"run{name}-")
            self._alive = np.ones(rows, bool)
            self._map()
            self._alive[self._dead.array(np.int32)] = False
            self._note(self.lookup.load(state.get("runs", [])))
        except BaseException:
            self.close()
            raise

    @property
    def rows(self) -> int:
        """Rows written, dead ones as well."""
        return len(self.ends)

    @property
    def count(self) -> int:
        """Rows that live."""
        return self.rows - self._dead.size // 4

    def state(self) -> dict[str, Any]:
        """What the manifest says of it."""
        held = {
            "number": self.number,
            "rows": self.rows,
            "text": self._text.size,
            "dead": self._dead.size // 4,
            "norm": self.norm,
            "runs": [[run.first, run.last] for run in self.lookup.runs],
        }
        if self.weights is None:
            return held
        parts = [[part.first, part.last] for part in self.postings]
        return {**held, "pairs": self.weights.count, "heaviest": self.weights.heaviest, "postings": parts}

    def files(self) -> list[Path]:
        """All its files."""
        return [
            *(file.path for file in self._files),
            *(self.lookup.path(run.first, run.last) for run in self.lookup.runs),
            *(self.postings_path(part.first, part.last) for part in self.postings),
        ]

    def postings_path(self, first: int, last: int) -> Path:
        """Where the postings of these rows lie."""
        return self.folder / f"postings-{self.number}-{first}-{last}"

    def append(
        self,
        ids: Sequence[str],
        facts: Sequence[Facts],
        vectors: np.ndarray,
        instead_of: Sequence[int] = (),
        lexical: Sequence[Row] = (),
    ) -> None:
        """Add rows, and let those die that they replace; an error of the disk leaves the table as it was.

        Args:
            lexical: weights of each row, where the table keeps them.
        """
        if not ids:
            return
        lines = [_ENCODE([id, found]).encode() for id, found in zip(ids, facts, strict=True)]
        ends = np.cumsum([len(line) for line in lines], dtype=np.int64) + self._text.size
        vectors, dead = np.ascontiguousarray(vectors, np.float32), np.array(instead_of, np.int32)
        contents = [vectors.data if vectors.size else b"", b"".join(lines), ends.data, dead.data if dead.size else b""]
        if self.weights is not None:
            contents += self.weights.contents(lexical)
        sizes = [file.write(content) for file, content in zip(self._files, contents, strict=True)]
        first = self.rows
        for file, size in zip(self._files, sizes, strict=True):
            file.size = size
        self._map()
        self._alive[dead], self._bits = False, None
        if self.weights is not None:
            self.weights.added(lexical)
        if vectors.size:
            self.norm = max(self.norm, float(np.linalg.norm(vectors.astype(np.float64), axis=1).max()))
        for row, (id, found) in enumerate(zip(ids, facts, strict=True), first):
            self.lookup.add(row, [(_ID + id, 1.0), *found])
        self.lookup.freeze(self.rows)

    def bury(self, rows: Sequence[int]) -> None:
        """Let living rows die."""
        if len(rows):
            held = np.array(rows, np.int32)
            self._dead.size = self._dead.write(held.data)
            self._alive[held], self._bits = False, None

    def alive(self) -> np.ndarray:
        """Which rows live, (rows,) bool."""
        return self._alive[: self.rows]

    def alive_bits(self) -> np.ndarray:
        """The same in bits, eight rows a byte, the first of them the lowest; made once after a write."""
        if self._bits is None:
            self._bits = np.packbits(self.alive(), bitorder="little")
        return self._bits

    def find(self, ids: Sequence[str]) -> list[int]:
        """The living row of each id, -1 where there is none."""
        found = self.lookup.candidates([_ID + id for id in ids])
        return [
            next((row for row in rows if self._alive[row] and self.id_of(row) == id), -1)
            for id, rows in zip(ids, found, strict=True)
        ]

    def id_of(self, row: int) -> str:
        """The id of a row, which is the first thing in its text."""
        return str(_DECODE(self._text_of(row).decode(), len("["))[0])

    def facts_of(self, row: int) -> Facts:
        """The facts of a row."""
        return [(fact, value) for fact, value in self._passage(row)[1]]

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of some rows, (len(rows), dim) float32."""
        if not self.dim:
            return np.zeros((len(rows), 0), np.float32)
        if self.rows <= MAPPED_ROWS:
            return self.vectors[rows]
        handle, size = self._vectors.handle, self.dim * 4
        content = b"".join([os.pread(handle, size, row * size) for row in np.asarray(rows).tolist()])
        return np.frombuffer(content, np.float32).reshape(-1, self.dim)

    def blocks(self, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors from a row on, with the first row of each block."""
        for start in range(first, self.rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.rows)
            if self.rows <= MAPPED_ROWS:
                yield start, self.vectors[start:stop]
            else:
                content = self._vectors.read(start * self.dim * 4, (stop - start) * self.dim * 4)
                yield start, np.frombuffer(content, np.float32).reshape(-1, self.dim)

    def rewritten(self) -> Table:
        """A table of the next number with the living rows; an error of the disk leaves none."""
        table = Table(self.folder, self.dim, new_state(self.number + 1, self.weights is not None))
        try:
            alive = np.flatnonzero(self.alive())
            for start in range(0, len(alive), BLOCK_ROWS):
                rows = alive[start : start + BLOCK_ROWS]
                ids, found = [self.id_of(row) for row in rows], [self.facts_of(row) for row in rows]
                lexical = () if self.weights is None else self.weights.rows(rows)
                table.append(ids, found, self.vectors_of(rows), lexical=lexical)
        except BaseException:
            table.close()
            raise
        return table

    def sync(self) -> None:
        """Make everything so far survive a power cut."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Let go of the files; closing twice is harmless."""
        for file in self._files:
            file.close()

    def _passage(self, row: int) -> Any:
        return json.loads(self._text_of(row))

    def _text_of(self, row: int) -> bytes:
        start = int(self.ends[row - 1]) if row else 0
        return self._text.read(start, int(self.ends[row]) - start)

    def _map(self) -> None:
        #: (rows, dim) float32, of the file
        self.vectors = self._vectors.array(np.float32, self.dim) if self.dim else np.zeros((0, 0), np.float32)
        #: (rows,) int64, of the file
        self.ends = self._ends.array(np.int64)
        if self.weights is not None:
            self.weights.map()
        if len(self._alive) < len(self.ends):
            room = max(len(self.ends), 2 * len(self._alive)) - len(self._alive)
            self._alive = np.concatenate([self._alive, np.ones(room, bool)])

    def _note(self, first: int) -> None:
        """Enter the keys of the rows that no run holds yet."""
        for row in range(first, self.rows):
            id, found = self._passage(row)
            self.lookup.add(row, [(_ID + id, 1.0), *found])
