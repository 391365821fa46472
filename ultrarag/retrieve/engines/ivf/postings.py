"""Postings: of some rows of a table which hold a token, in blocks of rows that are alike; derived, mapped from a file.

Weights are bytes, rounded up, so that what is found by them misses no hit: the best are scored anew by whoever asks.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ultrarag.errors import IndexStateError
from ultrarag.io import replacing

#: Rows of a block: the loops search 100,000 passages in 0.12 ms with 8 rows, 0.16 with 16 and 0.36 with 32, a million
#: in 0.61 ms with 8 and in 0.43 with 16.
BLOCK_ROWS = 16
#: Rows are ordered by the tokens of so many of their largest weights, times the tokens' rarity.
LEADING = 4
#: A token in more than this share of the blocks has a byte in every block.
COMMON = 1 / 8
#: Up to this token id numbers are looked up in an array while postings are made.
DENSE_TOKENS = 1 << 22
_MAGIC = 0x31504C52
_EVERYTHING = np.zeros(0, bool)
#: What an addition of float32 may lack or have too much, more than twice.
_ROUNDING = 1.5e-7
_scratch, _NOTHING = threading.local(), np.zeros(0, np.float32)


class Arrays(NamedTuple):
    """What the file holds, in this order."""

    #: (tokens,) uint32, ascending: the tokens that occur; below they go by their places here
    tokens: np.ndarray
    #: (tokens,) float32: what a step of a token's bytes is
    steps: np.ndarray
    #: (tokens + 1,) int64: where the blocks of a token begin
    places: np.ndarray
    #: (entries,) uint32: blocks that hold a token that is not common
    blocks: np.ndarray
    #: (entries,) uint8: its largest byte there
    highest: np.ndarray
    #: (tokens,) int32: a common token's line in `table`, -1 for others
    lines: np.ndarray
    #: (common tokens, blocks) uint8, flat: the largest byte in each block
    table: np.ndarray
    #: (blocks + 1,) int64: where the tokens of a block begin
    begins: np.ndarray
    #: (blocks + 1,) int64: where its postings begin
    heads: np.ndarray
    #: (entries,) uint32: the tokens of a block
    held: np.ndarray
    #: (entries,) uint8: how many of its rows hold the token
    lengths: np.ndarray
    #: (pairs,) uint16: a row's place in the block, and its byte
    postings: np.ndarray
    #: (rows,) int32: the row at each place, counted from the first of the part
    rows: np.ndarray


_KINDS = (
    *(np.uint32, np.float32, np.int64, np.uint32, np.uint8, np.int32, np.uint8),
    *(np.int64, np.int64, np.uint32, np.uint8, np.uint16, np.int32),
)
_HEADER = 8 * (len(_KINDS) + 1)


class Postings:
    """Of the rows from `first` up to `last`."""

    def __init__(self, first: int, last: int, arrays: Arrays) -> None:
        self.first, self.last, self._held = first, last, arrays

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.last - self.first

    @staticmethod
    def write(path: Path, tokens: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> None:
        """Make the postings of rows, given as `Weights.of` does, in a file that `read` takes."""
        arrays = _made(tokens, weights, starts)
        with replacing(path) as file:
            file.write(np.array([_MAGIC, *map(len, arrays)], np.int64).tobytes())
            for array in arrays:
                file.write(bytes(-file.tell() % 8))
                file.write(array.data if array.size else b"")

    @staticmethod
    def read(path: Path, first: int, last: int) -> Postings:
        """Map what `write` wrote.

        Raises:
            IndexStateError: the file is missing or damaged.
        """
        try:
            return Postings(first, last, _mapped(np.memmap(path, np.uint8, "r"), last - first))
        except (FileNotFoundError, ValueError) as error:
            raise IndexStateError(f"'{path}' is damaged ({error}); rebuild the vectors from the passages") from None

    def promising(
        self, tokens: np.ndarray, weights: np.ndarray, k: int, floor: float = 0.0, passing: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows of the table that can be among the k best, in no order.

        Args:
            tokens: of the query, ascending, int64.
            weights: of the query, from 1e-15 on, float32.
            floor: scores below it are of no use.
            passing: which rows of the table may be given, (rows,) bool; None: all.
        """
        from ultrarag.retrieve.engines.ivf import kernels

        held = self._held
        numbers = np.searchsorted(held.tokens, tokens)
        numbers[numbers == len(held.tokens)] = 0
        known = held.tokens[numbers] == tokens if len(held.tokens) else np.zeros(len(tokens), bool)
        if not known.any():
            return np.zeros(0, np.int64)
        numbers = numbers[known]
        lack = _ROUNDING * (len(numbers) + 16)
        scaled = weights[known] * held.steps[numbers] * np.float32(1 + lack)
        bounds, query = _room(len(held.begins) - 1, len(held.tokens))
        table = held.table.reshape(-1, len(bounds))
        kernels.bounded(numbers, scaled, held.places, held.blocks, held.highest, held.lines, table, bounds)
        allowed = _EVERYTHING if passing is None else passing[self.first : self.last]
        rows: np.ndarray = kernels.promising(
            *(numbers, scaled, held.begins, held.heads, held.held, held.lengths, held.postings, held.rows),
            *(BLOCK_ROWS, allowed, min(k, self.count), np.float32(floor), np.float32(1 - 2 * lack)),
            *(np.float32(scaled.sum()), bounds, query),
        )
        return rows.astype(np.int64) + self.first


