"""Inverted lists of one segment, compressed: which rows hold a term or a fact, and a number with each.

A list is stored in one of three ways, by how many of the segment's rows it holds:

    rare    the rows as 32 bits each
    mid     their low 16 bits, and for each 65,536 rows where these begin
    dense   their low 8 bits, for each 256 rows (a window) where these begin, and the most that a row there can score

so that a whole list is decoded by a few passes of numpy, and single rows of a long one are found without decoding it.
Lists lie in this order, within each way in the order of their keys; a *place* counts their entries through all of
them. Numbers are term frequencies, or values of metadata for ranges: 4 bits each where they are 1 to 15; others are
kept apart, as doubles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Arrays: TypeAlias = "dict[str, np.ndarray]"
WINDOW = 256
#: A list is dense when it holds more than one row in so many, and more than LEAST_DENSE.
SPARSENESS, LEAST_DENSE = 128, 256
#: Entries of the windows of some rows up to which these are compared one by one; beyond, a window is halved repeatedly.
FEW_ENTRIES = 8_192
#: Entries from which the lists of a segment are numbered with 64 bits.
_WIDE = 1 << 32


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


class Compressor:
    """Takes lists in ascending order of their keys, piece after piece, and gives them compressed."""

    def __init__(self, lengths: np.ndarray, norms: tuple[float, float]) -> None:
        """`lengths` are those of the segment's rows; a frequency's norm is norms[0] + norms[1] x length."""
        self._lengths, self._norms = lengths, norms
        self._rows = len(lengths)
        self._coarse = max(1, -(-self._rows // 65536))
        self._windows = max(1, -(-self._rows // WINDOW))
        self._pieces: list[list[Arrays]] = [[], [], []]

    def add(self, lists: Inverted) -> None:
        """Compress a piece; its keys come after all those before."""
        for kind, chosen in enumerate(self._kinds(lists)):
            if chosen.any():
                kept = np.repeat(chosen, lists.counts)
                part = Inverted(lists.keys[chosen], lists.counts[chosen], lists.rows[kept], lists.numbers[kept])
                self._pieces[kind].append((self._rare, self._mid, self._dense)[kind](part) | _coded(part))

    def arrays(self) -> Arrays:
        """All that `Lists` reads."""
        made: Arrays = {}
        numbers: dict[str, list[np.ndarray]] = {"codes": [], "odd_at": [], "odd": []}
        base = 0
        for kind, pieces in enumerate(self._pieces):
            counts = _joined(pieces, "counts", np.int64)
            made[f"keys{kind}"] = _joined(pieces, "keys", np.uint64)
            made[f"starts{kind}"] = base + np.concatenate([[0], np.cumsum(counts)])
            made[f"rows{kind}"] = _joined(pieces, "rows", ("<u4", "<u2", "<u1")[kind])
            for piece in pieces:
                numbers["codes"].append(piece["codes"])
                numbers["odd_at"].append(base + piece["odd_at"])
                numbers["odd"].append(piece["odd"])
                base += len(piece["codes"])
        made["windows1"] = _joined(self._pieces[1], "windows", "<u4", self._coarse - 1)
        made["coarse2"] = _joined(self._pieces[2], "coarse", "<u4", self._coarse)
        made["fine2"] = _joined(self._pieces[2], "fine", "<u2", self._windows)
        made["most2"] = _joined(self._pieces[2], "most", "<u1", self._windows)
        places = "<u4" if base < _WIDE else "<u8"
        for kind in range(3):
            made[f"starts{kind}"] = made[f"starts{kind}"].astype(places)
        made["codes"] = _halved(np.concatenate([np.zeros(0, np.uint8), *numbers["codes"]]))
        made["odd_at"] = np.concatenate([np.zeros(0, np.int64), *numbers["odd_at"]]).astype(places)
        made["odd"] = np.concatenate([np.zeros(0), *numbers["odd"]])
        return made

    def _kinds(self, lists: Inverted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dense = (lists.counts * SPARSENESS > self._rows) & (lists.counts > LEAST_DENSE)
        if dense.any():  # a row with several numbers has several entries: windows would overflow
            lists_of = np.repeat(np.arange(len(lists.counts)), lists.counts)
            twice = np.flatnonzero((np.diff(lists.rows) == 0) & (np.diff(lists_of) == 0))
            dense[lists_of[twice]] = False
        mid = ~dense & (lists.counts > 2 * (self._coarse - 1))
        return ~dense & ~mid, mid, dense

    def _rare(self, part: Inverted) -> Arrays:
        return {"rows": part.rows.astype("<u4")}

    def _mid(self, part: Inverted) -> Arrays:
        within = _per_window(part, 16, self._coarse)[0].cumsum(axis=1)
        return {"rows": (part.rows & 0xFFFF).astype("<u2"), "windows": within[:, :-1].astype("<u4")}

    def _dense(self, part: Inverted) -> Arrays:
        counts, places = _per_window(part, 8, self._windows)
        starts = counts.cumsum(axis=1) - counts
        coarse = starts[:, ::256]
        fine = starts - np.repeat(coarse, 256, axis=1)[:, : self._windows]
        positive = np.maximum(part.numbers, 0)
        gains = positive / (positive + self._norms[0] + self._norms[1] * self._lengths[part.rows])
        most = np.zeros(counts.size)
        first = np.flatnonzero(np.diff(places, prepend=-1))
        most[places[first]] = np.maximum.reduceat(gains, first)
        return {
            "rows": (part.rows & 0xFF).astype("<u1"),
            "coarse": coarse.astype("<u4"),
            "fine": fine.astype("<u2"),
            "most": np.ceil(most * 255 * (1 + 1e-12)).clip(0, 255).astype("<u1").reshape(counts.shape),
        }


def _per_window(part: Inverted, bits: int, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries of each list in each window of 2^bits rows, (lists, windows), and the cell that each entry is in."""
    cells = np.repeat(np.arange(len(part.counts)) * windows, part.counts) + (part.rows >> bits)
    counts = np.bincount(cells, minlength=len(part.counts) * windows)
    return counts.reshape(len(part.counts), windows), cells


