"""The embedded engine for many dense vectors: candidates by codes of one bit a dimension, scored by what is on disk.

Few passages are compared with all. Lexical weights are searched by postings; token vectors are held by another embedded
engine, in a folder below, and so are the weights of indexes made before, or where numba is not installed. What is
durable are the rows and a manifest, which says how much of them counts; it is replaced last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import OwnerLock, read_seal, remove_seal, seal, verify_seal
from ultrarag.retrieve.engines.arrays import assemble, dense_query, prepare, products, sparse_query
from ultrarag.retrieve.engines.base import SCHEMA_FILE, Backend, Progress, Schema, write_schema
from ultrarag.retrieve.engines.ivf import lexical
from ultrarag.retrieve.engines.ivf.codes import MOST_LISTS, Codes, check_library
from ultrarag.retrieve.engines.ivf.folder import (
    MANIFEST,
    codes_path,
    named_errors,
    read_codes,
    read_manifest,
    remove_left_over,
    write_codes,
    write_manifest,
)
from ultrarag.retrieve.engines.ivf.gate import Gate
from ultrarag.retrieve.engines.ivf.heads import agree, create_heads, open_heads
from ultrarag.retrieve.engines.ivf.postings import Postings
from ultrarag.retrieve.engines.ivf.search import search
from ultrarag.retrieve.engines.ivf.table import Facts, Table, new_state
from ultrarag.retrieve.engines.ivf.weights import Row, checked, stored
from ultrarag.retrieve.ranking import Scored, check_ids, check_k
from ultrarag.retrieve.search import Filter, facts
from ultrarag.types import Embeddings

#: Rows from which on there are codes: fewer are compared with all, in 2 ms at 384 dimensions.
EXACT_ROWS = 20_000
#: Codes are made anew when there are so many times the rows that they were made for; where that gives no more lists,
#: only when the corpus is another one.
GROWN, GROWN_ALIKE = 4, 16
#: Rows whose codes are rather made again by the next owner than written.
UNSAVED_ROWS = 10_000
#: Of more rows codes are written whenever there are so many times as many as were written last.
LEAST_SAVED, SAVED_TIMES = 200_000, 1.25
#: Dead rows from which on the table is written anew, where they are more than those alive.
DEAD_ROWS = 1000


class IVF:
    """Dense vectors and lexical weights on the disk, codes of the vectors in memory."""

    _table: Table

    def __init__(self, directory: Path, schema: Schema, read_only: bool = False) -> None:
        check_library()
        self.directory, self.schema, self._read_only = directory, schema, read_only
        self._lock = OwnerLock(directory, read_only=read_only)
        self._writing, self._gate = threading.RLock(), Gate()
        self._closed, self._dirty, self._saved = False, True, 0
        self._sums: dict[str, Any] = {}
        self._codes: Codes | None = None
        self._heads: Backend | None = None

    @classmethod
    def create(cls, directory: Path, schema: Schema) -> IVF:
        """Create an empty engine in a missing or empty directory."""
        check_library()
        write_schema(directory, "ivf", schema)
        engine = cls(directory, schema)
        with engine._releasing():
            engine._table = Table(directory, schema.dense or 0, new_state(1, schema.sparse and lexical.is_here()))
            engine._heads = create_heads(directory, engine._other_heads())
            engine.flush()
        return engine

    @classmethod
    def open(cls, directory: Path, schema: Schema, verify: bool = True, read_only: bool = False) -> IVF:
        """Read what the last flush made durable; codes that were not written are made again."""
        engine = cls(directory, schema, read_only)
        with engine._releasing():
            engine._sums = verify_seal(directory) if verify else read_seal(directory)
            state = read_manifest(directory)
            if "pairs" in state:
                lexical.check_compiler()
            if not read_only:
                remove_seal(directory)
                remove_left_over(directory, state)
            engine._table = Table(directory, schema.dense or 0, state, read_only)
            engine._heads = open_heads(directory, engine._other_heads(), verify, read_only)
            if engine._heads is not None and not engine._sums and not read_only:
                agree(engine._table, engine._heads)
            engine._load_codes(int(state["lists"]))
            engine._dirty = False
        return engine

    def upsert(self, ids: Sequence[str], embeddings: Embeddings, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, and let those die that had the same ids."""
        ids, batch, payloads = prepare(self.schema, ids, embeddings, payloads)
        found, ours = [facts(payload) for payload in payloads], self._table.weights is not None
        weights = checked(ids, batch.sparse) if ours and batch.sparse is not None else ()
        with self._changing():
            if self._heads is not None:
                self._heads.upsert(ids, replace(batch, dense=None, sparse=None if ours else batch.sparse), payloads)
            old = [row for row in self._table.find(ids) if row >= 0]
            dense = np.zeros((len(ids), 0), np.float32) if batch.dense is None else batch.dense
            self._append(ids, found, dense, old, weights)
            self._keep_fit()

    def delete(self, ids: Sequence[str]) -> None:
        """Let the rows of these ids die."""
        check_ids(ids)
        with self._changing():
            if self._heads is not None:
                self._heads.delete(ids)
            rows = [row for row in self._table.find(list(dict.fromkeys(ids))) if row >= 0]
            with self._gate.writing():
                self._table.bury(rows)
            self._keep_fit()

    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Score the candidates that codes give, or compare with all: where `exact`, and where few pass."""
        k, query = check_k(k), dense_query(self.schema, vector)
        with self._searching():
            return search(self._table, self._codes, query, k, filter, exact)

    def search_sparse(
        self, token_ids: Sequence[int], weights: Sequence[float], k: int, filter: Filter = None
    ) -> list[Scored]:
        """Score what postings find, and all rows that have none yet; or see the engine that holds the weights."""
        if self._table.weights is None:
            return self._other("sparse").search_sparse(token_ids, weights, k, filter)
        k, query = check_k(k), sparse_query(self.schema, token_ids, weights)
        with self._searching():
            return lexical.search(self._table, *query, k, filter)

    def search_tokens(self, tokens: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """See the engine that holds the token vectors."""
        return self._other("colbert").search_tokens(tokens, k, filter)

    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages."""
        query = dense_query(self.schema, vector)
        with self._searching():
            rows = np.array(self._table.find(ids), np.int64)
            scores = np.full(len(rows), np.nan)
            scores[rows >= 0] = products(self._table.vectors_of(rows[rows >= 0]), query)
            return scores

    def score_sparse(self, token_ids: Sequence[int], weights: Sequence[float], ids: Sequence[str]) -> np.ndarray:
        """Lexical scores of given passages."""
        if self._table.weights is None:
            return self._other("sparse").score_sparse(token_ids, weights, ids)
        query = stored(*sparse_query(self.schema, token_ids, weights))
        with self._searching():
            rows = np.array(self._table.find(ids), np.int64)
            scores = np.full(len(rows), np.nan)
            scores[rows >= 0] = lexical.scores_of(self._table.weights, rows[rows >= 0], *query)
            return scores

    def maxsim(self, tokens: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """MaxSim with given passages."""
        return self._other("colbert").maxsim(tokens, ids)

    def count(self) -> int:
        """The number of passages stored."""
        with self._searching():
            return self._table.count

    def ids(self) -> Iterator[str]:
        """Iterate over a snapshot of the ids."""
        with self._searching():
            return iter([self._table.id_of(row) for row in np.flatnonzero(self._table.alive()).tolist()])

    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What is stored for these ids."""
        with self._searching():
            rows = self._table.find(ids)
            if -1 in rows:
                raise UsageError(f"'{self.directory}' stores no passage '{ids[rows.index(-1)]}'")
            held = Embeddings() if self._heads is None else self._heads.vectors(ids)
            if self.schema.dense:
                held.dense = np.array(self._table.vectors_of(np.array(rows, np.int64)), np.float32)
            if self._table.weights is not None:
                weights = self._table.weights.rows(np.array(rows, np.int64))
                held.sparse = assemble(Schema(sparse=True), (), weights, ()).sparse
            return held

    def flush(self) -> None:
        """Make the rows durable, then let the manifest count them."""
        with self._writing:
            self._check_open()
            if not self._dirty:
                return
            if self._read_only:
                raise IndexStateError(f"'{self.directory}' is open for reading")
            with named_errors(self.directory):
                if self._heads is not None:
                    self._heads.flush()
                if self._codes is not None and self._codes.rows > SAVED_TIMES * max(self._saved, LEAST_SAVED):
                    self._save_codes()  # else whoever opens this after a kill makes them all again
                self._table.sync()
                write_manifest(self.directory, self._table.state(), self._saved)
            self._dirty = False
            remove_left_over(self.directory, read_manifest(self.directory))

    def optimize(self, progress: Progress | None = None) -> None:
        """Write living rows anew where some are dead, and choose partitions for as many as there are."""
        with self._changing():
            if self._heads is not None:
                self._heads.optimize(progress)
            if self._table.count < self._table.rows:
                self._rewrite()
            elif self._codes is None or self._codes.trained < self._table.rows:
                self._train()
            self._index_weights(lexical.with_fewest)
            self._save_codes()
        self.flush()

    def close(self) -> None:
        """Flush, write the checksums, and let another owner in."""
        with self._writing:
            if self._closed:
                return
            if not self._read_only:
                if self._codes is not None and self._codes.rows - self._saved > UNSAVED_ROWS:
                    self._save_codes()
                self.flush()
            with self._gate.writing():
                self._closed = True
            try:
                if self._heads is not None:
                    self._heads.close()
                if not self._read_only:
                    with named_errors(self.directory):
                        seal(self.directory, self._files(), self._sums)
            finally:
                self._release()

    # Writing

    def _append(
        self, ids: Sequence[str], found: Sequence[Facts], dense: np.ndarray, old: Sequence[int], weights: Sequence[Row]
    ) -> None:
        with self._gate.writing():
            self._table.append(ids, found, dense, old, weights)
            self._encode_missing()

    def _encode_missing(self) -> None:
        """Make the codes of the rows that have none yet."""
        if self._codes is not None:
            for _, block in self._table.blocks(self._codes.rows):
                self._codes.add(block)

    def _keep_fit(self) -> None:
        """Write the table anew where most of it is dead, and choose partitions anew where it has grown."""
        dead = self._table.rows - self._table.count
        if dead > DEAD_ROWS and dead > self._table.count:
            self._rewrite()
        elif self._table.rows >= self._rows_to_train():
            self._train()
        self._index_weights(lexical.with_postings)

    def _index_weights(self, made: Callable[[Table], list[Postings]]) -> None:
        """Make postings while searches use what there was."""
        if self._table.weights is not None:
            parts = made(self._table)
            with self._gate.writing():
                self._table.postings = parts

    def _rows_to_train(self) -> int:
        """The rows from which on lists are chosen anew."""
        codes = self._codes
        if codes is None:
            return EXACT_ROWS
        return codes.trained * (GROWN if codes.lists < MOST_LISTS else GROWN_ALIKE)

    def _train(self) -> None:
        """Make codes for all rows while searches use what there was."""
        if not self.schema.dense or self._table.rows < EXACT_ROWS:
            return
        codes = _coded(self._table)
        with self._gate.writing():
            self._codes, self._saved, self._dirty = codes, 0, True

    def _rewrite(self) -> None:
        """Write living rows into a table of the next number, while searches use this one."""
        old = self._table
        table = old.rewritten()
        try:
            codes = _coded(table) if self.schema.dense and table.rows >= EXACT_ROWS else None
            if table.weights is not None:
                table.postings = lexical.with_fewest(table)
        except BaseException:
            table.close()
            raise
        with self._gate.writing():
            self._table, self._codes, self._saved, self._dirty = table, codes, 0, True
        old.close()
        self.flush()

    def _save_codes(self) -> None:
        if self._codes is not None and self._codes.rows != self._saved:
            with named_errors(self.directory):
                write_codes(codes_path(self.directory, self._table.number, self._codes.rows), self._codes)
            self._saved, self._dirty = self._codes.rows, True

    def _other_heads(self) -> Schema:
        """The heads that the table does not keep."""
        return replace(self.schema, dense=None, sparse=self.schema.sparse and self._table.weights is None)

    def _other(self, head: str) -> Backend:
        """The engine of another head."""
        if self._heads is None or head not in self._heads.schema.heads:
            raise UsageError(f"the index stores no {head} vectors")
        with self._searching():
            return self._heads

    # Opening and closing

    def _load_codes(self, rows: int) -> None:
        if not self.schema.dense:
            return
        if rows:
            self._codes, self._saved = read_codes(codes_path(self.directory, self._table.number, rows)), rows
            self._encode_missing()
        elif self._table.rows >= EXACT_ROWS:
            self._codes = _coded(self._table)

    def _files(self) -> list[Path]:
        codes = [codes_path(self.directory, self._table.number, self._saved)] if self._saved else []
        return [self.directory / SCHEMA_FILE, self.directory / MANIFEST, *self._table.files(), *codes]

    def _check_open(self) -> None:
        if self._closed:
            raise IndexStateError(f"'{self.directory}' was closed; open it again")

    @contextmanager
    def _searching(self) -> Iterator[None]:
        with self._gate.reading():
            self._check_open()
            yield

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._writing:
            self._check_open()
            if self._read_only:
                raise IndexStateError(f"'{self.directory}' is open for reading")
            self._dirty = True
            with named_errors(self.directory):
                yield

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        """Let go of everything when opening fails."""
        try:
            with named_errors(self.directory):
                yield
        except BaseException:
            self._closed = True
            if self._heads is not None:
                self._heads.close()
            self._release()
            raise

    def _release(self) -> None:
        if hasattr(self, "_table"):
            self._table.close()
        self._lock.release()


def _coded(table: Table) -> Codes:
    """Codes of all rows of a table, in partitions chosen for them."""
    codes = Codes.train(table.rows, table.vectors_of)
    for _, block in table.blocks():
        codes.add(block)
    return codes
