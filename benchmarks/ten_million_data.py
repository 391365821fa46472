"""The passages of `ten_million.py`: made from their numbers, block by block, so that no process holds them all.

A vector is the unit sum of one of 200 fields, one of its 100 topics and noise in 64 directions (0.5, 0.5, 0.7 of unit
length), so that two of one topic have a cosine of 0.5, and two of one field 0.25. (Those of `live_index_contenders.py`
are three quarters noise in 32 directions, of which no partition of the space finds the nearest.) Texts are a number and
eight words whose frequencies follow Zipf's law; metadata have two keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from live_index_contenders import WORDS

DIM, BLOCK, WORDS_OF_A_PASSAGE, WORDS_OF_A_QUERY = 384, 8192, 8, 6
FIELDS, TOPICS, DIRECTIONS, SHARED, NOISE = 200, 100, 64, 0.5, 0.7
#: What a hundredth of all passages passes.
FILTER = {"hundredth": 3}
#: Passages whose vectors a swap compares with the encoder's own, as `ultrarag.retrieve.swap` draws them.
SAMPLES = (8, 256)


class Corpus:
    """Passages 0 .. size - 1."""

    def __init__(self, size: int) -> None:
        self.size = size
        share = 1 / (np.arange(WORDS) + 2.7)
        self._bounds = np.cumsum(share / share.sum())
        self._words = np.array([f"w{number}" for number in range(WORDS)])

    @cached_property
    def _directions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of fields, of topics, and of noise; the first two in the length that they have in a vector."""
        rng = np.random.default_rng(1)
        fields, topics = (
            SHARED * unit(rng.standard_normal((count, DIM), np.float32)) for count in (FIELDS, FIELDS * TOPICS)
        )
        basis = np.linalg.qr(rng.standard_normal((DIM, DIRECTIONS)))[0].T
        return fields, topics, np.ascontiguousarray(basis, np.float32)

    @cached_property
    def sampled(self) -> frozenset[int]:
        """The rows that have the encoder's own vectors, and are never written again."""
        steps = [max(1, self.size // count) for count in SAMPLES]
        return frozenset(row for step in steps for row in range(0, self.size, step))

    def blocks(self, first: int = 0) -> Iterator[range]:
        """All rows from a block's first on, BLOCK at a time."""
        for start in range(first, self.size, BLOCK):
            yield range(start, min(start + BLOCK, self.size))

    def hundredth(self, digit: int) -> list[list[int]]:
        """A hundredth of the rows, BLOCK at a time; none of those that a swap looks at."""
        rows = [row for row in range(digit, self.size, 100) if row not in self.sampled]
        return [rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK)]

    def vectors(self, count: int, seed: int) -> np.ndarray:
        """Unit vectors, (count, DIM) float32."""
        fields, topics, basis = self._directions
        rng = np.random.default_rng(seed)
        own = rng.integers(len(topics), size=count)
        noise = rng.standard_normal((count, len(basis)), np.float32) * (NOISE / len(basis) ** 0.5)
        return unit(fields[own // TOPICS] + topics[own] + noise @ basis)

    def texts(self, count: int, length: int, seed: int) -> list[str]:
        """Texts of so many words."""
        drawn = self._bounds.searchsorted(np.random.default_rng(seed).random((count, length)))
        return [" ".join(row) for row in self._words[np.minimum(drawn, WORDS - 1)].tolist()]

    def passages(self, rows: Sequence[int], version: int = 0) -> list[Any]:
        """Passages of rows; another version has other texts."""
        from ultrarag.types import Passage

        words = self.texts(len(rows), WORDS_OF_A_PASSAGE, seed_of(rows, version))
        return [
            Passage(id_of(row), f"{row} {text}", metadata=metadata_of(row))
            for row, text in zip(rows, words, strict=True)
        ]


def unit(vectors: np.ndarray) -> np.ndarray:
    """In unit length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def seed_of(rows: Sequence[int], version: int) -> int:
    """A seed for a block of rows."""
    return 1000 + 10 * rows[0] + version


def id_of(row: int) -> str:
    """The id of a row: four parts of an article."""
    return f"article-{row // 4:07d}#{row % 4}"


def metadata_of(row: int) -> dict[str, Any]:
    """One of 5000 sources, and a number from 0 to 99; both are spread evenly."""
    return {"source": f"s{row // 4 % 5000}", "hundredth": mixed(row)}


def mixed(row: int) -> int:
    """0 to 99, by a hash of the row."""
    return row * 2654435761 % 2**32 // 7 % 100


def passing(rows: range) -> np.ndarray:
    """Which rows FILTER lets pass, (len(rows),) bool."""
    spread = np.arange(rows.start, rows.stop, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return spread // np.uint64(7) % np.uint64(100) == FILTER["hundredth"]


def passes(row: int) -> bool:
    """Whether FILTER lets a row pass."""
    return mixed(row) == FILTER["hundredth"]


class Best:
    """The rows with the highest inner products of each query, over all blocks."""

    def __init__(self, queries: np.ndarray, depth: int, kept: np.ndarray | None = None) -> None:
        """Begin with no rows, or with what `kept` has."""
        self._queries, self._depth = queries, depth
        #: (queries, depth) of scores, and of rows; -1 where there is none
        self.kept = kept
        if kept is None:
            self.kept = np.stack([np.full((len(queries), depth), -np.inf), np.full((len(queries), depth), -1.0)])

    def add(self, rows: np.ndarray, block: np.ndarray) -> None:
        """Look at the vectors of some rows."""
        if not len(rows):
            return
        found, most = self._queries @ block.T, min(self._depth, len(rows))
        places = np.argpartition(-found, most - 1, axis=1)[:, :most]
        self._take(np.stack([np.take_along_axis(found, places, 1), rows[places]]))

    def without(self, rows: Sequence[int]) -> None:
        """Leave out rows that are gone or have another vector now."""
        self.kept[0][np.isin(self.kept[1], rows)] = -np.inf
        self._take(self.kept[:, :, :0])

    def rows(self, k: int) -> np.ndarray:
        """The k best rows of each query, (queries, k)."""
        assert np.isfinite(self.kept[0][:, :k]).all(), "fewer rows than that"
        return self.kept[1][:, :k].astype(np.int64)

    def _take(self, more: np.ndarray) -> None:
        both = np.concatenate([self.kept, more], axis=2)
        order = np.argsort(-both[0], axis=1, kind="stable")[:, : self._depth]
        self.kept = np.stack([np.take_along_axis(part, order, 1) for part in both])
