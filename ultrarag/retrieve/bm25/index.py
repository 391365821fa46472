"""BM25 over a corpus that changes: inverted lists in one SQLite file, with exact statistics after every write.

It knows no model, so that all generations of a live index share one. A passage gets the next row number; a deleted
or replaced one leaves its row dead until `vacuum`. Rows not yet sealed are kept as they came (`docs.forward`) and
in memory; every 8,192 rows are sealed into one blob per term. Dead rows are left out when a list is read, so that
the number of passages, their mean length and every document frequency are always those of the living.
"""

from __future__ import annotations

import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import OwnerLock, read_seal, remove_seal, resource_error, seal, verify_seal
from ultrarag.retrieve.bm25.store import Bm25File
from ultrarag.retrieve.bm25.terms import tokenize
from ultrarag.retrieve.ranking import Scored, check_ids, check_k, ranked, top
from ultrarag.retrieve.search import Filter, facts, mask, parse

#: Saturation of the term frequency and strength of the length normalisation: Lucene's defaults. On our five data
#: sets k1 = 0.9, b = 0.4 moves nDCG@10 by at most 0.015, up on three and down on one.
K1, B = 1.2, 0.75
#: A list shorter than this is simply added up; before a longer one it pays to ask who can still win.
LONG_LIST = 20_000
#: A score that is at least this part of another may be equal to it as float32.
TIED = 1 - 1e-6


class Term(NamedTuple):
    """A term of a query: its rows, ascending, what each scores, and the most that any could."""

    rows: np.ndarray
    frequencies: np.ndarray
    weight: float  # occurrences in the query x inverse document frequency x (k1 + 1)


class BM25:
    """A BM25 index over one directory; writes are seen at once, and durable once `flush` has returned."""

    def __init__(self, directory: Path, read_only: bool = False) -> None:
        self.directory, self.read_only = directory, read_only
        self._mutex = threading.RLock()
        with _named(directory):
            self._lock = OwnerLock(directory, read_only=read_only)
        self._store: Bm25File | None = None
        self._sums: dict[str, Any] = {}
        self._dirty = True

    @classmethod
    def create(cls, directory: str | Path, k1: float = K1, b: float = B) -> BM25:
        """Create an empty index in a directory that is missing or empty.

        Raises:
            UsageError: for k1 below 0, or b outside 0..1.
            IndexStateError: when the directory is not empty.
        """
        if not (k1 >= 0 and math.isfinite(k1) and 0 <= b <= 1):
            raise UsageError(f"BM25: k1 is {k1} and b is {b}; k1 is at least 0, b between 0 and 1")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise IndexStateError(f"'{directory}' is not empty; open what it holds, or name another directory")
        return cls(directory)._start(lambda path: Bm25File.create(path, k1, b))

    @classmethod
    def open(cls, directory: str | Path, verify: bool = True, read_only: bool = False) -> BM25:
        """Open an index; `verify` compares its file with the checksum written when it was closed.

        Args:
            read_only: for searches alone; nothing in the directory changes.

        Raises:
            ResourceError: when the machine does not allow it now; nothing is damaged then.
            IndexStateError: when there is none, it is in use by another owner, or damaged.
        """
        directory = Path(directory)
        if not (directory / Bm25File.FILE).is_file():
            raise IndexStateError(f"'{directory}' holds no BM25 index: '{Bm25File.FILE}' is missing")
        index = cls(directory, read_only)
        try:
            with _named(directory):
                index._sums = verify_seal(directory) if verify else read_seal(directory)
        except BaseException:
            index._lock.release()
            raise
        index._dirty = not index._sums
        return index._start(lambda path: Bm25File.open(path, read_only))

    def upsert(self, ids: Sequence[str], texts: Sequence[str], payloads: Sequence[Mapping[str, Any]]) -> None:
        """Insert passages, or replace those with the same id; of an id twice in one call the last wins."""
        check_ids(ids)
        if not len(ids) == len(texts) == len(payloads):
            raise UsageError(f"{len(ids)} ids, {len(texts)} texts and {len(payloads)} payloads: they must be as many")
        last = {id: row for row, id in enumerate(ids)}
        # the slow part, outside the lock: searches go on
        entries = [(id, Counter(tokenize(texts[row])), facts(payloads[row])) for id, row in last.items()]
        with self._writing() as store:
            store.delete(list(last))
            for id, terms, found in entries:
                store.append(id, terms, found)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete passages; ids that are not stored are ignored."""
        check_ids(ids)
        with self._writing() as store:
            store.delete(ids)

    def search(self, query: str, k: int, filter: Filter = None) -> list[Scored]:
        """The k passages that share a term with the query and pass the filter, by score; ties by id."""
        k, node = check_k(k), parse(filter)
        with self._reading() as store:
            passing = None if node is None else mask(node, store.facts, store.rows)
            rows, scores = _search(self._terms(store, query), store, k, passing)
            return _best(store, rows, scores.astype(np.float32), k)

    def score(self, query: str, ids: Sequence[str]) -> np.ndarray:
        """Scores of given passages, (len(ids),); 0 without a common term, NaN for an id that is not stored."""
        with self._reading() as store:
            rows = [store.row_of(id) for id in ids]
            known = np.array(sorted({row for row in rows if row is not None}), np.int64)
            scores = np.zeros(len(known))
            for term in self._terms(store, query):
                _add_to(known, scores, term, store)
            found = dict(zip(known.tolist(), scores.tolist(), strict=True))
            return np.array([np.nan if row is None else found[row] for row in rows], np.float32).astype(np.float64)

    def count(self) -> int:
        """The number of passages."""
        with self._reading() as store:
            return store.count

    def ids(self) -> Iterator[str]:
        """Iterate over the ids, in no order."""
        with self._reading() as store:
            return iter(store.all_ids())

    def flush(self) -> None:
        """Make every write so far durable."""
        with self._writing() as store:
            store.commit()

    def vacuum(self) -> None:
        """Drop what deleted passages left behind, and join small segments; searches wait meanwhile."""
        with self._writing() as store:
            store.vacuum()

    def close(self) -> None:
        """Flush, write the checksum, and let another owner in; closing twice is harmless."""
        with self._mutex:
            if self._store is None:
                return
            if not self.read_only:
                self.flush()
            self._store.close()
            self._store = None
            try:
                if not self.read_only:
                    seal(self.directory, known=None if self._dirty else self._sums)
            finally:
                self._lock.release()

    def _start(self, load: Any) -> BM25:
        try:
            with _named(self.directory):
                if not self.read_only:
                    remove_seal(self.directory)  # first: SQLite changes its files as it likes from here on
                self._store = load(self.directory / Bm25File.FILE)
        except BaseException:
            self._lock.release()
            raise
        return self

    @contextmanager
    def _reading(self) -> Iterator[Bm25File]:
        with self._mutex, _named(self.directory):
            if self._store is None:
                raise IndexStateError(f"'{self.directory}' was closed; open it again")
            yield self._store

    @contextmanager
    def _writing(self) -> Iterator[Bm25File]:
        """Undo everything since the last flush when a write fails, so that memory and file agree."""
        if self.read_only:
            raise IndexStateError(f"'{self.directory}' is open for reading")
        with self._reading() as store:
            self._dirty = True
            try:
                yield store
            except BaseException:
                store.rollback()
                raise

    def _terms(self, store: Bm25File, query: str) -> list[Term]:
        """The query's terms that some living passage holds, the heaviest first."""
        terms = []
        for token, occurrences in Counter(tokenize(query)).items():
            rows, frequencies = store.postings(token)
            if len(rows):
                rarity = math.log1p((store.count - len(rows) + 0.5) / (len(rows) + 0.5))
                terms.append(Term(rows, frequencies, occurrences * rarity * (store.k1 + 1)))
        return sorted(terms, key=lambda term: -term.weight)


