"""Inverted lists of one segment, compressed: which rows hold a term or a fact, and a number with each.

A list is stored in one of four ways, by how many of the segment's rows it holds (dense: the most; then packed):

    rare    the rows as 32 bits each
    mid     their low 16 bits, and for each 65,536 rows where these begin
    dense   their low 8 bits, and for each 256 rows (a window) how many there are and the most that one can score
    packed  their low 8 bits, and which window each is in (`unary`); segments of version 2 have none

so that a whole list is decoded by a few passes of numpy, and single rows of a long one are found without decoding it.
Lists lie in this order, within each way in the order of their keys; a *place* counts the entries of one way. Numbers
are term frequencies, or values of metadata for ranges: none is stored for a 1, or 2 or 4 bits for each small integer,
whichever takes the least; the others are kept apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ultrarag.retrieve.bm25.unary import EntryWindows

Arrays: TypeAlias = "dict[str, np.ndarray]"
WINDOW = 256
#: Bits that a number may take, and the largest that they hold; 0 stands for one that is kept apart.
WIDTHS = {0: 1, 2: 3, 4: 15}
#: Entries of the windows of some rows up to which these are compared one by one; beyond, a window is halved repeatedly.
FEW_ENTRIES = 8_192
#: Lists of a segment whose windows' places are remembered, 16 KB each at a million rows.
_REMEMBERED = 64
#: What a segment of version 2 lacks.
_NONE_PACKED: Arrays = {
    **{f"{name}3": np.zeros(0, np.uint8) for name in ("keys", "rows", "codes", "odd", "odd_at", "windows")},
    **{f"{name}3": np.zeros(1, np.uint8) for name in ("starts", "bits")},
}


@dataclass(frozen=True)
class Inverted:
    """Lists as plain arrays, in the order of their keys, the rows of each ascending."""

    #: (lists,) uint64, ascending
    keys: np.ndarray
    #: (lists,) int64: entries of each
    counts: np.ndarray
    #: (entries,) int64
    rows: np.ndarray
    #: (entries,) float64
    numbers: np.ndarray


class Lists:
    """Lists as a segment holds them; a list is named by its number, in the order in which they lie."""

    def __init__(self, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        arrays = {**_NONE_PACKED, **arrays}
        self._rows_of = [arrays[f"rows{kind}"] for kind in range(4)]
        self._keys = [arrays[f"keys{kind}"] for kind in range(4)]
        self._starts = [arrays[f"starts{kind}"] for kind in range(4)]
        self._windows, self._counts, self._most = arrays["windows1"], arrays["counts2"], arrays["most2"]
        self._numbers = [Numbers(arrays, kind) for kind in range(4)]
        self._first = np.cumsum([0, *(len(keys) for keys in self._keys)]).tolist()
        self._begins: dict[int, np.ndarray] = {}
        #: entries of all lists
        self.entries = sum(len(rows) for rows in self._rows_of)
        #: windows of 256 rows
        self.windows = max(1, -(-rows // WINDOW))
        self._window_rows = np.arange(self.windows) << 8
        self._entry_windows = EntryWindows(arrays["windows3"], self._starts[3], self.windows)

    def find(self, keys: np.ndarray) -> list[int]:
        """The numbers of the lists of keys, uint64; -1 for one that has none."""
        numbers = [-1] * len(keys)
        for kind, held in enumerate(self._keys):
            if len(held):
                places = held.searchsorted(keys)
                places[places == len(held)] = 0
                for which in (held[places] == keys).nonzero()[0].tolist():
                    numbers[which] = self._first[kind] + int(places[which])
        return numbers

    def dense(self, number: int) -> bool:
        """Whether rows of the list are found without decoding it."""
        return self._kind(number) == 2

    def count(self, number: int) -> int:
        """The entries of a list."""
        start, end, _ = self._span(number)
        return end - start

    def rows(self, number: int) -> np.ndarray:
        """The rows of a list, int64, ascending."""
        start, end, kind = self._span(number)
        low = self._rows_of[kind][start:end]
        if kind == 0 or (kind == 1 and not self._windows.shape[1]):
            return low.astype(np.int64)
        if kind == 2:
            return np.repeat(self._window_rows, self._window_counts(number - self._first[2])) + low
        if kind == 3:
            return (self._entry_windows.of(number - self._first[3]) << 8) + low
        ends = self._windows[number - self._first[1]].astype(np.int64)
        counts = np.diff(ends, prepend=0, append=end - start)
        return np.repeat(np.arange(len(counts)) << 16, counts) + low

    def numbers(self, number: int) -> np.ndarray:
        """The numbers of a list, float64."""
        start, end, kind = self._span(number)
        return self._numbers[kind].between(start, end)

    def numbers_at(self, number: int, places: np.ndarray) -> np.ndarray:
        """The numbers at places of a list, float64."""
        return self._numbers[self._kind(number)].at(places)

    def lookup(self, number: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of some rows, int64, a list without double rows holds, as indices into them, and the places there."""
        start, end, kind = self._span(number)
        if kind != 2:
            held = self.rows(number)
            places = held.searchsorted(rows)
            places[places == len(held)] = 0
            found = (held[places] == rows).nonzero()[0]
            return found, places[found] + start
        low, windows = self._rows_of[2][start:end], rows >> 8
        begins = self._window_begins(number - self._first[2])
        left, right = begins[windows], begins[windows + 1]
        counts, wanted = right - left, (rows & 0xFF).astype(np.uint8)
        if counts.sum() <= FEW_ENTRIES:
            which = np.repeat(np.arange(len(rows)), counts)
            places = np.repeat(left - (counts.cumsum() - counts), counts) + np.arange(len(which))
            found = (low[places] == wanted[which]).nonzero()[0]
            return which[found], places[found] + start
        ends, last = right, len(low) - 1
        for _ in range(int(counts.max()).bit_length()):
            middle = (left + right) >> 1
            below = low[np.minimum(middle, last)] < wanted
            below &= middle < right
            left, right = np.where(below, middle + 1, left), np.where(below, right, middle)
        found = ((left < ends) & (low[np.minimum(left, last)] == wanted)).nonzero()[0]
        return found, left[found] + start

    def most(self, number: int) -> np.ndarray:
        """The most that tf / (tf + norm) was in each window of a dense list, (windows,) in 255ths, rounded up."""
        return self._most[number - self._first[2]]

    def in_windows(self, number: int, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entries of a dense list in some windows: cells, window x 256 + row counted in `windows`; places."""
        start, end, _ = self._span(number)
        begins = self._window_begins(number - self._first[2])
        left = begins[windows]
        counts = begins[windows + 1] - left
        places = np.repeat(left - (counts.cumsum() - counts), counts) + np.arange(counts.sum())
        return np.repeat(np.arange(len(windows)) << 8, counts) + self._rows_of[2][start:end][places], places + start

    def between(self, low: int, high: int | None) -> Inverted:
        """The lists with keys from low up to high (None: to the end), in the order of their keys."""
        ranges = [self._range(kind, low, high) for kind in range(4)]
        pieces = [self._decoded(kind, *span) for kind, span in enumerate(ranges)]
        return in_order(pieces)

    def _range(self, kind: int, low: int, high: int | None) -> tuple[int, int]:
        keys = self._keys[kind]
        end = len(keys) if high is None else int(keys.searchsorted(np.uint64(high)))
        return int(keys.searchsorted(np.uint64(low))), end

    def _decoded(self, kind: int, first: int, last: int) -> Inverted:
        starts = self._starts[kind][first : last + 1].astype(np.int64)
        begin, end = (int(starts[0]), int(starts[-1])) if len(starts) else (0, 0)
        counts, rows = np.diff(starts), self._rows_of[kind][begin:end]
        if kind and last > first:
            rows = rows + np.concatenate([self._high(kind, at, n) for at, n in self._wide(kind, first, counts)])
        keys = self._keys[kind][first:last]
        return Inverted(keys, counts, rows.astype(np.int64), self._numbers[kind].between(begin, end))

    def _wide(self, kind: int, first: int, counts: np.ndarray) -> list[tuple[slice, np.ndarray]]:
        """Lists in groups whose windows fit into memory, with their entries."""
        step = max(1, (1 << 22) // (self.windows if kind >= 2 else self._windows.shape[1] + 1))
        return [
            (slice(first + at, first + min(at + step, len(counts))), counts[at : at + step])
            for at in range(0, len(counts), step)
        ]

    def _high(self, kind: int, lists: slice, counts: np.ndarray) -> np.ndarray:
        """The rows' high bits of consecutive lists."""
        if kind == 3:
            return self._entry_windows.between(lists.start, lists.stop) << 8
        if kind == 1:
            ends = np.concatenate([self._windows[lists].astype(np.int64), counts[:, None]], axis=1)
            per_window = np.diff(ends, axis=1, prepend=0)
        else:
            per_window = _as_counts(self._counts[lists], self._most[lists])
        high = np.arange(per_window.shape[1]) << (16 if kind == 1 else 8)
        return np.repeat(np.tile(high, len(counts)), per_window.ravel())

    def _kind(self, number: int) -> int:
        return bisect_right(self._first, number) - 1

    def _span(self, number: int) -> tuple[int, int, int]:
        """The places of a list's entries, first and one past the last, and its way."""
        kind = self._kind(number)
        at, starts = number - self._first[kind], self._starts[kind]
        return int(starts[at]), int(starts[at + 1]), kind

    def _window_counts(self, at: int) -> np.ndarray:
        return _as_counts(self._counts[at], self._most[at])

    def _window_begins(self, at: int) -> np.ndarray:
        """Where the entries of each window of a dense list begin, counted from its first; then their number."""
        begins = self._begins.get(at)
        if begins is None:
            begins = np.zeros(self.windows + 1, np.int64)
            self._window_counts(at).cumsum(out=begins[1:])
            if len(self._begins) >= _REMEMBERED:
                self._begins.clear()
            self._begins[at] = begins
        return begins


def _as_counts(counts: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Entries of windows, of which those with 256 are stored as 0."""
    wide = counts.astype(np.int64)
    wide[(counts == 0) & (most > 0)] = 256
    return wide


class Numbers:
    """The numbers with the entries of one way."""

    def __init__(self, arrays: Mapping[str, np.ndarray], kind: int) -> None:
        self._codes, self._odd_at, self._odd = (arrays[f"{name}{kind}"] for name in ("codes", "odd_at", "odd"))
        self._bits = int(arrays[f"bits{kind}"][0])

    def between(self, start: int, end: int) -> np.ndarray:
        """The numbers at places start to end, float64."""
        if not self._bits:
            found = np.ones(end - start)
        else:
            per, mask = 8 // self._bits, WIDTHS[self._bits]
            packed = self._codes[start // per : -(-end // per)]
            codes = np.empty(per * len(packed))
            for place in range(per):
                codes[place::per] = (packed >> (place * self._bits)) & mask
            found = codes[start % per : start % per + end - start]
        if len(self._odd_at):
            low, high = self._odd_at.searchsorted((start, end))
            if low < high:
                found[self._odd_at[low:high].astype(np.int64) - start] = self._odd[low:high]
        return found

    def at(self, places: np.ndarray) -> np.ndarray:
        """The numbers at places, float64."""
        if not self._bits:
            found = np.ones(len(places))
            if len(self._odd_at):
                which = self._odd_at.searchsorted(places)
                which[which == len(self._odd_at)] = 0
                held = self._odd_at[which] == places
                found[held] = self._odd[which[held]]
            return found
        shift = 1 if self._bits == 4 else 2
        turned = ((places & ((1 << shift) - 1)) * self._bits).astype(np.uint8)
        found = ((self._codes[places >> shift] >> turned) & WIDTHS[self._bits]).astype(np.float64)
        odd = np.flatnonzero(found == 0)
        if len(odd):
            found[odd] = self._odd[self._odd_at.searchsorted(places[odd])]
        return found


def in_order(pieces: Sequence[Inverted]) -> Inverted:
    """Lists of several pieces, which have no key in common, in the order of all keys."""
    keys = np.concatenate([piece.keys for piece in pieces])
    counts = np.concatenate([piece.counts for piece in pieces])
    rows = np.concatenate([piece.rows for piece in pieces])
    numbers = np.concatenate([piece.numbers for piece in pieces])
    order = np.argsort(keys)
    taken = gathered(counts.cumsum() - counts, counts, order)
    return Inverted(keys[order], counts[order], rows[taken], numbers[taken])


def gathered(starts: np.ndarray, counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The indices of the entries of lists, list after list in another order."""
    starts, counts = starts[order], counts[order]
    return np.repeat(starts - (counts.cumsum() - counts), counts) + np.arange(counts.sum())


def united(pieces: Sequence[Inverted]) -> Inverted:
    """Lists of several pieces, where those of one key are joined: the rows of a piece are above those before."""
    keys = np.unique(np.concatenate([piece.keys for piece in pieces]))
    counts = np.zeros(len(keys), np.int64)
    which = [keys.searchsorted(piece.keys) for piece in pieces]
    for at, piece in zip(which, pieces, strict=True):
        counts[at] += piece.counts
    filled = counts.cumsum() - counts
    rows, numbers = np.empty(counts.sum(), np.int64), np.empty(counts.sum())
    for at, piece in zip(which, pieces, strict=True):
        places = np.repeat(filled[at] - (piece.counts.cumsum() - piece.counts), piece.counts)
        places += np.arange(len(piece.rows))
        rows[places], numbers[places] = piece.rows, piece.numbers
        filled[at] += piece.counts
    return Inverted(keys, counts, rows, numbers)
