"""Components: which rows hang together, by union-find over the hashes of their texts."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np


class Components:
    """Rows that share a key are in one component; 4 bytes per row, and a dictionary entry per distinct key."""

    def __init__(self) -> None:
        self._parents = array("I")
        self._owners: dict[int, int] = {}

    def add(self, keys: Iterable[int]) -> None:
        """Add a row with its keys."""
        row = len(self._parents)
        self._parents.append(row)
        for key in keys:
            self._join(row, self._owners.setdefault(key, row))

    def _root(self, row: int) -> int:
        parents = self._parents
        while parents[row] != row:
            parents[row] = parents[parents[row]]  # halves the path on the way
            row = parents[row]
        return row

    def _join(self, left: int, right: int) -> None:
        one, other = self._root(left), self._root(right)
        # the smaller number stays: a component is called by its first row, whatever the order of keys
        self._parents[max(one, other)] = min(one, other)

    def roots(self) -> np.ndarray:
        """The component of each row, called by its first row: (rows,) int64."""
        return np.array([self._root(row) for row in range(len(self._parents))], np.int64)
