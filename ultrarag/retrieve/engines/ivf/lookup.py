"""Which rows of a table hold a key, an id or a fact: sorted runs in files, and a short list in memory.

A key is known by 64 bits of its digest: whoever asks for an id compares the id itself, and of 60 million facts one
meets a fact that was asked for with a chance of 3 in 10^12.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ultrarag.io import replacing

#: Rows whose keys are kept in memory until they become a run.
TAIL_ROWS = 16_384
#: Rows of a run from which on it is not joined with others: to join is to have all entries in memory four times over,
#: which of ten million rows with a dozen facts is six gigabytes.
MOST_ROWS = 1 << 20
_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float64))


@lru_cache(maxsize=1 << 16)
def digest(key: str) -> int:
    """64 bits that stand for a key."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Run:
    """The keys of the rows from `first` up to `last`: distinct digests, ascending, and the entries of each."""

    first: int
    last: int
    #: (keys,) uint64
    keys: np.ndarray
    #: (keys + 1,) int64: where the entries of each key begin
    starts: np.ndarray
    #: (entries,) float64
    values: np.ndarray
    #: (entries,) int32
    rows: np.ndarray

    @staticmethod
    def of(first: int, last: int, keys: np.ndarray, rows: np.ndarray, values: np.ndarray) -> Run:
        """A run of entries in any order of their keys."""
        order = np.argsort(keys, kind="stable")
        distinct, starts = np.unique(keys[order], return_index=True)
        return Run(first, last, distinct, np.append(starts, len(keys)).astype(np.int64), values[order], rows[order])

    def joined(self, other: Run) -> Run:
        """One run of this one and the one that follows."""
        keys = np.concatenate([np.repeat(run.keys, np.diff(run.starts)) for run in (self, other)])
        rows, values = np.concatenate([self.rows, other.rows]), np.concatenate([self.values, other.values])
        return Run.of(self.first, other.last, keys, rows, values)

    def get(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        place = int(np.searchsorted(self.keys, np.uint64(key)))
        if place == len(self.keys) or int(self.keys[place]) != key:
            return _NOTHING
        held = slice(int(self.starts[place]), int(self.starts[place + 1]))
        return self.rows[held], self.values[held]

    def write(self, path: Path) -> None:
        """Write to a file that `read` takes."""
        with replacing(path) as file:
            file.write(np.array([len(self.keys), len(self.rows)], np.int64).tobytes())
            for part in (self.keys, self.starts, self.values, self.rows):
                file.write(np.ascontiguousarray(part).data)

    @staticmethod
    def read(path: Path, first: int, last: int) -> Run:
        """Map what `write` wrote."""
        held = np.memmap(path, np.uint8, "r")
        keys, entries = held[:16].view(np.int64).tolist()
        parts, place = [], 16
        for count, kind in ((keys, np.uint64), (keys + 1, np.int64), (entries, np.float64), (entries, np.int32)):
            size = count * np.dtype(kind).itemsize
            parts.append(held[place : place + size].view(kind))
            place += size
        return Run(first, last, *parts)


class Lookup:
    """Rows by key, of a table that grows."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """Runs lie in `folder`, in files whose names begin with `prefix`."""
        self._folder, self._prefix = folder, prefix
        self.runs: list[Run] = []
        self._clear_tail(0)

    def load(self, runs: Sequence[Sequence[int]]) -> int:
        """Map runs that were written, by their first and last rows; return the row up to which they go."""
        self.runs = [Run.read(self.path(first, last), first, last) for first, last in runs]
        self._clear_tail(self.runs[-1].last if self.runs else 0)
        return self._first

    def path(self, first: int, last: int) -> Path:
        """Where the run of these rows lies."""
        return self._folder / f"{self._prefix}{first}-{last}"

    def add(self, row: int, entries: Sequence[tuple[str, float]]) -> None:
        """Note what a row holds; rows come in ascending order."""
        for key, value in entries:
            number, place = digest(key), len(self._keys)
            if (places := self._places.get(number)) is None:
                self._places[number] = [place]
            else:
                places.append(place)
            self._keys.append(number)
            self._rows.append(row)
            self._values.append(value)

    def freeze(self, rows: int) -> None:
        """Make a run of the keys in memory, where they are of many rows; `rows` are those of the table.

        An error of the disk leaves everything as it was.
        """
        if rows - self._first < TAIL_ROWS:
            return
        keys, held = np.array(self._keys, np.uint64), np.array(self._rows, np.int32)
        run, kept = Run.of(self._first, rows, keys, held, np.array(self._values, np.float64)), list(self.runs)
        while kept and len(run.rows) * 2 > len(kept[-1].rows) and rows - kept[-1].first <= MOST_ROWS:
            run = kept.pop().joined(run)
        path = self.path(run.first, run.last)
        run.write(path)
        self.runs = [*kept, Run.read(path, run.first, run.last)]
        self._clear_tail(rows)

    def get(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The rows that hold a key, int32, and the number stored with each, float64."""
        number = digest(key)
        found = [run.get(number) for run in self.runs]
        if places := self._places.get(number):
            rows, values = ([held[place] for place in places] for held in (self._rows, self._values))
            found.append((np.array(rows, np.int32), np.array(values, np.float64)))
        if not found:
            return _NOTHING
        return np.concatenate([rows for rows, _ in found]), np.concatenate([values for _, values in found])

    def candidates(self, keys: Sequence[str]) -> list[list[int]]:
        """For each key the rows that may hold it, newest first."""
        numbers = np.array([digest(key) for key in keys], np.uint64)
        order = np.argsort(numbers)  # neighbours in a run are looked up one after the other
        ordered = numbers[order]
        found: list[list[int]] = [[] for _ in keys]
        for run in self.runs:
            places = np.searchsorted(run.keys, ordered)
            held = np.flatnonzero(run.keys[np.minimum(places, len(run.keys) - 1)] == ordered)
            for at in held[places[held] < len(run.keys)].tolist():
                rows = run.rows[run.starts[places[at]] : run.starts[places[at] + 1]]
                found[int(order[at])].extend(rows.tolist())
        for asked, number in enumerate(numbers.tolist()):
            found[asked].extend(self._rows[place] for place in self._places.get(number, ()))
            found[asked].reverse()
        return found

    def _clear_tail(self, first: int) -> None:
        self._first = first
        self._places: dict[int, list[int]] = {}
        self._keys, self._rows, self._values = array("Q"), array("i"), array("d")
