"""The embedded engine for late interaction over many passages: token vectors as codes on the disk, lists in memory.

A few thousand vectors are kept as they are, and all compared. From then on they are codes, and candidates come from
lists; each candidate is scored by its codes. Other heads are held by another embedded engine, in a folder below. What
is durable are the rows and a manifest, which says how much of them counts; it is replaced last.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import OwnerLock, read_seal, remove_seal, replacing, seal, verify_seal, write_json
from ultrarag.retrieve.engines.arrays import assemble, prepare, token_query, token_rows
from ultrarag.retrieve.engines.base import SCHEMA_FILE, Backend, Progress, Schema, write_schema
from ultrarag.retrieve.engines.ivf import Facts, Gate, Table, agree, named_errors
from ultrarag.retrieve.engines.plaid.building import complete, listed, rewritten
from ultrarag.retrieve.engines.plaid.coder import Coder
from ultrarag.retrieve.engines.plaid.lists import Lists
from ultrarag.retrieve.engines.plaid.search import maxsim, search
from ultrarag.retrieve.engines.plaid.tokens import Tokens
from ultrarag.retrieve.ranking import Scored, check_ids, check_k
from ultrarag.retrieve.search import Filter, facts, mask, parse
from ultrarag.types import Embeddings

MANIFEST = "manifest.json"
#: Folder of the engine that holds the other heads.
HEADS = "heads"
#: What the names of the engine's files begin with, before the number of the table.
OWN_FILES = ("vectors", "passages", "ends", "dead", "run", "tokenvectors", "tokenends", "tokenrests", "coder", "lists")
#: Tokens from which on they are codes: fewer are compared with all, in 30 ms at 128 dimensions.
CODED_TOKENS = 131_072
#: Centroids of the lists are chosen anew when there are so many times the rows that they were chosen for.
GROWN = 4
#: Rows whose lists are rather made again by the next owner than written.
UNSAVED_ROWS = 2_000
#: Dead rows from which on the table is written anew, where they are more than those alive.
DEAD_ROWS = 1000


class Plaid:
    """Token vectors on the disk as codes, lists by centroid in memory."""

    _table: Table
    _tokens: Tokens

    def __init__(
        self,
        directory: Path,
        schema: Schema,
        read_only: bool = False,
        name: str = "plaid",
        bits: int = 2,
        rest: int = 0,
    ) -> None:
        """`name`: with the options in it, as the schema has it.

        Args:
            bits: of a code for each dimension: 2, 3 or 4.
            rest: bits of its refinement: 8; 0: none, as in folders of before there were any, whose names do not say.
        """
        self.directory, self.schema, self._read_only, self._bits, self._rest = directory, schema, read_only, bits, rest
        self._lock = OwnerLock(directory, read_only=read_only)
        self._writing, self._gate = threading.RLock(), Gate()
        self._closed, self._dirty, self._saved = False, True, 0
        self._sums: dict[str, Any] = {}
        self._lists: Lists | None = None
        self._heads: Backend | None = None

    @classmethod
    def create(cls, directory: Path, schema: Schema, name: str = "plaid", **options: Any) -> Plaid:
        """Create an empty engine in a missing or empty directory; for the options see `__init__`."""
        write_schema(directory, name, schema)
        engine = cls(directory, schema, **options)
        with engine._releasing():
            engine._table = Table(directory, 0, {"number": 1})
            engine._tokens = Tokens(directory, schema.colbert or 0, {"number": 1})
            if other := engine._other_heads():
                from ultrarag.retrieve.engines.registry import create, default_backend

                engine._heads = create(directory / HEADS, other, default_backend())
            engine.flush()
        return engine

    @classmethod
    def open(
        cls, directory: Path, schema: Schema, verify: bool = True, read_only: bool = False, **options: Any
    ) -> Plaid:
        """Read what the last flush made durable; lists that were not written are made again."""
        engine = cls(directory, schema, read_only, **options)
        with engine._releasing():
            engine._sums = verify_seal(directory) if verify else read_seal(directory)
            state = _read_manifest(directory)
            if not read_only:
                remove_seal(directory)
                engine._remove_left_over(state)
            engine._table = Table(directory, 0, state, read_only)
            engine._tokens = Tokens(directory, schema.colbert or 0, state, read_only)
            engine._load_heads(verify)
            engine._load_lists(int(state["lists"]))
            engine._dirty = False
        return engine

    @property
    def finds_tokens(self) -> bool:
        """Whether query tokens are compared with the best candidates alone: any number of passages can be searched."""
        return bool(self.schema.colbert)

    def upsert(self, ids: Sequence[str], embeddings: Embeddings, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, and let those die that had the same ids."""
        ids, batch, payloads = prepare(self.schema, ids, embeddings, payloads)
        if not ids:
            return
        vectors = token_rows(batch) if batch.colbert is not None else [np.zeros((0, 0), np.float32)] * len(ids)
        found = [facts(payload) for payload in payloads]
        with self._changing():
            if self._heads is not None:
                self._heads.upsert(ids, replace(batch, colbert=None, mask=None), payloads)
            old = self._table.find(ids)
            codes = self._coded(vectors, old)
            norm = max((float(np.linalg.norm(held, axis=1).max()) for held in vectors if len(held)), default=0.0)
            self._append(ids, found, codes, [row for row in old if row >= 0], norm)
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
        """See the engine that holds the dense vectors."""
        return self._other("dense").search_dense(vector, k, filter, exact)

    def search_sparse(
        self, token_ids: Sequence[int], weights: Sequence[float], k: int, filter: Filter = None
    ) -> list[Scored]:
        """See the engine that holds the lexical weights."""
        return self._other("sparse").search_sparse(token_ids, weights, k, filter)

    def search_tokens(self, tokens: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Score the candidates that lists give by their codes; all passages where `exact`, and where few pass."""
        k, query = check_k(k), token_query(self.schema, tokens)
        if not len(query):
            return []
        with self._searching():
            table = self._table
            passing = table.alive() & mask(parse(filter), table.lookup.get, table.rows)
            return search(table, self._tokens, self._lists, query, k, passing, exact)

    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages."""
        return self._other("dense").score_dense(vector, ids)

    def score_sparse(self, token_ids: Sequence[int], weights: Sequence[float], ids: Sequence[str]) -> np.ndarray:
        """Lexical scores of given passages."""
        return self._other("sparse").score_sparse(token_ids, weights, ids)

    def maxsim(self, tokens: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """MaxSim with given passages, by their codes."""
        query = token_query(self.schema, tokens)
        with self._searching():
            rows = np.array(self._table.find(ids), np.int64)
            scores = np.full(len(rows), np.nan)
            scores[rows >= 0] = maxsim(self._tokens, query, rows[rows >= 0])
            return scores

    def count(self) -> int:
        """The number of passages stored."""
        with self._searching():
            return self._table.count

    def ids(self) -> Iterator[str]:
        """Iterate over a snapshot of the ids."""
        with self._searching():
            return iter([self._table.id_of(row) for row in np.flatnonzero(self._table.alive()).tolist()])

    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What is stored for these ids: the vectors that codes stand for."""
        with self._searching():
            rows = self._table.find(ids)
            if -1 in rows:
                raise UsageError(f"'{self.directory}' stores no passage '{ids[rows.index(-1)]}'")
            held = Embeddings() if self._heads is None else self._heads.vectors(ids)
            if self.schema.colbert:
                found = [self._tokens.coder.decode(codes) for codes in self._tokens.each(np.array(rows, np.int64))]
                tokens = assemble(replace(self.schema, dense=None, sparse=False), [], [], found)
                held.colbert, held.mask = tokens.colbert, tokens.mask
            return held

    def kept(self, embeddings: Embeddings) -> Embeddings:
        """What `vectors` would give for these once they are stored."""
        if embeddings.colbert is None:
            return embeddings
        with self._searching():
            coder, given = self._tokens.coder, embeddings.colbert
            held = coder.decode(coder.encode(given.reshape(-1, coder.dim))).reshape(given.shape)
            return replace(embeddings, colbert=held * embeddings.mask[..., None].astype(np.float32))

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
                self._table.sync()
                self._tokens.sync()
                write_json(self.directory / MANIFEST, self._state())
            self._dirty = False
            self._remove_left_over(self._state())

    def optimize(self, progress: Progress | None = None) -> None:
        """Write living rows anew where some are dead, and choose centroids for as many as there are."""
        with self._changing():
            if self._heads is not None:
                self._heads.optimize(progress)
            if self._table.count < self._table.rows:
                self._rewrite()
            elif self._lists is not None and self._lists.trained < self._table.rows:
                self._relist()
            self._save_lists()
        self.flush()

    def close(self) -> None:
        """Flush, write the checksums, and let another owner in."""
        with self._writing:
            if self._closed:
                return
            if not self._read_only:
                if self._lists is not None and self._lists.rows - self._saved > UNSAVED_ROWS:
                    self._save_lists()
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

    def _coded(self, vectors: Sequence[np.ndarray], old: Sequence[int]) -> list[np.ndarray]:
        """The codes of passages; of what is stored already, as where metadata alone is new, the codes that it has."""
        coder, ends = self._tokens.coder, np.cumsum([len(held) for held in vectors])
        if not self.schema.colbert:
            return [np.zeros((0, coder.size + coder.rest_size), np.uint8) for _ in vectors]
        codes = np.split(coder.encode(np.concatenate(vectors)), ends[:-1])
        for place, row in enumerate(old):
            if row >= 0:
                known, _ = self._tokens.read(np.array([row]), whole=True)
                stored = coder.decode(known)
                if np.shape(stored) == np.shape(vectors[place]) and np.allclose(stored, vectors[place], 1e-5, 1e-6):
                    codes[place] = known
        return codes

    def _append(
        self, ids: Sequence[str], found: Sequence[Facts], codes: Sequence[np.ndarray], old: Sequence[int], norm: float
    ) -> None:
        with self._gate.writing():
            rows, sizes = self._table.rows, self._tokens.write(codes)
            try:
                self._table.append(ids, found, np.zeros((len(ids), 0), np.float32), old)
            finally:  # rows are there also where the disk had no room for their keys
                if self._table.rows > rows:
                    self._tokens.append(sizes, norm)
                    if self._lists is not None:
                        complete(self._lists, self._tokens, self._table.rows)

    def _keep_fit(self) -> None:
        """Write rows anew where most are dead or to be coded, and choose centroids where there are many more."""
        dead = self._table.rows - self._table.count
        if (dead > DEAD_ROWS and dead > self._table.count) or (self._lists is None and self._are_many()):
            self._rewrite()
        elif self._lists is not None and self._table.rows >= GROWN * self._lists.trained:
            self._relist()

    def _are_many(self) -> bool:
        return self._tokens.count >= CODED_TOKENS

    def _relist(self) -> None:
        """Make lists of all rows while searches use what there was."""
        lists = listed(self._tokens, self._table.alive())
        with self._gate.writing():
            self._lists, self._saved, self._dirty = lists, 0, True

    def _rewrite(self) -> None:
        """Write living rows into files of the next number, while searches use these."""
        old = self._table, self._tokens
        table, tokens = rewritten(*old, self._bits if self._are_many() else None, self._rest)
        try:
            lists = listed(tokens, table.alive()) if isinstance(tokens.coder, Coder) else None
        except BaseException:
            table.close()
            tokens.close()
            raise
        with self._gate.writing():
            self._table, self._tokens, self._lists, self._saved, self._dirty = table, tokens, lists, 0, True
        for held in old:
            held.close()
        self.flush()

    def _save_lists(self) -> None:
        if self._lists is not None and self._lists.rows != self._saved:
            with named_errors(self.directory), replacing(self._lists_path(self._lists.rows)) as file:
                self._lists.write(file)
            self._saved, self._dirty = self._lists.rows, True

    # Opening and closing

    def _state(self) -> dict[str, Any]:
        return {**self._table.state(), **self._tokens.state(), "lists": self._saved}

    def _other(self, head: str) -> Backend:
        """The engine of another head."""
        if self._heads is None or head not in self._heads.schema.heads:
            raise UsageError(f"the index stores no {head} vectors")
        with self._searching():
            return self._heads

    def _other_heads(self) -> Schema | None:
        held = replace(self.schema, colbert=None)
        return held if held.heads else None

    def _load_heads(self, verify: bool) -> None:
        if not self._other_heads():
            return
        from ultrarag.retrieve.engines.registry import open_backend

        self._heads = open_backend(self.directory / HEADS, None, verify, self._read_only)
        if not self._sums and not self._read_only:
            agree(self._table, self._heads)

    def _load_lists(self, rows: int) -> None:
        if not isinstance(self._tokens.coder, Coder):
            return
        if rows:
            with open(self._lists_path(rows), "rb") as file:
                self._lists, self._saved = Lists.read(file), rows
            complete(self._lists, self._tokens, self._table.rows)
        else:
            self._lists = listed(self._tokens, self._table.alive())

    def _lists_path(self, rows: int) -> Path:
        return self.directory / f"lists-{self._table.number}-{rows}"

    def _files(self) -> list[Path]:
        own = [self.directory / SCHEMA_FILE, self.directory / MANIFEST]
        lists = [self._lists_path(self._saved)] if self._saved else []
        return [*own, *self._table.files(), *self._tokens.files(), *lists]

    def _remove_left_over(self, state: Mapping[str, Any]) -> None:
        """Remove files of tables and lists that the manifest does not count."""
        number, runs = state["number"], {f"{first}-{last}" for first, last in state["runs"]}
        kept = (
            {f"{kind}-{number}" for kind in OWN_FILES}
            | {f"run-{number}-{rows}" for rows in runs}
            | {f"lists-{number}-{state['lists']}"}
        )
        for path in self.directory.iterdir():
            if path.name.partition("-")[0] in OWN_FILES and path.name not in kept:
                path.unlink()

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
        for held in ("_table", "_tokens"):
            if hasattr(self, held):
                getattr(self, held).close()
        self._lock.release()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        needed = {"number", "rows", "text", "dead", "norm", "runs", "tokens", "token_norm", "coder", "lists"}
        if missing := needed - state.keys():
            raise ValueError(f"'{min(missing)}' is missing")
    except FileNotFoundError:
        raise IndexStateError(f"'{path}' is missing; rebuild the vectors from the passages") from None
    except ValueError as error:
        raise IndexStateError(f"'{path}' is damaged ({error}); rebuild the vectors from the passages") from None
    return state
