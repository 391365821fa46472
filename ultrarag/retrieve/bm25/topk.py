"""The k best passages of a query, exact, although most of what holds its words is never looked at.

Terms are taken from the rarest to the commonest. The lists of rare ones are added up. Of the others it is known how
much they can add to a passage at most, for each 256 rows (block-max indexes; Ding and Suel, 2011): once k passages are
known to score more, only windows that can still reach them are read, and only the passages with rare terms that can
are looked up in the long lists (MaxScore; Turtle and Flood, 1995). All sums are of doubles, term by term in the same
order for every passage, and rounded to float32 at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ultrarag.retrieve.bm25.lists import WINDOW, Lists
from ultrarag.retrieve.bm25.part import Part
from ultrarag.retrieve.ranking import top

#: A list of more entries than this is not simply added up where another term was.
LONG_LIST = 8_192
#: Candidates that are scored fully, for each of the k, to know early what a good score is.
PROBES = 4
#: Windows that are read for that where no passage is known yet.
FIRST_WINDOWS = 16
#: When more than this share of the windows may hold a good passage, one list more is added up.
MANY_WINDOWS = 0.15
#: A score that is at least this part of another may be equal to it as float32.
TIED = 1 - 1e-6

_scratch = threading.local()


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
                start, end = self._lists.span(number)
                self._terms.append(Term(number, weight, end - start))

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
        scores = self._zeros()
        touched, rest = self._add_first(scores)
        rest, sure = self._narrow(scores, touched, rest, k, floor, allowed)
        if not rest:
            rows = self._positive(scores, touched, allowed)
            return self._cut(rows, scores[rows], k, floor)
        return self._finish(scores, touched, rest, k, sure, allowed)

    def _zeros(self) -> np.ndarray:
        size = self._lists.windows * WINDOW
        held: np.ndarray | None = getattr(_scratch, "scores", None)
        if held is None or len(held) < size:
            held = _scratch.scores = np.empty(size)
        scores = held[:size]
        scores.fill(0)
        return scores

    def _add_first(self, scores: np.ndarray) -> tuple[list[np.ndarray], list[Term]]:
        """Add up the lists before the first long one; return their rows, and the terms left."""
        touched: list[np.ndarray] = []
        for place, term in enumerate(self._terms):
            if term.entries > LONG_LIST and self._lists.dense(term.number):
                return touched, self._terms[place:]
            touched.append(self._add(scores, term))
        return touched, []

    def _add(self, scores: np.ndarray, term: Term) -> np.ndarray:
        rows = self._lists.rows(term.number)
        start, end = self._lists.span(term.number)
        scores[rows] += self._gain(term, rows, self._lists.numbers(start, end))
        return rows

    def _narrow(
        self,
        scores: np.ndarray,
        touched: list[np.ndarray],
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
            touched.append(self._add(scores, rest[0]))
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
        touched: list[np.ndarray],
        rest: list[Term],
        most: np.ndarray,
        k: int,
        allowed: np.ndarray | None,
    ) -> float:
        """A score that k passages of this part reach, -inf where none is found."""
        rows = self._positive(scores, touched, allowed)
        if len(rows) >= k:
            found = scores[rows]
            probes = min(len(rows), PROBES * k)
            rows = np.sort(rows[np.argpartition(found, len(found) - probes)[len(found) - probes :]])
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
                found[cells] += self._gain(term, rows[cells], self._lists.numbers_at(places))
            else:
                self._add_to(rows, found, term)
        there = rows < self._rows
        return rows[there], found[there]

    def _finish(
        self,
        scores: np.ndarray,
        touched: list[np.ndarray],
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
        known = self._positive(scores, touched, allowed)
        known = known[~whole[known >> 8]]
        partial = scores[known]
        for place, term in enumerate(rest):
            left = self._most(rest[place:]) if place else most
            able = partial + left[known >> 8] >= wins
            known, partial = known[able], partial[able]
            self._add_to(known, partial, term)
        rows, found = np.concatenate([rows[kept], known]), np.concatenate([found[kept], partial])
        return self._cut(rows, found, k, floor)

    def _positive(self, scores: np.ndarray, touched: list[np.ndarray], allowed: np.ndarray | None) -> np.ndarray:
        """The rows that hold a term added up so far, ascending."""
        if len(touched) == 1:
            rows = touched[0]
        elif sum(map(len, touched)) * 16 < len(scores):
            rows = np.sort(np.concatenate([np.zeros(0, np.int64), *touched]))
            rows = rows[np.diff(rows, prepend=-1) > 0]
        else:
            rows = np.flatnonzero(scores[: self._rows] > 0)
        return rows if allowed is None else rows[allowed[rows]]

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
            scores[held] += self._gain(term, rows[held], self._lists.numbers_at(places))

    def _gain(self, term: Term, rows: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        """weight x tf / (tf + k1 (1 - b + b length / mean)), with the (k1 + 1) inside the weight."""
        norms = self._lengths[rows] * self._norms[1]
        norms += self._norms[0]
        norms += frequencies
        gain = frequencies * term.weight
        gain /= norms
        return gain
