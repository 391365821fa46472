"""The k best passages of a query, exact, although most of what holds its words is never looked at.

Terms are taken from the rarest to the commonest. The lists of rare ones are added up. Of the others it is known how
much they can add to a passage at most, for each 256 rows (block-max indexes; Ding and Suel, 2011): once k passages are
known to score more, only windows that can still reach them are read, and only the passages with rare terms that can
are looked up in the long lists (MaxScore; Turtle and Flood, 1995). All sums are of doubles, term by term in the same
order for every passage, and rounded to float32 at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ultrarag.retrieve.bm25.lists import WINDOW, Lists
from ultrarag.retrieve.bm25.part import Part
from ultrarag.retrieve.ranking import top

#: A list of more entries than this is not simply added up; 4,096 and 40,000 took 20 and 40 % longer (250,000 passages).
LONG_LIST = 16_384
#: Candidates that are scored fully, for each of the k, to know early what a good score is.
PROBES = 4
#: Windows that are read for that where no passage is known yet.
FIRST_WINDOWS = 16
#: When more than this share of the windows may hold a good passage, one list more is added up.
MANY_WINDOWS = 0.15
#: A score that is at least this part of another may be equal to it as float32.
TIED = 1 - 1e-6

#: Memory for the scores of a part's rows, all 0, that searches leave to those after them; 8 bytes a row.
_scratch: deque[np.ndarray] = deque(maxlen=4)


@dataclass(frozen=True)
class Weights:
    """What a term, and a token, count."""

    #: (terms,) occurrences in the query x inverse document frequency x (k1 + 1), the rarest term first
    terms: list[float]
    #: the fixed part of a passage's norm, and that for each of its tokens
    norms: tuple[float, float]
    #: tokens of a passage on average
    mean: float


@dataclass(frozen=True)
class Term:
    """A term of the query that a part holds."""

    number: int
    weight: float
    entries: int


class _Touched:
    """The rows of the lists that were added up."""

    def __init__(self) -> None:
        self._lists: list[np.ndarray] = []
        self._all: np.ndarray | None = None
        #: whether `rows` may name a row several times
        self.double = False

    def add(self, rows: np.ndarray) -> None:
        """Note the rows of one list more."""
        self._lists.append(rows)
        self._all = None

    def rows(self, scores: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
        """The rows that count, in no order."""
        if self._all is None:
            self.double = len(self._lists) > 1
            if sum(map(len, self._lists)) * 8 > len(scores):
                self._all, self.double = np.flatnonzero(scores > 0), False
            else:
                self._all = np.concatenate([np.zeros(0, np.int64), *self._lists])
            if allowed is not None:
                self._all = self._all[allowed[self._all]]
        return self._all

    def best(self, scores: np.ndarray, count: int, floor: float, allowed: np.ndarray | None) -> np.ndarray:
        """The rows with the highest scores, so many and those that tie, ascending; none below `floor`."""
        rows = self.rows(scores, allowed)
        found = scores[rows]
        most = count * (len(self._lists) if self.double else 1)
        if len(rows) > most:
            floor = max(floor, np.partition(found, len(found) - most)[len(found) - most])
        rows = rows[found >= floor * TIED]
        if not self.double:
            return rows
        rows = _distinct(rows)
        if len(rows) > count:
            found = scores[rows]
            rows = rows[found >= np.partition(found, len(found) - count)[len(found) - count] * TIED]
        return rows

    def clear(self, scores: np.ndarray) -> None:
        """Set the scores of all rows to 0 again."""
        if sum(map(len, self._lists)) * 4 > len(scores):
            scores.fill(0)
        else:
            for rows in self._lists:
                scores[rows] = 0


def _distinct(rows: np.ndarray) -> np.ndarray:
    """Each row once, ascending."""
    rows = np.sort(rows)
    return rows[np.diff(rows, prepend=-1) > 0]


class PartSearch:
    """One query in one part."""

    def __init__(self, part: Part, numbers: Sequence[int], weights: Weights) -> None:
        """`numbers` are the lists of the terms, -1 where the part has none."""
        self._lists: Lists = part.segment.lists
        self._lengths, self._norms, self._rows = part.segment.lengths, weights.norms, part.segment.rows
        #: how much more a passage may score than when its segment was made, whose mean length was another
        self._growth = max(1.0, weights.mean * self._rows / max(1, part.segment.tokens))
        self._terms = []
        for number, weight in zip(numbers, weights.terms, strict=True):
            if number >= 0:
                self._terms.append(Term(number, weight, self._lists.count(number)))

    def scores_of(self, rows: np.ndarray) -> np.ndarray:
        """The scores of rows, which are ascending and each there once; float64."""
        scores = np.zeros(len(rows))
        for term in self._terms:
            self._add_to(rows, scores, term)
        return scores

    def best(self, k: int, floor: float, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows that may be among the k best of all parts, and their scores as float32.

        Args:
            floor: what k passages of other parts reach; -inf where there are not as many.
            allowed: (rows,) which of the rows count; None: all.
        """
        if allowed is not None:
            rows = np.flatnonzero(allowed)
            if len(rows) * 32 < sum(term.entries for term in self._terms):
                return self._cut(rows, self.scores_of(rows), k, floor)
        held, touched = self._zeros(), _Touched()
        scores = held[: self._lists.windows * WINDOW]
        try:
            rest, sure = self._narrow(scores, touched, self._add_first(scores, touched), k, floor, allowed)
            if not rest:
                rows = touched.best(scores, k, sure, allowed)
                return self._cut(rows, scores[rows], k, sure)
            return self._finish(scores, touched, rest, k, sure, allowed)
        finally:
            touched.clear(scores)
            _scratch.append(held)

    def _zeros(self) -> np.ndarray:
        """A 0 for each row of all windows, or more of them."""
        size = self._lists.windows * WINDOW
        try:
            held = _scratch.pop()
        except IndexError:
            return np.zeros(size)
        return held if len(held) >= size else np.zeros(size)

    def _add_first(self, scores: np.ndarray, touched: _Touched) -> list[Term]:
        """Add up the lists before the first long one; return the terms left."""
        for place, term in enumerate(self._terms):
            if term.entries > LONG_LIST and self._lists.dense(term.number):
                return self._terms[place:]
            self._add(scores, touched, term)
        return []

    def _add(self, scores: np.ndarray, touched: _Touched, term: Term) -> None:
        rows = self._lists.rows(term.number)
        touched.add(rows)
        scores[rows] += self._gain(term, rows, self._lists.numbers(term.number))

    def _narrow(
        self,
        scores: np.ndarray,
        touched: _Touched,
        rest: list[Term],
        k: int,
        floor: float,
        allowed: np.ndarray | None,
    ) -> tuple[list[Term], float]:
        """Add up long lists until few windows without the terms before can win; return those left, and what wins."""
        while rest:
            most = self._most(rest)
            floor = max(floor, self._known(scores, touched, rest, most, k, allowed))
            if np.count_nonzero(most >= floor * TIED) <= MANY_WINDOWS * len(most):
                break
            self._add(scores, touched, rest[0])
            rest = rest[1:]
        return rest, floor

    def _most(self, terms: Sequence[Term]) -> np.ndarray:
        """The most that terms can add to a passage of each window, (windows,)."""
        most = np.zeros(self._lists.windows)
        for term in terms:
            most += self._most_of(term)
        return most

    def _most_of(self, term: Term) -> np.ndarray | float:
        if not self._lists.dense(term.number):
            return term.weight
        return self._lists.most(term.number) * (term.weight * self._growth / 255)

    def _known(
        self,
        scores: np.ndarray,
        touched: _Touched,
        rest: list[Term],
        most: np.ndarray,
        k: int,
        allowed: np.ndarray | None,
    ) -> float:
        """A score that k passages of this part reach, -inf where none is found."""
        rows = touched.best(scores, PROBES * k, 0.0, allowed)
        if len(rows) >= k:
            rows = rows[: PROBES * k]
            found = scores[rows]
            for term in rest:
                self._add_to(rows, found, term)
        else:
            windows = min(len(most), FIRST_WINDOWS)
            rows, found = self._read(scores, np.argpartition(most, len(most) - windows)[len(most) - windows :], rest)
            if allowed is not None:
                found = found[allowed[rows]]
        return float(np.partition(found, len(found) - k)[len(found) - k]) if len(found) >= k else -np.inf

    def _read(self, scores: np.ndarray, windows: np.ndarray, rest: list[Term]) -> tuple[np.ndarray, np.ndarray]:
        """The rows of windows and their full scores; the windows are sorted here."""
        windows = np.sort(windows)
        found = scores.reshape(-1, WINDOW)[windows].ravel()
        rows = ((windows << 8)[:, None] + np.arange(WINDOW)).ravel()
        for term in rest:
            if self._lists.dense(term.number):
                cells, places = self._lists.in_windows(term.number, windows)
                found[cells] += self._gain(term, rows[cells], self._lists.numbers_at(term.number, places))
            else:
                self._add_to(rows, found, term)
        there = rows < self._rows
        return rows[there], found[there]

    def _finish(
        self,
        scores: np.ndarray,
        touched: _Touched,
        rest: list[Term],
        k: int,
        floor: float,
        allowed: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read the windows that can win by the long lists alone, and look up the passages known so far elsewhere."""
        most, wins = self._most(rest), floor * TIED
        whole = most >= wins
        rows, found = self._read(scores, np.flatnonzero(whole), rest)
        kept = found >= wins if allowed is None else (found >= wins) & allowed[rows]
        known = touched.rows(scores, allowed)
        partial = scores[known]
        known = known[(partial + most[known >> 8] >= wins) & ~whole[known >> 8]]
        known = _distinct(known) if touched.double else known
        partial = scores[known]
        for place, term in enumerate(rest):
            if place:
                able = partial + self._most(rest[place:])[known >> 8] >= wins
                known, partial = known[able], partial[able]
            self._add_to(known, partial, term)
        rows, found = np.concatenate([rows[kept], known]), np.concatenate([found[kept], partial])
        return self._cut(rows, found, k, floor)

    def _cut(self, rows: np.ndarray, scores: np.ndarray, k: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
        """The k best and all that tie with the k-th, without what is known to be worse."""
        rounded = scores.astype(np.float32)
        good = rounded > 0 if floor <= 0 else rounded >= np.float32(floor * TIED)
        rows, rounded = rows[good], rounded[good]
        kept = top(rounded, k)
        return rows[kept], rounded[kept]

    def _add_to(self, rows: np.ndarray, scores: np.ndarray, term: Term) -> None:
        """Add a term's gain to the scores of given rows, which are ascending."""
        held, places = self._lists.lookup(term.number, rows)
        if len(held):
            scores[held] += self._gain(term, rows[held], self._lists.numbers_at(term.number, places))

    def _gain(self, term: Term, rows: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        """weight x tf / (tf + k1 (1 - b + b length / mean)), with the (k1 + 1) inside the weight."""
        norms = self._lengths[rows] * self._norms[1]
        norms += self._norms[0]
        norms += frequencies
        gain = frequencies * term.weight
        gain /= norms
        return gain