def _made(tokens: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> Arrays:
    from ultrarag.retrieve.engines.ivf import kernels

    distinct, numbers = _numbered(tokens)
    impacts, steps = kernels.quantised(numbers, weights, len(distinct))
    rarity = np.log1p(len(starts) / np.maximum(np.bincount(numbers, minlength=len(distinct)), 1)).astype(np.float32)
    order = np.lexsort(kernels.leading(starts, numbers, weights, rarity, LEADING).T[::-1]).astype(np.int32)
    begins, heads, held, lengths, most, postings = kernels.gathered(
        starts, numbers, impacts, order, BLOCK_ROWS, len(distinct)
    )
    places, blocks, highest, lines, table = kernels.maxima(begins, held, most, len(distinct), COMMON)
    return Arrays(
        *(distinct, steps, places, blocks, highest, lines, table.reshape(-1)),
        *(begins, heads, held, lengths, postings, order),
    )


def _mapped(content: np.ndarray, rows: int) -> Arrays:
    """The arrays of a file; ValueError where they are not whole, or not of so many rows."""
    if len(content) < _HEADER:
        raise ValueError("it ends early")
    magic, *lengths = content[:_HEADER].view(np.int64).tolist()
    if magic != _MAGIC or lengths[-1] != rows:
        raise ValueError("it does not begin as it should")
    arrays, place = [], _HEADER
    for kind, length in zip(_KINDS, lengths, strict=True):
        place += -place % 8
        stop = place + length * np.dtype(kind).itemsize
        if stop > len(content):
            raise ValueError("it ends early")
        arrays.append(np.frombuffer(content[place:stop], kind))
        place = stop
    return Arrays(*arrays)


def _numbered(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct tokens, ascending, and of each token its place among them, int32."""
    from ultrarag.retrieve.engines.ivf import kernels

    largest = int(tokens.max(initial=0))
    if largest >= DENSE_TOKENS:
        distinct, numbers = np.unique(tokens, return_inverse=True)
        return distinct, numbers.astype(np.int32)
    occurs = kernels.occurring(tokens, largest + 1)
    return np.flatnonzero(occurs).astype(np.uint32), kernels.numbered(tokens, (np.cumsum(occurs) - 1).astype(np.int32))


def _room(blocks: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """This thread's arrays for one search: of any content, (blocks,) float32, and of zeros, (tokens,) float32."""
    bounds, query = getattr(_scratch, "bounds", _NOTHING), getattr(_scratch, "query", _NOTHING)
    if len(bounds) < blocks:
        bounds = _scratch.bounds = np.zeros(blocks, np.float32)
    if len(query) < tokens:
        query = _scratch.query = np.zeros(tokens, np.float32)
    return bounds[:blocks], query