def _search(terms: list[Term], store: Bm25File, k: int, passing: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows that may be among the k best, and their scores; exact, although common words are mostly skipped.

    Once k passages score more than all the words left could add up to, no other passage can win: the long lists
    of common words, which weigh least and come last, are looked up for the remaining candidates only (MaxScore;
    Turtle and Flood, 1995).
    """
    scores = np.zeros(store.rows)
    left = sum(term.weight for term in terms)
    for number, term in enumerate(terms):
        if number and len(term.rows) > LONG_LIST:
            rows = _positive(scores, passing)
            if len(rows) >= k:
                threshold = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
                if left < threshold * TIED:
                    return _finish(rows, scores[rows], terms[number:], store, k)
        scores[term.rows] += _gain(term, term.rows, term.frequencies, store)
        left -= term.weight
    rows = _positive(scores, passing)
    return rows, scores[rows]


def _best(store: Bm25File, rows: np.ndarray, scores: np.ndarray, k: int) -> list[Scored]:
    """The k best of these rows; the ids of those that tie with the k-th, which may be many, are read only as needed."""
    places = top(scores, k)
    last = scores[places].min(initial=np.inf)
    above, tied = places[scores[places] > last], places[scores[places] == last]
    best = ranked(store.ids_of(rows[above]), scores[above], k)
    return best + [(id, float(last)) for id in store.first_ids(rows[tied], k - len(best))]


def _finish(
    rows: np.ndarray, scores: np.ndarray, terms: list[Term], store: Bm25File, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add the remaining terms to the candidates, and drop those that can no longer reach the k-th place."""
    left = sum(term.weight for term in terms)
    for term in terms:
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        able = scores + left >= threshold * TIED
        rows, scores = rows[able], scores[able]
        _add_to(rows, scores, term, store)
        left -= term.weight
    return rows, scores


def _add_to(rows: np.ndarray, scores: np.ndarray, term: Term, store: Bm25File) -> None:
    """Add a term's gain to the scores of given rows, which are ascending."""
    places = np.searchsorted(term.rows, rows)
    places[places == len(term.rows)] = 0
    held = term.rows[places] == rows
    places = places[held]
    scores[held] += _gain(term, term.rows[places], term.frequencies[places], store)


def _gain(term: Term, rows: np.ndarray, frequencies: np.ndarray, store: Bm25File) -> np.ndarray:
    """weight x tf / (tf + k1 (1 - b + b length / mean length)), with the (k1 + 1) inside the weight."""
    return term.weight * frequencies / (frequencies + store.norms()[rows])


def _positive(scores: np.ndarray, passing: np.ndarray | None) -> np.ndarray:
    return np.flatnonzero(scores if passing is None else (scores > 0) & passing)


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Say which file an error of SQLite is about."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if found := resource_error(error, directory / Bm25File.FILE):
            raise found from error
        raise IndexStateError(
            f"'{directory / Bm25File.FILE}': {error}; nothing that was flushed is lost unless the file is damaged, "
            f"and then it can be rebuilt from the passages"
        ) from error
