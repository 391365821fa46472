"""Inverted lists that grow: for each key, the rows that hold it, each with a number."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator

import numpy as np

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


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the places of the k highest scores, (n,), and of all that tie with the k-th, in no order."""
    if len(scores) <= k:
        return np.arange(len(scores))
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.flatnonzero(scores >= threshold)


def ranked(ids: Iterable[str], scores: Iterable[float], k: int) -> list[tuple[str, float]]:
    """Return the k best (id, score), ties in the order of their ids."""
    return sorted(zip(ids, map(float, scores), strict=True), key=lambda hit: (-hit[1], hit[0]))[:k]
