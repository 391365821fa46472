"""Groups of rows that must stay on one side of a split, and which of them are held out.

Rows that share a query, a positive, a document or nearly the same text, directly or through others, are one group:
what is measured on held-out queries whose documents are trained on promises what no new query will see.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ultrarag.rows.checks.documents import EVIDENCE, name_key, names_in_row, near_pairs, signature
from ultrarag.rows.row import text_key


class Components:
    """Rows that share a key are in one component; 4 bytes per row, 9 per sharing, an entry per distinct key."""

    def __init__(self) -> None:
        self._parents = array("I")
        self._owners: dict[int, int] = {}
        self._kinds: list[str] = []
        #: each time that a row shared what an earlier one had: the row, the earlier one, the kind of what they share
        self._later, self._earlier, self._shared = array("I"), array("I"), array("B")

    def __len__(self) -> int:
        return len(self._parents)

    def add(self, keys: Mapping[int, str]) -> None:
        """Add a row with its keys; of each key the kind."""
        row = len(self._parents)
        self._parents.append(row)
        for key, kind in keys.items():
            owner = self._owners.setdefault(key, row)
            if owner != row:
                self.join(kind, row, owner)

    def join(self, kind: str, row: int, earlier: int) -> None:
        """Put two rows that share something into one component."""
        if row == earlier:
            return
        if kind not in self._kinds:
            self._kinds.append(kind)
        self._later.append(row)
        self._earlier.append(earlier)
        self._shared.append(self._kinds.index(kind))
        one, other = self._root(row), self._root(earlier)
        # the smaller number stays: a component is called by its first row, whatever the order of keys
        self._parents[max(one, other)] = min(one, other)

    def _root(self, row: int) -> int:
        parents = self._parents
        while parents[row] != row:
            parents[row] = parents[parents[row]]  # halves the path on the way
            row = parents[row]
        return row

    def roots(self) -> np.ndarray:
        """The component of each row, called by its first row: (rows,) int64."""
        return np.array([self._root(row) for row in range(len(self._parents))], np.int64)

    def sharing(self, root: int, roots: np.ndarray) -> tuple[dict[str, int], str, list[int]]:
        """What holds a component together: kind -> how often, the kind of what is shared most, and by which rows."""
        later, earlier = np.array(self._later, np.int64), np.array(self._earlier, np.int64)
        shared = np.array(self._shared, np.int64)
        inside = roots[later] == root if len(later) else np.zeros(0, bool)
        counts = np.bincount(shared[inside], minlength=len(self._kinds))
        held = {self._kinds[number]: int(counts[number]) for number in np.argsort(-counts) if counts[number]}
        if not held:
            return {}, "", []
        # who shares with the same earlier row by the same kind shares the same thing, but for rows with several
        things = earlier[inside] * len(self._kinds) + shared[inside]
        names, often = np.unique(things, return_counts=True)
        most = int(names[often.argmax()])
        owner, kind = divmod(most, len(self._kinds))
        return held, self._kinds[kind], [owner, *np.unique(later[inside][things == most]).tolist()]


class DocumentGroups:
    """Joins rows, one after another, by what they share."""

    def __init__(self, kinds: Sequence[str] | None = EVIDENCE) -> None:
        """`kinds`: what makes passages parts of one document, beside the same text; None: a query alone joins rows."""
        self._kinds = kinds
        self._rows, self._seen = Components(), set[int]()
        self._owners, self._signatures = array("I"), list[np.ndarray]()

    def add(self, query: str, pos: Sequence[str], extra: Mapping[str, Any] | None = None) -> None:
        """Add a row.

        Args:
            extra: its keys beside those that training reads.
        """
        keys, kinds = {text_key(query): "query"}, self._kinds or ()
        for text in pos if self._kinds is not None else ():
            keys.setdefault(key := text_key(text), "positive")
            if "near" in kinds and key not in self._seen and (found := signature(text)) is not None:
                self._owners.append(len(self._rows))
                self._signatures.append(found)
            self._seen.add(key)
        names = [name for name in names_in_row(extra or {}, pos) if name[0] in kinds]
        self._rows.add({**keys, **{name_key(*name): name[0] for name in names}})

    def joined(self) -> Components:
        """The rows, those with nearly the same text joined too."""
        signatures, self._signatures = self._signatures, []
        for left, right in near_pairs(np.stack(signatures)) if signatures else ():
            self._rows.join("near", self._owners[left], self._owners[right])
        return self._rows


def hold_out(roots: np.ndarray, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """Which share each row falls into, counted from 1, and 0 for the rest: (rows,) int8.

    Groups are added in random order while they fit, so that a share may be missed, and be empty.

    Args:
        roots: (rows,) the group of each row.
        shares: name -> the most of the rows.
    """
    names, sizes = np.unique(roots, return_counts=True)
    chosen = np.zeros(len(names), np.int8)
    order = np.random.default_rng(seed).permutation(len(names))
    for number, share in enumerate(shares.values(), 1):
        room = int(share * len(roots))
        for group in order:
            if not chosen[group] and sizes[group] <= room:
                chosen[group], room = number, room - sizes[group]
    return chosen[np.searchsorted(names, roots)]
