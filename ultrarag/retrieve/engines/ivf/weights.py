"""The lexical weights of a table's rows: two files that only grow, of pairs and of where each row's pairs end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.errors import DataError
from ultrarag.retrieve.engines.arrays import sparse_rows
from ultrarag.retrieve.engines.ivf.growing import Growing
from ultrarag.types import Sparse

#: A token id and its weight.
PAIR = np.dtype([("token", np.uint32), ("weight", np.float32)])
LARGEST_TOKEN = 2**32 - 1
#: Pairs read at a time.
READ_PAIRS = 1 << 22
#: Token ids and weights of a row, ids ascending.
Row = tuple[np.ndarray, np.ndarray]


def checked(ids: Sequence[str], sparse: Sparse) -> list[Row]:
    """The rows of passages to be stored; DataError names one whose weights cannot be."""
    rows = sparse_rows(ids, sparse)
    for id, (tokens, _) in zip(ids, rows, strict=True):
        if len(tokens) and tokens[-1] > LARGEST_TOKEN:
            raise DataError(f"passage '{id}' has the token id {tokens[-1]}; up to {LARGEST_TOKEN} can be stored")
    return rows


def stored(tokens: np.ndarray, weights: np.ndarray) -> Row:
    """Those of a query's tokens that a passage can have."""
    kept = tokens <= LARGEST_TOKEN
    return tokens[kept], weights[kept]


class Weights:
    """Pairs by row."""

    def __init__(self, folder: Path, number: int, state: dict[str, Any], read_only: bool) -> None:
        """Open the files of a table, of which so much counts as `Table.state` says."""
        pairs, rows = int(state["pairs"]), int(state.get("rows", 0))
        #: the largest weight, also of dead rows
        self.heaviest = float(state.get("heaviest", 0.0))
        self.pairs = Growing(folder / f"weights-{number}", pairs * PAIR.itemsize, read_only)
        try:
            self.row_ends = Growing(folder / f"weightends-{number}", rows * 8, read_only)
        except BaseException:
            self.pairs.close()
            raise
        self.map()

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return self.pairs.size // PAIR.itemsize

    def files(self) -> list[Growing]:
        """The files that `contents` are for."""
        return [self.pairs, self.row_ends]

    def contents(self, rows: Sequence[Row]) -> tuple[memoryview | bytes, memoryview | bytes]:
        """What rows add to each of the files."""
        lengths = np.array([len(tokens) for tokens, _ in rows], np.int64)
        pairs = np.empty(int(lengths.sum()), PAIR)
        if len(pairs):
            pairs["token"] = np.concatenate([tokens for tokens, _ in rows])
            pairs["weight"] = np.concatenate([weights for _, weights in rows])
        return pairs.tobytes(), (np.cumsum(lengths) + self.count).tobytes()

    def added(self, rows: Sequence[Row]) -> None:
        """Note rows whose contents count from now on."""
        self.heaviest = max(self.heaviest, *(float(weights.max(initial=0.0)) for _, weights in rows))

    def map(self) -> None:
        """Map what has been added."""
        #: (rows,) int64, of the file
        self.ends = self.row_ends.array(np.int64)
        self._pairs = self.pairs.array(PAIR)

    def of(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The token ids and the weights of the rows from `first` up to `last`, and where each row begins."""
        start, starts = self._starts(first, last)
        tokens, weights = np.empty(starts[-1], np.uint32), np.empty(starts[-1], np.float32)
        for place in range(0, int(starts[-1]), READ_PAIRS):
            pairs = np.frombuffer(self._bytes(start + place, min(READ_PAIRS, int(starts[-1]) - place)), PAIR)
            tokens[place : place + len(pairs)], weights[place : place + len(pairs)] = pairs["token"], pairs["weight"]
        return tokens, weights, starts

    def mapped(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of these rows and where each begins; for few, as what was read counts as this process's memory."""
        start, starts = self._starts(first, last)
        return self._pairs[start : start + int(starts[-1])], starts

    def of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of some rows, and where each begins, (len(rows) + 1,)."""
        ends = self.ends[rows]
        begins = np.where(rows > 0, self.ends[rows - 1], 0)
        content = b"".join(map(self._bytes, begins.tolist(), (ends - begins).tolist()))
        return np.frombuffer(content, PAIR), np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - begins)])

    def rows(self, rows: np.ndarray) -> list[Row]:
        """Token ids, int64, and weights, float32, of some rows."""
        pairs, starts = self.of_rows(rows)
        parts = np.split(pairs, starts[1:-1]) if len(rows) else []
        return [(part["token"].astype(np.int64), part["weight"].copy()) for part in parts]

    def _starts(self, first: int, last: int) -> tuple[int, np.ndarray]:
        start = int(self.ends[first - 1]) if first else 0
        return start, np.concatenate([np.zeros(1, np.int64), self.ends[first:last] - start])

    def _bytes(self, start: int, count: int) -> bytes:
        return self.pairs.read(start * PAIR.itemsize, count * PAIR.itemsize)
