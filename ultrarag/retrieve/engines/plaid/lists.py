"""Lists of passages by centroid: which have a token near each of thousands of centroids, for candidates of a query.

Lists are derived: lost ones are made again from the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ultrarag.retrieve.engines.plaid.clusters import Centroids

#: Lists that are looked into for each token of a query; where a filter lets few pass, more.
PROBES = 16
#: Centroids that are compared by their best alone, to find the highest of thousands in a third of the time.
GROUP = 64


@dataclass(frozen=True)
class Part:
    """The lists of some rows, one behind the other."""

    #: centroids that have a list here, ascending, int32
    keys: np.ndarray
    #: where the list of each begins, and where the last one ends, int64
    starts: np.ndarray
    #: int32
    rows: np.ndarray

    @staticmethod
    def of(keys: np.ndarray, rows: np.ndarray) -> Part:
        """A part of entries in any order; a row is once in a list."""
        entries = np.unique((keys.astype(np.int64) << 32) | rows)
        held, starts = np.unique(entries >> 32, return_index=True)
        return Part(held.astype(np.int32), np.append(starts, len(entries)), (entries & 0xFFFFFFFF).astype(np.int32))

    def joined(self, other: Part) -> Part:
        """One part of both."""
        keys = np.concatenate([np.repeat(part.keys, np.diff(part.starts)) for part in (self, other)])
        return Part.of(keys, np.concatenate([self.rows, other.rows]))

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the lists of some centroids, and for each of them the place in `keys` that it comes from."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        starts = self.starts[places]
        sizes = np.where(self.keys[places] == keys, self.starts[places + 1] - starts, 0)
        ends = np.cumsum(sizes)
        asked = np.repeat(np.arange(len(keys)), sizes)
        return self.rows[np.arange(len(asked)) + (starts - ends + sizes)[asked]], asked


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the highest values of each row, (rows, count), in no order; fewer than all are looked at."""
    rows, width = values.shape
    whole = width // GROUP * GROUP
    if whole < 4 * count * GROUP:
        return np.argpartition(-values, count - 1, axis=1)[:, :count]
    # the highest values are in the groups with the highest maxima
    best = values[:, :whole].reshape(rows, -1, GROUP).max(2)
    groups = np.argpartition(-best, count - 1, axis=1)[:, :count]
    places = (groups[..., None] * GROUP + np.arange(GROUP)).reshape(rows, -1)
    rest = np.broadcast_to(np.arange(whole, width), (rows, width - whole))
    places = np.concatenate([places, rest], axis=1)
    inside = np.argpartition(-np.take_along_axis(values, places, 1), count - 1, axis=1)[:, :count]
    return np.take_along_axis(places, inside, 1)


class Lists:
    """The lists of the rows 0 .. `rows` - 1 of a table."""

    def __init__(self, centroids: Centroids, trained: int) -> None:
        """`trained`: how many rows there were when the centroids were chosen."""
        self.centroids, self.trained = centroids, trained
        self.rows = 0
        self.parts: list[Part] = []

    def add(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        """Add the rows that follow: all their tokens, (tokens, dim), and how many each has."""
        rows = np.repeat(np.arange(self.rows, self.rows + len(counts)), counts)
        self.rows += len(counts)
        if not len(rows):
            return
        part = Part.of(self.centroids.nearest(tokens), rows)
        while self.parts and len(part.rows) * 2 > len(self.parts[-1].rows):
            part = self.parts.pop().joined(part)
        self.parts.append(part)

    def search(self, query: np.ndarray, count: int, passing: np.ndarray | None, share: float) -> np.ndarray:
        """The rows of the best candidates for query tokens, (tokens, dim), at most `count`, in no order.

        A row gets, of each token, the product with the best centroid in whose list it is. Where it is in none that was
        looked into, it gets that of the best one which was not.

        Args:
            passing: which rows may be given, (rows,) bool; None: all.
            share: how many of all rows pass, 0 to 1.
        """
        products = self.centroids.products(query)
        probes = min(products.shape[1] - 1, int(np.ceil(PROBES / max(share, 1e-9) ** 0.5)))
        found = highest(products, probes + 1)
        gains = np.take_along_axis(products, found, 1)
        order = np.argsort(gains, axis=1)  # ascending: of several lists that a row is in, the best one is written last
        keys = np.take_along_axis(found, order[:, 1:], 1).ravel()
        gains = np.take_along_axis(gains, order, 1)
        gains = (gains[:, 1:] - gains[:, :1]).ravel()
        met = [part.find(keys) for part in self.parts]
        rows = [rows for rows, _ in met]
        place = np.zeros(self.rows, np.int32)
        for held in rows:
            place[held] = 1
        if passing is not None:
            place *= passing[: self.rows]
        touched = np.flatnonzero(place)
        place[touched] = np.arange(1, len(touched) + 1)
        scores = np.zeros((len(touched) + 1) * len(query), np.float32)
        tokens = np.repeat(np.arange(len(query)), probes)
        for held, asked in met:
            scores[place[held] * len(query) + tokens[asked]] = gains[asked]
        total = scores.reshape(-1, len(query)) @ np.ones(len(query), np.float32)
        total = total[1:]
        return touched if len(touched) <= count else touched[np.argpartition(-total, count - 1)[:count]]

    def write(self, file: BinaryIO) -> None:
        """Write everything to a file that `read` takes."""
        np.save(file, np.array([self.rows, self.trained, len(self.parts)], np.int64))
        self.centroids.write(file)
        for part in self.parts:
            for array in (part.keys, part.starts, part.rows):
                np.save(file, array)

    @classmethod
    def read(cls, file: BinaryIO) -> Lists:
        """Read what `write` wrote."""
        rows, trained, parts = np.load(file).tolist()
        lists = cls(Centroids.read(file), trained)
        lists.rows = rows
        lists.parts = [Part(np.load(file), np.load(file), np.load(file)) for _ in range(parts)]
        return lists
