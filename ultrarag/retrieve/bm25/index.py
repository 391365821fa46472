"""BM25 over a corpus that changes: immutable segments of inverted lists, with exact statistics after every write.

It knows no model, so that all generations of a live index share one. Passages are gathered, become a segment when a
search or a flush comes, and segments of about one size are merged into one beside all else (docs/bm25.md). A search
works on one state of the index, without a lock. Dead passages are left out when they are counted, so that the number
of passages, their mean length and every document frequency are always those of the living.
"""

from __future__ import annotations

import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import OwnerLock, read_seal, remove_seal, resource_error, seal, verify_seal
from ultrarag.retrieve.bm25.merging import Merger
from ultrarag.retrieve.bm25.part import Part
from ultrarag.retrieve.bm25.segment import id_hashes, norms
from ultrarag.retrieve.bm25.store import Bm25File, View
from ultrarag.retrieve.bm25.terms import key, tokenize
from ultrarag.retrieve.bm25.topk import PartSearch, Weights
from ultrarag.retrieve.ranking import Scored, check_ids, check_k, ranked, top
from ultrarag.retrieve.search import Filter, Node, facts, mask, parse

#: Saturation of the term frequency and strength of the length normalisation: Lucene's defaults. On our five data
#: sets k1 = 0.9, b = 0.4 moves nDCG@10 by at most 0.015, up on three and down on one.
K1, B = 1.2, 0.75


class BM25:
    """A BM25 index over one directory; writes are seen at once, and durable once `flush` has returned."""

    def __init__(self, directory: Path, read_only: bool = False) -> None:
        self.directory, self.read_only = directory, read_only
        self._mutex = threading.RLock()
        with _named(directory):
            self._lock = OwnerLock(directory, read_only=read_only)
        self._store: Bm25File | None = None
        self._merger: Merger | None = None
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
        # sealed files were just compared; others only the checksums of their segments speak for
        return index._start(lambda path: Bm25File.open(path, read_only, verify and index._dirty))

    def upsert(self, ids: Sequence[str], texts: Sequence[str], payloads: Sequence[Mapping[str, Any]]) -> None:
        """Insert passages, or replace those with the same id; of an id twice in one call the last wins."""
        check_ids(ids)
        if not len(ids) == len(texts) == len(payloads):
            raise UsageError(f"{len(ids)} ids, {len(texts)} texts and {len(payloads)} payloads: they must be as many")
        last = {id: row for row, id in enumerate(ids)}
        found = [facts(payloads[row]) for row in last.values()]
        with self._writing() as store:
            batch = store.batch()
            batch.add([_encode(id) for id in last], [texts[row] for row in last.values()], found)
            store.append(batch)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete passages; ids that are not stored are ignored."""
        check_ids(ids)
        with self._writing() as store:
            store.delete([_encode(id) for id in ids])

    def search(self, query: str, k: int, filter: Filter = None) -> list[Scored]:
        """The k passages that share a term with the query and pass the filter, by score; ties by id."""
        k, node = check_k(k), parse(filter)
        with self._reading() as store:
            view = store.view()
            numbers, weights = _weighed(view, query, store.k1, store.b)
            floor, found = -np.inf, []
            for part, lists in _largest_first(view.parts, numbers):
                searched = PartSearch(part, lists, weights)
                rows, scores = searched.best(k, floor, _allowed(part, node))
                if len(rows):
                    found.append((part, rows, scores))
                    floor = _kth([scores for _, _, scores in found], k)
            return _ranked(found, k)

    def score(self, query: str, ids: Sequence[str]) -> np.ndarray:
        """Scores of given passages, (len(ids),); 0 without a common term, NaN for an id that is not stored."""
        with self._reading() as store:
            view = store.view()
            numbers, weights = _weighed(view, query, store.k1, store.b)
            encoded = [_encode(id) for id in ids]
            hashes, scores = id_hashes(encoded), np.full(len(ids), np.nan)
            for part, lists in zip(view.parts, numbers, strict=True):
                rows = part.find(encoded, hashes)
                distinct, which = np.unique(rows[rows >= 0], return_inverse=True)
                if len(distinct):
                    found = PartSearch(part, lists, weights).scores_of(distinct)
                    scores[rows >= 0] = found.astype(np.float32)[which]
            return scores

    def count(self) -> int:
        """The number of passages."""
        with self._reading() as store:
            return store.count

    def ids(self) -> Iterator[str]:
        """Iterate over the ids, in no order."""
        with self._reading() as store:
            parts = store.view().parts
        return (_decode(id) for part in parts for id in part.segment.id_bytes(part.alive()))

    def flush(self) -> None:
        """Make every write so far durable."""
        with self._writing() as store:
            store.commit()

    def vacuum(self) -> None:
        """Drop what deleted passages left behind, and make all segments one; searches go on meanwhile."""
        with self._writing() as store:
            store.commit()
            if self._merger is not None:
                self._merger.stop()
            parts = store.parts
            if len(parts) > 1 or any(part.dead is not None for part in parts):
                store.merge(parts)
            store.commit()

    def close(self) -> None:
        """Flush, write the checksum, and let another owner in; closing twice is harmless."""
        with self._mutex:
            if self._store is None:
                return
            if self._merger is not None:
                try:
                    self.flush()
                finally:
                    self._merger.stop()  # last: a flush may have begun one
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
                if not self.read_only:
                    self._merger = Merger(self._store)
        except BaseException:
            self._lock.release()
            raise
        return self

    @contextmanager
    def _reading(self) -> Iterator[Bm25File]:
        with _named(self.directory):
            store = self._store
            if store is None:
                raise IndexStateError(f"'{self.directory}' was closed; open it again")
            yield store

    @contextmanager
    def _writing(self) -> Iterator[Bm25File]:
        """Undo everything since the last flush when a write fails, so that memory and file agree."""
        if self.read_only:
            raise IndexStateError(f"'{self.directory}' is open for reading")
        with self._mutex, self._reading() as store:
            self._dirty = True
            try:
                yield store
            except BaseException:
                store.rollback()
                raise
            if self._merger is not None:
                self._merger.tend()


def _weighed(view: View, query: str, k1: float, b: float) -> tuple[list[list[int]], Weights]:
    """The lists of the query's terms in each part, and what each term counts; the rarest first."""
    occurrences = Counter(tokenize(query))
    keys = np.array([key("term", token) for token in occurrences], np.uint64)
    numbers = [part.segment.lists.find(keys) for part in view.parts]
    frequencies = [0] * len(keys)
    for part, lists in zip(view.parts, numbers, strict=True):
        for place, number in enumerate(lists):
            if number >= 0:
                frequencies[place] += part.living(number)
    order = sorted(
        (df, digest, place) for place, (df, digest) in enumerate(zip(frequencies, keys.tolist(), strict=True))
    )
    places, weights = [place for df, _, place in order if df], []
    often = list(occurrences.values())
    for place in places:
        df = frequencies[place]
        weights.append(often[place] * math.log1p((view.count - df + 0.5) / (df + 0.5)) * (k1 + 1))
    mean = view.tokens / view.count if view.tokens else 1.0
    return [[lists[place] for place in places] for lists in numbers], Weights(weights, norms(k1, b, mean), mean)


