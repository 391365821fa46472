"""A segment in service: which of its passages have died since it was made, and what that does to its statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ultrarag.retrieve.bm25.segment import Segment

#: Lists of a part whose dead entries are remembered.
MOST_COUNTED = 100_000
#: Dead rows that are looked up in a list one by one; for more, the list is decoded.
FEW_DEAD = 512


@dataclass(frozen=True)
class Part:
    """One segment and its dead rows; deleting gives a new part, so that a search sees one state throughout."""

    number: int
    segment: Segment
    #: living passages and their tokens
    count: int
    tokens: int
    #: (rows,) which are dead; None: none
    dead: np.ndarray | None = None
    #: dead rows, int64, in the order in which they died
    log: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    #: list -> (rows of the log that were looked at, entries of the list that are dead); shared with earlier states
    counted: dict[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, number: int, segment: Segment) -> Part:
        """A part in which all rows live."""
        return cls(number, segment, segment.rows, segment.tokens)

    def without(self, rows: np.ndarray) -> Part:
        """The part after the death of some living rows."""
        if not len(rows):
            return self
        dead = np.zeros(self.segment.rows, bool) if self.dead is None else self.dead.copy()
        dead[rows] = True
        count, tokens = self.count - len(rows), self.tokens - int(self.segment.lengths[rows].sum(dtype=np.int64))
        log = np.concatenate([self.log, rows])
        return Part(self.number, self.segment, count, tokens, dead, log, self.counted)

    def follows(self, earlier: Part) -> bool:
        """Whether all rows that were dead in an earlier state of this part are."""
        return np.array_equal(self.log[: len(earlier.log)], earlier.log)

    def alive(self) -> np.ndarray:
        """The living rows, ascending."""
        return np.arange(self.segment.rows) if self.dead is None else np.flatnonzero(~self.dead)

    def find(self, ids: Sequence[bytes], hashes: np.ndarray) -> np.ndarray:
        """The living row of each id, -1 where there is none."""
        rows = self.segment.rows_of(ids, hashes)
        if self.dead is not None:
            rows[(rows >= 0) & self.dead[rows]] = -1
        return rows

    def living(self, number: int) -> int:
        """The entries of a list in living rows: what its document frequency counts."""
        entries = self.segment.lists.count(number)
        if self.dead is None:
            return entries
        seen, dead = self.counted.get(number, (0, 0))
        if seen != len(self.log):
            if seen > len(self.log):  # this is an earlier state than the one that was counted
                seen = dead = 0
            dead += self._dead_entries(number, np.sort(self.log[seen:]))
            if len(self.counted) >= MOST_COUNTED:
                self.counted.clear()
            self.counted[number] = (len(self.log), dead)
        return entries - dead

    def _dead_entries(self, number: int, died: np.ndarray) -> int:
        if len(died) <= FEW_DEAD:
            return len(self.segment.lists.lookup(number, died)[0])
        dead = np.zeros(self.segment.rows, bool)
        dead[died] = True
        return int(np.count_nonzero(dead[self.segment.lists.rows(number)]))
