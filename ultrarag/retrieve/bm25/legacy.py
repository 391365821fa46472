"""Files of format 1, which had every list in a table of SQLite: read whole, and rewritten once by their owner."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import numpy as np

from ultrarag.retrieve.bm25.lists import Inverted
from ultrarag.retrieve.bm25.segment import Segment, compressed, in_memory


def old_segment(db: sqlite3.Connection, k1: float, b: float) -> Segment:
    """All that lives in a file of format 1, as one segment in memory."""
    docs = db.execute("SELECT row, id, length FROM docs ORDER BY row").fetchall()
    old_rows = np.array([row for row, _, _ in docs], np.int64)
    ids = [id for _, id, _ in docs]
    lengths = np.array([length for _, _, length in docs], np.int64)
    id_lengths = np.fromiter(map(len, ids), np.int64)
    id_bytes = np.frombuffer(b"".join(ids), np.uint8)
    return in_memory(compressed(id_lengths, id_bytes, lengths, [_lists(db, old_rows)], k1, b))


def _lists(db: sqlite3.Connection, living: np.ndarray) -> Inverted:
    parts = [*_sealed(db), *_buffered(db)]
    if not parts or not len(living):
        return Inverted(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    keys, rows, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    places = np.minimum(living.searchsorted(rows), len(living) - 1)
    kept = living[places] == rows
    keys, rows, numbers = keys[kept], places[kept], numbers[kept]
    order = np.lexsort((rows, keys))
    keys, rows, numbers = keys[order], rows[order], numbers[order]
    first = np.flatnonzero(np.diff(keys, prepend=keys[:1] ^ np.uint64(1)) != 0)
    return Inverted(keys[first], np.diff(first, append=len(keys)), rows, numbers)


def _sealed(db: sqlite3.Connection) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The entries of the lists: 16-bit distances from a first row; numbers missing (all 1), 16-bit or doubles."""
    for key, first, distances, numbers in db.execute("SELECT key, first, rows, numbers FROM postings"):
        rows = np.frombuffer(distances, "<u2").astype(np.int64) + first
        if not numbers:
            values = np.ones(len(rows))
        else:
            values = np.frombuffer(numbers, "<u2" if len(numbers) == len(distances) else "<f8").astype(np.float64)
        yield np.full(len(rows), key, np.int64).view(np.uint64), rows, values


def _buffered(db: sqlite3.Connection) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The entries of passages that were not in the lists yet: each with its keys, then its numbers."""
    for row, forward in db.execute("SELECT row, forward FROM docs WHERE forward IS NOT NULL"):
        half = len(forward) // 16
        keys = np.frombuffer(forward, "<u8", half)
        yield keys.astype(np.uint64), np.full(half, row, np.int64), np.frombuffer(forward, "<f8", half, 8 * half)