def _largest_first(parts: Sequence[Part], numbers: list[list[int]]) -> list[tuple[Part, list[int]]]:
    """Parts that hold a term: what is found in the largest lets most of the others be passed over."""
    held = [(part, lists) for part, lists in zip(parts, numbers, strict=True) if max(lists, default=-1) >= 0]
    return sorted(held, key=lambda pair: -pair[0].count)


def _allowed(part: Part, node: Node | None) -> np.ndarray | None:
    """Which rows of a part live and pass the filter; None: all."""
    if node is None:
        return None if part.dead is None else ~part.dead
    lists = part.segment.lists

    def lookup(fact: str) -> tuple[np.ndarray, np.ndarray]:
        number = lists.find(np.array([key("fact", fact)], np.uint64))[0]
        if number < 0:
            return np.zeros(0, np.int64), np.zeros(0)
        return lists.rows(number), lists.numbers(number)

    passing = mask(node, lookup, part.segment.rows)
    return passing if part.dead is None else passing & ~part.dead


def _kth(scores: list[np.ndarray], k: int) -> float:
    """The k-th best of some scores; -inf where there are not as many."""
    found = np.concatenate(scores)
    return float(np.partition(found, len(found) - k)[len(found) - k]) if len(found) >= k else -np.inf


def _ranked(found: list[tuple[Part, np.ndarray, np.ndarray]], k: int) -> list[Scored]:
    """The k best of all parts; the ids of those that tie with the k-th, which may be many, are read only as needed."""
    if not found:
        return []
    scores = np.concatenate([part_scores for _, _, part_scores in found])
    last = scores[top(scores, k)].min()
    above = [(part, rows[scores > last], scores[scores > last]) for part, rows, scores in found]
    ids = [_decode(id) for part, rows, _ in above for id in part.segment.id_bytes(rows)]
    best = ranked(ids, np.concatenate([scores for _, _, scores in above]), k)
    tied = [(part, rows[scores == last]) for part, rows, scores in found]
    return best + [(id, float(last)) for id in first_ids(tied, k - len(best))]


def first_ids(tied: Sequence[tuple[Part, np.ndarray]], count: int) -> list[str]:
    """The first so many ids, in their order, of rows of parts."""
    first: list[bytes] = []
    for part, rows in tied:
        first += part.segment.id_bytes(_first_rows(part, rows, count))
    return [_decode(id) for id in sorted(first)[:count]]


def _first_rows(part: Part, rows: np.ndarray, count: int) -> np.ndarray:
    """Those rows whose ids can be among the first so many: of very many, most are left out by eight bytes at a time."""
    sure, word = [np.zeros(0, np.int64)], 0
    while len(rows) > 4 * count + 64 and count > 0 and word < 8:
        words = part.segment.id_words(rows, word)
        last = np.partition(words, count - 1)[count - 1]
        sure.append(rows[words < last])
        count -= len(sure[-1])
        rows, word = rows[words == last], word + 1
    return np.concatenate([*sure, rows])


def _encode(id: str) -> bytes:
    return id.encode("utf-8", "surrogatepass")


def _decode(id: bytes) -> str:
    return id.decode("utf-8", "surrogatepass")


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