def _coded(part: Inverted) -> Arrays:
    codes = np.where((part.numbers >= 1) & (part.numbers <= 15), part.numbers, 0).astype(np.uint8)
    codes[codes != part.numbers] = 0
    odd = np.flatnonzero(codes == 0)
    return {"keys": part.keys, "counts": part.counts, "codes": codes, "odd_at": odd, "odd": part.numbers[odd]}


def _halved(codes: np.ndarray) -> np.ndarray:
    even = np.zeros(-(-len(codes) // 2), np.uint8)
    even[: len(codes) // 2] = codes[1::2] << 4
    return even | codes[::2]


def _joined(pieces: list[Arrays], name: str, kind: object, width: int | None = None) -> np.ndarray:
    empty = np.zeros(0 if width is None else (0, width), kind)  # type: ignore[call-overload]
    return np.concatenate([empty, *(piece[name] for piece in pieces)]).astype(kind)  # type: ignore[call-overload]


class Lists:
    """Lists as a segment holds them; a list is named by its number, in the order in which they lie."""

    def __init__(self, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        self._rows_of = [arrays[f"rows{kind}"] for kind in range(3)]
        self._keys = [arrays[f"keys{kind}"] for kind in range(3)]
        self._starts = [arrays[f"starts{kind}"] for kind in range(3)]
        self._windows, self._coarse = arrays["windows1"], arrays["coarse2"]
        self._fine, self._most = arrays["fine2"], arrays["most2"]
        self._codes, self._odd_at, self._odd = arrays["codes"], arrays["odd_at"], arrays["odd"]
        self._first = np.cumsum([0, *(len(keys) for keys in self._keys)]).tolist()
        self._base = [int(starts[0]) for starts in self._starts]
        self.entries = int(self._starts[2][-1])
        #: windows of 256 rows
        self.windows = max(1, -(-rows // WINDOW))
        self._window_rows = np.arange(self.windows) << 8

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
        return number >= self._first[2]

    def span(self, number: int) -> tuple[int, int]:
        """The places of a list's entries: first, and one past the last."""
        kind, at = self._kind(number)
        starts = self._starts[kind]
        return int(starts[at]), int(starts[at + 1])

    def rows(self, number: int) -> np.ndarray:
        """The rows of a list, int64, ascending."""
        kind, at = self._kind(number)
        start, end = self.span(number)
        low = self._rows_of[kind][start - self._base[kind] : end - self._base[kind]]
        if kind == 0 or (kind == 1 and not self._windows.shape[1]):
            return low.astype(np.int64)
        if kind == 1:
            counts = np.diff(self._windows[at].astype(np.int64), prepend=0, append=end - start)
            return np.repeat(np.arange(len(counts)) << 16, counts) + low
        starts = self._window_starts(at)
        counts = np.empty_like(starts)
        np.subtract(starts[1:], starts[:-1], out=counts[:-1])
        counts[-1] = end - start - starts[-1]
        return np.repeat(self._window_rows, counts) + low

    def numbers(self, start: int, end: int) -> np.ndarray:
        """The numbers at places start to end, float64."""
        pairs = self._codes[start >> 1 : (end + 1) >> 1]
        codes = np.empty(2 * len(pairs))
        codes[::2] = pairs & 15
        codes[1::2] = pairs >> 4
        found = codes[start & 1 : (start & 1) + end - start]
        if len(self._odd_at):
            low, high = self._odd_at.searchsorted((start, end))
            if low < high:
                found[self._odd_at[low:high].astype(np.int64) - start] = self._odd[low:high]
        return found

    def numbers_at(self, places: np.ndarray) -> np.ndarray:
        """The numbers at places, float64."""
        found = ((self._codes[places >> 1] >> ((places & 1) << 2).astype(np.uint8)) & 15).astype(np.float64)
        odd = np.flatnonzero(found == 0)
        if len(odd):
            found[odd] = self._odd[self._odd_at.searchsorted(places[odd])]
        return found

    def lookup(self, number: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of some rows, int64, a list without double rows holds, as indices into them, and the places there."""
        start, end = self.span(number)
        if not self.dense(number):
            held = self.rows(number)
            places = held.searchsorted(rows)
            places[places == len(held)] = 0
            found = (held[places] == rows).nonzero()[0]
            return found, places[found] + start
        low = self._rows_of[2][start - self._base[2] : end - self._base[2]]
        left, right = self._bounds_of(number, rows >> 8)
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
        start, end = self.span(number)
        left, right = self._bounds_of(number, windows)
        counts = right - left
        places = np.repeat(left - (counts.cumsum() - counts), counts) + np.arange(counts.sum())
        low = self._rows_of[2][start - self._base[2] : end - self._base[2]]
        return np.repeat(np.arange(len(windows)) << 8, counts) + low[places], places + start

    def between(self, low: int, high: int | None) -> Inverted:
        """The lists with keys from low up to high (None: to the end), in the order of their keys."""
        ranges = [self._range(kind, low, high) for kind in range(3)]
        pieces = [self._decoded(kind, *span) for kind, span in enumerate(ranges)]
        return in_order(pieces)

    def _range(self, kind: int, low: int, high: int | None) -> tuple[int, int]:
        keys = self._keys[kind]
        end = len(keys) if high is None else int(keys.searchsorted(np.uint64(high)))
        return int(keys.searchsorted(np.uint64(low))), end

    def _decoded(self, kind: int, first: int, last: int) -> Inverted:
        starts = self._starts[kind][first : last + 1].astype(np.int64)
        begin, end = (int(starts[0]), int(starts[-1])) if len(starts) else (0, 0)
        counts, rows = np.diff(starts), self._rows_of[kind][begin - self._base[kind] : end - self._base[kind]]
        if kind and last > first:
            rows = rows + np.concatenate([self._high(kind, at, n) for at, n in self._wide(kind, first, counts)])
        keys = self._keys[kind][first:last]
        return Inverted(keys, counts, rows.astype(np.int64), self.numbers(begin, end))

    def _wide(self, kind: int, first: int, counts: np.ndarray) -> list[tuple[slice, np.ndarray]]:
        """Lists in groups whose windows fit into memory, with their entries."""
        step = max(1, (1 << 22) // (self.windows if kind == 2 else self._windows.shape[1] + 1))
        return [
            (slice(first + at, first + min(at + step, len(counts))), counts[at : at + step])
            for at in range(0, len(counts), step)
        ]

    def _high(self, kind: int, lists: slice, counts: np.ndarray) -> np.ndarray:
        """The rows' high bits of consecutive lists."""
        if kind == 1:
            ends = np.concatenate([self._windows[lists].astype(np.int64), counts[:, None]], axis=1)
            per_window = np.diff(ends, axis=1, prepend=0)
        else:
            coarse = np.repeat(self._coarse[lists].astype(np.int64), 256, axis=1)[:, : self.windows]
            per_window = np.diff(np.concatenate([coarse + self._fine[lists], counts[:, None]], axis=1), axis=1)
        high = np.arange(per_window.shape[1]) << (16 if kind == 1 else 8)
        return np.repeat(np.tile(high, len(counts)), per_window.ravel())

    def _kind(self, number: int) -> tuple[int, int]:
        kind = 2 if number >= self._first[2] else 1 if number >= self._first[1] else 0
        return kind, number - self._first[kind]

    def _window_starts(self, at: int) -> np.ndarray:
        return self._fine[at] + np.repeat(self._coarse[at].astype(np.int64), 256)[: self.windows]

    def _bounds_of(self, number: int, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the entries of windows begin and end, counted from the list's first."""
        at, (start, end) = number - self._first[2], self.span(number)
        coarse, fine = self._coarse[at], self._fine[at]
        after = np.minimum(windows + 1, self.windows - 1)
        ends = coarse[after >> 8].astype(np.int64) + fine[after]
        ends[windows + 1 == self.windows] = end - start
        return coarse[windows >> 8].astype(np.int64) + fine[windows], ends


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
