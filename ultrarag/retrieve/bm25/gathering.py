"""From passages to the lists of a segment: those just written are gathered, then inverted; segments are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ultrarag.retrieve.bm25.lists import Inverted, united
from ultrarag.retrieve.bm25.segment import Segment, compressed
from ultrarag.retrieve.bm25.terms import MOST_FREQUENT
from ultrarag.retrieve.bm25.vocabulary import Vocabulary

#: Entries of a merge that are decoded at a time: 32 bytes each.
PIECE_ENTRIES = 1 << 21


class Batch:
    """Passages as they came: their ids, the numbers of their tokens, and their facts."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.ids: list[bytes] = []
        #: pieces of (numbers of terms, the row that each is in), and the same of facts with their numbers
        self._tokens: list[tuple[np.ndarray, np.ndarray]] = []
        self._facts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[bytes], texts: Sequence[str], facts: Sequence[Sequence[tuple[str, float]]]) -> None:
        """Add passages."""
        base = len(self.ids)
        numbers, rows = self.vocabulary.numbers(texts)
        self.ids += ids
        self._tokens.append((numbers, rows + base))
        known, counts = self.vocabulary.facts, [len(of) for of in facts]
        if sum(counts):
            held = np.array([known[fact] for of in facts for fact, _ in of], np.int32)
            values = np.array([number for of in facts for _, number in of], np.float64)
            self._facts.append((held, np.repeat(np.arange(len(facts)), counts) + base, values))

    def extend(self, other: Batch) -> None:
        """Add the passages of another batch of the same vocabulary."""
        base = len(self.ids)
        self.ids += other.ids
        self._tokens += [(numbers, rows + base) for numbers, rows in other._tokens]
        self._facts += [(facts, rows + base, numbers) for facts, rows, numbers in other._facts]

    def compressed(self, alive: np.ndarray, k1: float, b: float) -> list[bytes]:
        """The bytes of a segment of the passages that are alive, (len(self),) bool."""
        ids = [id for id, lives in zip(self.ids, alive.tolist(), strict=True) if lives]
        terms, term_rows = (np.concatenate(column) for column in zip(*self._tokens, strict=True))
        if not alive.all():
            new_row, kept = alive.cumsum() - 1, alive[term_rows]
            terms, term_rows = terms[kept], new_row[term_rows[kept]]
        lengths = np.bincount(term_rows, minlength=len(ids))
        id_lengths = np.fromiter(map(len, ids), np.int64)
        id_bytes = np.frombuffer(b"".join(ids), np.uint8)
        lists = self._inverted(terms, term_rows, alive, len(ids))
        return compressed(id_lengths, id_bytes, lengths, [lists], k1, b)

    def _inverted(self, terms: np.ndarray, term_rows: np.ndarray, alive: np.ndarray, rows: int) -> Inverted:
        facts, fact_rows, numbers = self._living_facts(alive)
        known = np.array(self.vocabulary.keys, np.uint64)
        held = np.zeros(len(known), bool)
        held[terms] = held[facts] = True
        used = np.flatnonzero(held)
        keys = known[used]
        order = np.argsort(keys)
        rank = np.empty(len(known), np.int64)
        rank[used[order]] = np.arange(len(used))
        cells, frequencies = _counted(rank[terms] * rows + term_rows)
        fact_cells = rank[facts] * rows + fact_rows
        cells, numbers = np.concatenate([cells, fact_cells]), np.concatenate([frequencies, numbers])
        if len(facts):
            sorted_ = np.argsort(cells, kind="stable")
            cells, numbers = cells[sorted_], numbers[sorted_]
        lists, entry_rows = np.divmod(cells, rows)
        return Inverted(keys[order], np.bincount(lists, minlength=len(used)), entry_rows, numbers)

    def _living_facts(self, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0))
        facts, rows, numbers = (np.concatenate(column) for column in zip(nothing, *self._facts, strict=True))
        kept = alive[rows]
        return facts[kept], (alive.cumsum() - 1)[rows[kept]], numbers[kept]


def _counted(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and how often each occurs, up to MOST_FREQUENT."""
    cells = np.sort(cells)
    first = np.flatnonzero(np.diff(cells, prepend=-1))
    frequencies = np.diff(first, append=len(cells)).astype(np.float64)
    return cells[first], np.minimum(frequencies, MOST_FREQUENT)


def merged(
    segments: Sequence[tuple[Segment, np.ndarray | None]],
    k1: float,
    b: float,
    check: Callable[[], None] = lambda: None,
) -> list[bytes]:
    """The bytes of one segment of what lives in several, in their order.

    Args:
        segments: each with which of its rows are dead, (rows,) bool; None: none.
        check: called between pieces; what it raises ends the merge.
    """
    parts = [_living(segment, dead) for segment, dead in segments]
    id_lengths, id_bytes, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
    pieces = _merged_lists(segments, [len(part[2]) for part in parts], check)
    return compressed(id_lengths, id_bytes, lengths, pieces, k1, b)


def _living(segment: Segment, dead: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    id_lengths, id_bytes = segment.ids_between(0, segment.rows)
    if dead is None:
        return id_lengths, id_bytes, segment.lengths.astype(np.int64)
    return id_lengths[~dead], id_bytes[np.repeat(~dead, id_lengths)], segment.lengths[~dead].astype(np.int64)


def _merged_lists(
    segments: Sequence[tuple[Segment, np.ndarray | None]], counts: Sequence[int], check: Callable[[], None]
) -> Iterator[Inverted]:
    """The lists of several segments, joined, from one range of keys to the next: keys are evenly spread digests."""
    ranges = 1 + sum(segment.lists.entries for segment, _ in segments) // PIECE_ENTRIES
    bounds = [(i << 64) // ranges for i in range(ranges)]
    for low, high in zip(bounds, [*bounds[1:], None], strict=True):
        check()
        base, pieces = 0, []
        for (segment, dead), count in zip(segments, counts, strict=True):
            pieces.append(_moved(segment.lists.between(low, high), dead, base))
            base += count
        yield united(pieces)


def _moved(lists: Inverted, dead: np.ndarray | None, base: int) -> Inverted:
    """Lists without the rows that are dead, where the first living row is number `base`."""
    if dead is None:
        return Inverted(lists.keys, lists.counts, lists.rows + base, lists.numbers)
    kept = ~dead[lists.rows]
    of = np.repeat(np.arange(len(lists.keys)), lists.counts)
    counts = np.bincount(of[kept], minlength=len(lists.keys))
    there = counts > 0
    rows = (np.cumsum(~dead) - 1 + base)[lists.rows[kept]]
    return Inverted(lists.keys[there], counts[there], rows, lists.numbers[kept])
