"""The reference engine: exact search in plain numpy, for small corpora, for tests, and where no wheel exists.

Rows only ever grow; a deleted or replaced passage leaves a tombstone until `_compact`. A flush writes everything
anew under a new number; the checksum file, replaced last, says which number counts.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import CHECKSUM_FILE, OwnerLock, read_seal, seal, verify_seal, write_bytes
from ultrarag.retrieve.bm25 import Postings
from ultrarag.retrieve.engines.arrays import (
    assemble,
    dense_query,
    prepare,
    products,
    sparse_query,
    sparse_rows,
    token_query,
    token_rows,
)
from ultrarag.retrieve.engines.base import SCHEMA_FILE, Progress, Schema, write_schema
from ultrarag.retrieve.ranking import Scored, check_ids, check_k, ranked, top
from ultrarag.retrieve.search import Filter, facts, mask, parse
from ultrarag.types import Embeddings

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _locked(method: _Method) -> _Method:
    """One thread at a time, and none after `close`."""

    @wraps(method)
    def wrapper(self: NumpyBackend, *args: Any, **kwargs: Any) -> Any:
        with self._mutex:
            if self._closed:
                raise IndexStateError(f"'{self.directory}' was closed; open it again")
            return method(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


class NumpyBackend:
    """Exact search over arrays in memory."""

    def __init__(self, directory: Path, schema: Schema, read_only: bool = False) -> None:
        self.directory, self.schema, self._read_only = directory, schema, read_only
        self._mutex = threading.RLock()
        self._lock = OwnerLock(directory, read_only=read_only)
        self._closed, self._dirty, self._number = False, True, 0
        self._clear()

    @classmethod
    def create(cls, directory: Path, schema: Schema) -> NumpyBackend:
        """Create an empty engine in a missing or empty directory."""
        write_schema(directory, "numpy", schema)
        backend = cls(directory, schema)
        backend.flush()
        return backend

    @classmethod
    def open(cls, directory: Path, schema: Schema, verify: bool = True, read_only: bool = False) -> NumpyBackend:
        """Read what the last flush wrote."""
        backend = cls(directory, schema, read_only)
        try:
            backend._read(verify)
        except BaseException:
            backend._lock.release()
            raise
        return backend

    @_locked
    def upsert(self, ids: Sequence[str], embeddings: Embeddings, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, and bury those that had the same ids."""
        ids, batch, payloads = prepare(self.schema, ids, embeddings, payloads)
        sparse = sparse_rows(ids, batch.sparse) if batch.sparse is not None else [None] * len(ids)
        tokens = token_rows(batch) if batch.colbert is not None else [None] * len(ids)
        found = [facts(payload) for payload in payloads]
        self._bury(ids)
        for row, id in enumerate(ids):
            dense = None if batch.dense is None else batch.dense[row]
            self._append(id, dense, sparse[row], tokens[row], found[row])
        self._dirty = True
        self._compact_when_sparse()

    @_locked
    def delete(self, ids: Sequence[str]) -> None:
        """Bury the rows of these ids."""
        check_ids(ids)
        self._dirty |= self._bury(ids) > 0
        self._compact_when_sparse()

    @_locked
    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Compare with every row that passes the filter."""
        k, query = check_k(k), dense_query(self.schema, vector)
        rows = np.flatnonzero(self._passing(filter))
        scores = products(self._dense[: len(self._ids)], query)
        return self._best(scores[rows], rows, k)

    @_locked
    def search_sparse(
        self, token_ids: Sequence[int], weights: Sequence[float], k: int, filter: Filter = None
    ) -> list[Scored]:
        """Add up the inverted lists of the query's tokens."""
        k, scores = check_k(k), self._sparse_scores(token_ids, weights)
        rows = np.flatnonzero(self._passing(filter) & (scores > 0))
        return self._best(scores[rows], rows, k)

    @_locked
    def search_tokens(self, tokens: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Compare with every passage that passes the filter, one at a time: equal passages get equal scores."""
        k, query = check_k(k), token_query(self.schema, tokens)
        rows = np.array([row for row in np.flatnonzero(self._passing(filter)) if len(self._tokens[row])], np.int64)
        if not len(query):
            return []
        return self._best(np.array([_maxsim(query, self._tokens[row]) for row in rows], np.float64), rows, k)

    @_locked
    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages."""
        query = dense_query(self.schema, vector)
        return self._scores_of(ids, lambda row: products(self._dense[row : row + 1], query)[0])

    @_locked
    def score_sparse(self, token_ids: Sequence[int], weights: Sequence[float], ids: Sequence[str]) -> np.ndarray:
        """Lexical scores of given passages."""
        scores = self._sparse_scores(token_ids, weights)
        return self._scores_of(ids, lambda row: scores[row])

    @_locked
    def maxsim(self, tokens: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """MaxSim with given passages."""
        query = token_query(self.schema, tokens)
        return self._scores_of(ids, lambda row: _maxsim(query, self._tokens[row]))

    @_locked
    def count(self) -> int:
        """The number of passages stored."""
        return len(self._row)

    @_locked
    def ids(self) -> Iterator[str]:
        """Iterate over a snapshot of the ids."""
        return iter(list(self._row))

    @_locked
    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What is stored for these ids."""
        for id in ids:
            if id not in self._row:
                raise UsageError(f"'{self.directory}' stores no passage '{id}'")
        rows = [self._row[id] for id in ids]
        pick = lambda held: [held[row] for row in rows]  # noqa: E731
        return assemble(self.schema, pick(self._dense), pick(self._sparse), pick(self._tokens))

    @_locked
    def flush(self) -> None:
        """Write all rows to new files, and let the checksums point to them."""
        if not self._dirty:
            return
        if self._read_only:
            raise IndexStateError(f"'{self.directory}' is open for reading")
        self._compact()
        number = self._number + 1
        written = [self.directory / f"passages-{number}.json", self.directory / f"vectors-{number}.npz"]
        passages = [[id, self._facts[row]] for id, row in self._row.items()]
        try:
            write_bytes(written[0], json.dumps(passages).encode())
            write_bytes(written[1], _npz(self._arrays()))
            seal(self.directory, [self.directory / SCHEMA_FILE, *written])
        except OSError as error:
            raise IndexStateError(
                f"'{self.directory}' cannot be written ({error}); what was flushed before is untouched"
            ) from error
        self._number, self._dirty = number, False
        for path in [*self.directory.glob("passages-*"), *self.directory.glob("vectors-*")]:
            if path not in written:
                path.unlink()

    @_locked
    def optimize(self, progress: Progress | None = None) -> None:
        """Drop the tombstones; there is no approximate index."""
        self._compact()
        self.flush()

    def close(self) -> None:
        """Flush, and let another owner in."""
        with self._mutex:
            if not self._closed:
                self.flush()
                self._closed = True
                self._lock.release()

    def _clear(self) -> None:
        self._ids: list[str | None] = []  # None: a tombstone
        self._row: dict[str, int] = {}
        self._facts: list[list[tuple[str, float]]] = []
        #: (capacity, dim)
        self._dense = np.zeros((0, self.schema.dense or 0), np.float32)
        #: (capacity,)
        self._alive = np.zeros(0, bool)
        self._sparse: list[Any] = []
        self._tokens: list[Any] = []
        self._fact_rows, self._token_rows = Postings(), Postings()

    def _append(self, id: str, dense: Any, sparse: Any, tokens: Any, found: Any) -> None:
        row = len(self._ids)
        self._ids.append(id)
        self._row[id] = row
        self._facts.append(found)
        self._sparse.append(sparse)
        self._tokens.append(tokens)
        if row == len(self._dense):
            room = np.zeros((max(64, row), self._dense.shape[1]), np.float32)
            self._dense = np.concatenate([self._dense, room])
            self._alive = np.concatenate([self._alive, np.zeros(len(room), bool)])
        self._alive[row] = True
        if dense is not None:
            self._dense[row] = dense
        for fact, value in found:
            self._fact_rows.add(fact, row, value)
        for token, weight in zip(*sparse, strict=True) if sparse else ():
            self._token_rows.add(int(token), row, float(weight))

    def _bury(self, ids: Sequence[str]) -> int:
        """Leave tombstones for those of `ids` that are stored; return their number."""
        rows = [self._row.pop(id) for id in dict.fromkeys(ids) if id in self._row]
        for row in rows:
            self._ids[row] = self._sparse[row] = self._tokens[row] = None
            self._alive[row] = False
        return len(rows)

    def _compact_when_sparse(self) -> None:
        if len(self._ids) > 1000 and len(self._row) < len(self._ids) / 2:
            self._compact()

    def _compact(self) -> None:
        if len(self._row) == len(self._ids):
            return
        kept = [(id, row) for row, id in enumerate(self._ids) if id is not None]
        found, dense, sparse, tokens = self._facts, self._dense, self._sparse, self._tokens
        self._clear()
        for id, row in kept:
            self._append(id, dense[row], sparse[row], tokens[row], found[row])

    def _passing(self, filter: Filter) -> np.ndarray:
        """Which rows are alive and pass the filter; (rows,) bool."""
        rows = len(self._ids)
        return self._alive[:rows] & mask(parse(filter), self._fact_rows.get, rows)

    def _sparse_scores(self, token_ids: Sequence[int], weights: Sequence[float]) -> np.ndarray:
        scores = np.zeros(len(self._ids))
        for token, weight in zip(*sparse_query(self.schema, token_ids, weights), strict=True):
            rows, held = self._token_rows.get(int(token))
            scores[rows] += float(weight) * held  # a row holds a token once
        return scores

    def _best(self, scores: np.ndarray, rows: np.ndarray, k: int) -> list[Scored]:
        places = top(scores, k)
        return ranked([self._ids[row] for row in rows[places]], scores[places], k)

    def _scores_of(self, ids: Sequence[str], score: Callable[[int], float]) -> np.ndarray:
        known = (self._row.get(id) for id in ids)
        return np.array([np.nan if row is None else score(row) for row in known], np.float64)

    def _arrays(self) -> dict[str, np.ndarray]:
        """All rows as flat arrays: ragged heads with the end of each row."""
        arrays: dict[str, np.ndarray] = {}
        if self.schema.dense:
            arrays["dense"] = self._dense[: len(self._ids)]
        if self.schema.sparse:
            arrays["sparse_ends"] = np.cumsum([len(ids) for ids, _ in self._sparse], dtype=np.int64)
            arrays["sparse_ids"] = _flat([ids for ids, _ in self._sparse], np.zeros(0, np.int64))
            arrays["sparse_weights"] = _flat([w for _, w in self._sparse], np.zeros(0, np.float32))
        if self.schema.colbert:
            arrays["colbert_ends"] = np.cumsum([len(tokens) for tokens in self._tokens], dtype=np.int64)
            arrays["colbert"] = _flat(self._tokens, np.zeros((0, self.schema.colbert), np.float32))
        return arrays

    def _read(self, verify: bool) -> None:
        names = verify_seal(self.directory) if verify else read_seal(self.directory)
        number = max((_number(name) for name in names), default=0)
        if not number:
            raise IndexStateError(f"'{self.directory / CHECKSUM_FILE}' is missing or names no vectors; rebuild them")
        passages = json.loads((self.directory / f"passages-{number}.json").read_bytes())
        with np.load(self.directory / f"vectors-{number}.npz", allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        self._fill(passages, arrays)
        self._number, self._dirty = number, False

    def _fill(self, passages: list[Any], arrays: dict[str, np.ndarray]) -> None:
        nothing = [None] * len(passages)
        sparse: Sequence[Any] = nothing
        if self.schema.sparse:
            parts = [_split(arrays[name], arrays["sparse_ends"]) for name in ("sparse_ids", "sparse_weights")]
            sparse = list(zip(*parts, strict=True))
        tokens = _split(arrays["colbert"], arrays["colbert_ends"]) if self.schema.colbert else nothing
        dense = arrays["dense"] if self.schema.dense else nothing
        for row, (id, found) in enumerate(passages):
            self._append(id, dense[row], sparse[row], tokens[row], [(fact, value) for fact, value in found])


def _maxsim(query: np.ndarray, held: np.ndarray) -> float:
    """The mean over a query's tokens of the best product with any of a passage's."""
    return float((query @ held.T).max(1).mean()) if len(query) and len(held) else 0.0


def _flat(rows: list[np.ndarray], nothing: np.ndarray) -> np.ndarray:
    return np.concatenate(rows) if rows else nothing


def _split(array: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return np.split(array, ends[:-1]) if len(ends) else []


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _number(name: str) -> int:
    number = name.removeprefix("vectors-").removesuffix(".npz")
    return int(number) if number.isdigit() else 0
