"""The binary layout of BM25's inverted lists: 16-bit distances from a first row, and a number with each.

Numbers are term frequencies, or values of metadata for ranges: nothing is stored where all are 1, 16 bits each
where they are small integers, doubles otherwise.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import TypeAlias

import numpy as np

#: Rows that one entry may span.
SEGMENT_ROWS = 1 << 16
#: A frequency above this counts as this.
MOST_FREQUENT = (1 << 16) - 1
#: (key, first row, distances from it, numbers)
Entry: TypeAlias = "tuple[object, int, bytes, bytes]"


def grouped(keys: np.ndarray, values: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> Iterator[Entry]:
    """Cut arrays sorted by key into one entry per key, `starts` being where each begins."""
    if not len(starts):
        return
    ends = np.append(starts[1:], len(keys))
    distances = (rows - np.repeat(rows[starts], ends - starts)).astype("<u2").tobytes()
    short, long = values.clip(0, MOST_FREQUENT).astype("<u2").tobytes(), values.astype("<f8").tobytes()
    all_ones = np.logical_and.reduceat(values == 1, starts)
    all_short = np.logical_and.reduceat(_short(values), starts)
    columns = (keys[starts], rows[starts], starts, ends, all_ones, all_short)
    for key, first, a, b, ones, fits in zip(*(column.tolist() for column in columns), strict=True):
        numbers = b"" if ones else short[2 * a : 2 * b] if fits else long[8 * a : 8 * b]
        yield key, first, distances[2 * a : 2 * b], numbers


def entries(key: object, rows: np.ndarray, numbers: np.ndarray) -> Iterator[Entry]:
    """Cut one list where its rows no longer fit 16 bits."""
    while len(rows):
        first = int(rows[0])
        end = int(np.searchsorted(rows, first + SEGMENT_ROWS)) if rows[-1] >= first + SEGMENT_ROWS else len(rows)
        yield key, first, (rows[:end] - first).astype("<u2").tobytes(), _pack(numbers[:end])
        rows, numbers = rows[end:], numbers[end:]


def segment(first: int, rows: bytes, numbers: bytes) -> tuple[np.ndarray, np.ndarray]:
    distances = np.frombuffer(rows, "<u2")
    if not numbers:
        values = np.ones(len(distances), np.float32)
    else:
        values = np.frombuffer(numbers, "<u2" if len(numbers) == len(rows) else "<f8")
    return distances.astype(np.int32) + np.int32(first), values


def _pack(numbers: np.ndarray) -> bytes:
    """Nothing where all are 1, 16 bits each where all are frequencies, doubles otherwise."""
    if (numbers == 1).all():
        return b""
    return numbers.astype("<u2" if _short(numbers).all() else "<f8").tobytes()


def _short(numbers: np.ndarray) -> np.ndarray:
    """Which numbers 16 bits can hold."""
    return (numbers >= 0) & (numbers <= MOST_FREQUENT) & (numbers == np.floor(numbers))


def unpack_forward(forward: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The keys of a passage, int64, and the number of each, float64."""
    half = len(forward) // 16
    return np.frombuffer(forward, "<i8", half), np.frombuffer(forward, "<f8", half, 8 * half)


_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float64))


class Postings:
    """In-memory inverted lists: key -> (rows, values); rows must be added in ascending order."""

    def __init__(self) -> None:
        self._lists: dict[Hashable, tuple[array[int], array[float]]] = {}

    def add(self, key: Hashable, row: int, value: float) -> None:
        """Note that `row` holds `key` with `value`."""
        held = self._lists.get(key)
        if held is None:
            held = self._lists[key] = (array("i"), array("d"))
        held[0].append(row)
        held[1].append(value)

    def get(self, key: Hashable) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of the rows, int32, and their values, float64; both empty for an unknown key."""
        held = self._lists.get(key)
        if held is None:
            return _NOTHING
        return np.array(held[0], np.int32), np.array(held[1], np.float64)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._lists

    def __iter__(self) -> Iterator[Hashable]:
        """Iterate over the keys."""
        return iter(self._lists)

    def __len__(self) -> int:
        return len(self._lists)
