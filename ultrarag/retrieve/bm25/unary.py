"""Which window each entry of a list is in, as bits: for each window a 1 for each of its entries, then a 0.

The high half of an Elias-Fano code (Elias, 1974; Vigna, 2013): entry i of a list, in window w, is the 1 at bit w + i,
so that a list takes a bit for each entry and one for each window. It begins at a byte; zeros at its end are left out.
"""

from __future__ import annotations

import numpy as np


def as_bits(entry_windows: np.ndarray, counts: np.ndarray, windows: int) -> np.ndarray:
    """The bits of consecutive lists, uint8.

    Args:
        entry_windows: (entries,) the window of each entry, below `windows`, ascending within a list.
        counts: (lists,) entries of each list, at least 1.
    """
    bits = np.zeros(8 * int(_sizes(counts, windows).sum()), np.uint8)
    bits[entry_windows + _first_bits(counts, windows)] = 1
    return np.packbits(bits)


class EntryWindows:
    """The windows of the entries of lists, read from their bits."""

    def __init__(self, bits: np.ndarray, starts: np.ndarray, windows: int) -> None:
        """`starts`: (lists + 1,) the entries before each list, then all."""
        self._bits, self._windows = bits, windows
        self._counts = np.diff(starts.astype(np.int64))
        self._begins = np.zeros(len(starts), np.int64)
        _sizes(self._counts, windows).cumsum(out=self._begins[1:])

    def of(self, at: int) -> np.ndarray:
        """Those of one list, (entries,) int64."""
        found = self._ones(at, at + 1)
        found -= np.arange(len(found))
        return found

    def between(self, first: int, last: int) -> np.ndarray:
        """Those of the lists from `first` up to `last`, one after another, (entries,) int64."""
        return self._ones(first, last) - _first_bits(self._counts[first:last], self._windows)

    def _ones(self, first: int, last: int) -> np.ndarray:
        """Where bits are 1 in the lists from `first` up to `last`."""
        return np.unpackbits(self._bits[self._begins[first] : self._begins[last]]).view(bool).nonzero()[0]


def _sizes(counts: np.ndarray, windows: int) -> np.ndarray:
    """The bytes that each list takes."""
    return (counts + (windows - 1 + 7)) >> 3


def _first_bits(counts: np.ndarray, windows: int) -> np.ndarray:
    """The bit that each entry has when it is in the first window, (entries,)."""
    taken = _sizes(counts, windows)
    starts = 8 * (taken.cumsum() - taken) - (counts.cumsum() - counts)
    return np.repeat(starts, counts) + np.arange(counts.sum())
