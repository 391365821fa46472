"""The embedded default engine: Qdrant in this process, through qdrant-edge-py.

Dense vectors are searched through an HNSW graph once `optimize` has built it (and exactly before that, or on
demand), lexical weights and MaxSim always exactly. What the engine does not do by itself is done here: ids of any
form, clear errors, checksums while it is closed, and an optimisation that leaves the serving process responsive.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as qdrant

from ultrarag.errors import IndexStateError, UltraragError, UsageError
from ultrarag.io import (
    OwnerLock,
    check_room,
    copy_with_holes,
    read_seal,
    remove_seal,
    resource_error,
    seal,
    start_child,
    verify_seal,
)
from ultrarag.retrieve.bm25 import ranked
from ultrarag.retrieve.engines.base import Progress, Schema, Scored, write_schema
from ultrarag.retrieve.engines.batches import (
    assemble,
    check_ids,
    check_k,
    dense_query,
    prepare,
    sparse_query,
    token_query,
)
from ultrarag.retrieve.engines.qdrant.embedded_points import (
    config,
    lexical_row,
    named_vectors,
    sparse_vector,
    to_filter,
)
from ultrarag.retrieve.engines.qdrant.points import FACTS, key, new_number_fields, stored_id, to_payload
from ultrarag.retrieve.search import Filter, parse
from ultrarag.types import Embeddings

#: Directory of the engine's own files, below the backend's.
SHARD = "shard"
#: Candidates kept while searching the graph.
HNSW_EF = 128
#: Points written to the engine in one operation.
CHUNK = 500
#: Bytes that must be free for the engine to be used: where it finds the disk full it takes the process with it (a file
#: that is mapped into memory cannot grow, SIGBUS).
ROOM = 32 << 20

_ONLY_ID = qdrant.PayloadSelector.Include(["id"])
_EXACT = qdrant.SearchParams(exact=True)


class QdrantEdge:
    """A shard of the Qdrant engine in this process."""

    def __init__(self, directory: Path, schema: Schema, read_only: bool = False) -> None:
        self.directory, self.schema, self._read_only = directory, schema, read_only
        self._lock = OwnerLock(directory, read_only=read_only)
        self._copy: tempfile.TemporaryDirectory[str] | None = None  # of what is only read
        self._writing = threading.RLock()
        self._shard: qdrant.EdgeShard | None = None
        self._away = "was closed; open it again"  # why there is no shard
        self._sums: dict[str, Any] = {}  # checksums of the files, as found when it was opened
        self._dirty = True
        self._number_indexes: set[str] = set()

    @classmethod
    def create(cls, directory: Path, schema: Schema) -> QdrantEdge:
        """Create an empty shard in a missing or empty directory."""
        write_schema(directory, "qdrant-edge", schema)
        backend = cls(directory, schema)
        with backend._releasing(), backend._named_errors():
            check_room(directory, ROOM)
            (directory / SHARD).mkdir()
            backend._shard = qdrant.EdgeShard.create(str(directory / SHARD), config(schema))
            index = qdrant.UpdateOperation.create_field_index(FACTS, qdrant.KeywordIndexParams())
            backend._shard.update(index)
        return backend

    @classmethod
    def open(cls, directory: Path, schema: Schema, verify: bool = True, read_only: bool = False) -> QdrantEdge:
        """Load the shard; after a crash the engine replays its write-ahead log, and there are no checksums.

        The engine writes while it loads, so that what is only read is loaded from a copy in the system's folder for
        temporary files (TMPDIR).
        """
        backend = cls(directory, schema, read_only)
        with backend._releasing(), backend._named_errors():
            backend._sums = verify_seal(directory) if verify else read_seal(directory)
            if read_only:
                backend._copy = copied(directory / SHARD)
            else:
                check_room(directory, ROOM)
            backend._load()
            if not read_only:
                remove_seal(directory)
            backend._dirty = not backend._sums
        return backend

    def upsert(self, ids: Sequence[str], embeddings: Embeddings, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Write points; one that exists is replaced as a whole."""
        ids, batch, payloads = prepare(self.schema, ids, embeddings, payloads)
        vectors = named_vectors(ids, batch)
        held = [to_payload(id, payload) for id, payload in zip(ids, payloads, strict=True)]
        points = [qdrant.Point(key(id), *rest) for id, *rest in zip(ids, vectors, held, strict=True)]
        with self._writing:
            self._index_numbers(held)
            for start in range(0, len(points), CHUNK):
                self._update(qdrant.UpdateOperation.upsert_points(points[start : start + CHUNK]))

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points."""
        check_ids(ids)
        with self._writing:
            if ids:
                self._update(qdrant.UpdateOperation.delete_points([key(id) for id in ids]))

    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Search the graph, or compare with all where `exact` or where there is no graph yet.

        A graph need not reach every passage (1,188 of 3,000 for a huge k, measured): when it gives fewer than k,
        all are compared, so that k hits come back whenever k passages pass the filter.
        """
        k, query = check_k(k), dense_query(self.schema, vector)
        if not exact:
            hits = self._search(query, "dense", k, filter, qdrant.SearchParams(hnsw_ef=max(HNSW_EF, k)))
            if len(hits) == k:
                return hits
        return self._search(query, "dense", k, filter, _EXACT)

    def search_sparse(
        self, token_ids: Sequence[int], weights: Sequence[float], k: int, filter: Filter = None
    ) -> list[Scored]:
        """Search the inverted index."""
        k, query = check_k(k), sparse_query(self.schema, token_ids, weights)
        return self._search(sparse_vector(query), "sparse", k, filter, None) if len(query[0]) else []

    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages."""
        return self._score(dense_query(self.schema, vector), "dense", ids)

    def score_sparse(self, token_ids: Sequence[int], weights: Sequence[float], ids: Sequence[str]) -> np.ndarray:
        """Lexical scores of given passages."""
        query = sparse_query(self.schema, token_ids, weights)
        return self._score(sparse_vector(query) if len(query[0]) else None, "sparse", ids)

    def maxsim(self, tokens: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """MaxSim with given passages; the engine adds over the query's tokens, the mean is taken here."""
        query = token_query(self.schema, tokens)
        return self._score(query if len(query) else None, "colbert", ids) / max(1, len(query))

    def count(self) -> int:
        """The number of passages stored."""
        with self._named_errors():
            return int(self._open_shard().count(qdrant.CountRequest(exact=True)))

    def ids(self) -> Iterator[str]:
        """Iterate over the ids, a thousand at a time."""
        offset = None
        while True:
            request = qdrant.ScrollRequest(offset=offset, limit=1000, with_payload=_ONLY_ID, with_vector=False)
            with self._named_errors():
                records, offset = self._open_shard().scroll(request)
            yield from (stored_id(record) for record in records)
            if offset is None:
                return

    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What is stored for these ids."""
        with self._named_errors():
            records = self._open_shard().retrieve([key(id) for id in set(ids)], _ONLY_ID, True)
        held: dict[str, Any] = {stored_id(record): record.vector or {} for record in records}
        for id in ids:
            if id not in held:
                raise UsageError(f"'{self.directory}' stores no passage '{id}'")
        rows = [held[id] for id in ids]
        return assemble(
            self.schema,
            [np.array(row["dense"], np.float32) for row in rows] if self.schema.dense else [],
            [lexical_row(row.get("sparse")) for row in rows],
            [np.array(row.get("colbert", np.zeros((0, self.schema.colbert or 0))), np.float32) for row in rows],
        )

    def flush(self) -> None:
        """Flush the engine's segments and its log."""
        with self._writing, self._named_errors():
            self._open_shard().flush()

    def optimize(self, progress: Progress | None = None) -> None:
        """Build the graph in a child process at low priority, for the engine's `optimize` holds the GIL throughout.

        The directory belongs to the child meanwhile: a search raises IndexStateError, so optimise a generation
        before it serves.
        """
        with self._writing, self._named_errors():
            check_room(self.directory, ROOM)
            self._open_shard().flush()
            self._give_away("is being optimised; search it afterwards")
            try:
                self._run_optimizer(progress)
            finally:
                self._load()
                self._dirty = True

    def close(self) -> None:
        """Flush, write the checksums, and let another owner in."""
        with self._writing, self._named_errors():
            if self._shard is None:
                return
            self._shard.flush()
            self._give_away("was closed; open it again")
            try:
                if not self._read_only:
                    seal(self.directory, known=None if self._dirty else self._sums)
            finally:
                self._release()

    def _search(
        self, query: Any, head: str, k: int, filter: Filter, params: qdrant.SearchParams | None
    ) -> list[Scored]:
        node = parse(filter)
        request = qdrant.QueryRequest(
            limit=k,
            query=qdrant.Query.Nearest(query, using=head),
            filter=None if node is None else to_filter(node),
            params=params,
            with_payload=_ONLY_ID,
        )
        with self._named_errors():
            points = self._open_shard().query(request)
        return ranked((stored_id(p) for p in points), (p.score for p in points), k)

    def _score(self, query: Any, head: str, ids: Sequence[str]) -> np.ndarray:
        """Exact scores of given passages; 0 where the passage has nothing that the query could meet."""
        keys: list[qdrant.PointId] = [key(id) for id in ids]
        wanted = set(keys)
        found: dict[qdrant.PointId, float] = {}
        with self._named_errors():
            shard = self._open_shard()
            if query is not None and wanted:
                request = qdrant.QueryRequest(
                    limit=len(wanted),
                    query=qdrant.Query.Nearest(query, using=head),
                    filter=qdrant.Filter(must=[qdrant.HasIdCondition(wanted)]),
                    params=_EXACT,
                )
                found = {str(point.id): point.score for point in shard.query(request)}
            if rest := [key for key in wanted if key not in found]:
                found.update({str(record.id): 0.0 for record in shard.retrieve(rest, False, False)})
        return np.array([found.get(key, np.nan) for key in keys], np.float64)

    def _index_numbers(self, payloads: list[dict[str, Any]]) -> None:
        """Create the indexes of ordered keys seen for the first time, before the graph is built."""
        for field in new_number_fields(payloads, self._number_indexes):
            self._update(qdrant.UpdateOperation.create_field_index(field, qdrant.FloatIndexParams()))
            self._number_indexes.add(field)

    def _update(self, operation: qdrant.UpdateOperation) -> None:
        if self._read_only:
            raise IndexStateError(f"'{self.directory}' is open for reading")
        with self._named_errors():
            check_room(self.directory, ROOM)
            self._dirty = True
            self._open_shard().update(operation)

    def _open_shard(self) -> qdrant.EdgeShard:
        if self._shard is None:
            raise IndexStateError(f"'{self.directory}' {self._away}")
        return self._shard

    def _load(self) -> None:
        folder = Path(self._copy.name) if self._copy else self.directory
        self._shard = qdrant.EdgeShard.load(str(folder / SHARD))
        self._number_indexes = set(self._shard.info().payload_schema) - {FACTS}

    def _give_away(self, why: str) -> None:
        shard, self._shard, self._away = self._shard, None, why
        if shard is not None:
            shard.close()  # waits for the searches in flight

    def _run_optimizer(self, progress: Progress | None) -> None:
        started = time.monotonic()
        # the child holds the owner's lock too, so that nobody gets in if this process dies before it
        module, fds = "ultrarag.retrieve.engines.qdrant.optimize", self._lock.descriptors()
        with start_child(module, str(self.directory / SHARD), pass_fds=fds, stderr=subprocess.PIPE, text=True) as child:
            try:
                errors = _wait(child, lambda: progress and progress(time.monotonic() - started))
            except BaseException:  # such as Ctrl-C: the engine survives a kill, as its tests show
                child.kill()
                raise
        if child.returncode:
            raise IndexStateError(
                f"optimising '{self.directory}' failed ({errors.strip()[-300:] or f'exit status {child.returncode}'}); "
                f"nothing is lost: the index answers without the graph"
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say which directory an error of the engine, or of the file system, is about."""
        try:
            yield
        except UltraragError:
            raise
        except Exception as error:
            if found := resource_error(error, self.directory):
                raise found from error
            if isinstance(error, OSError):
                raise IndexStateError(f"'{self.directory}': {error}") from error
            if type(error) is not Exception:  # the engine raises nothing more specific
                raise
            raise IndexStateError(f"'{self.directory}': the vector engine says: {error}") from error

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        """Let go of the lock when opening fails."""
        try:
            yield
        except BaseException:
            self._shard = None
            self._release()
            raise

    def _release(self) -> None:
        """Let another owner in, and remove the copy that was only read."""
        self._lock.release()
        if self._copy is not None:
            self._copy.cleanup()


def copied(shard: Path) -> tempfile.TemporaryDirectory[str]:
    """Copy a shard to where something can be written; ResourceError where nothing can."""
    copy = tempfile.TemporaryDirectory(prefix="ultrarag-")
    try:
        check_room(Path(copy.name), ROOM + _occupied(shard))
        copy_with_holes(shard, Path(copy.name) / shard.name)
    except BaseException:
        copy.cleanup()
        raise
    return copy


def _occupied(folder: Path) -> int:
    """Bytes of the files below a folder, without their holes."""
    found = (path.stat() for path in folder.rglob("*"))
    return sum(getattr(status, "st_blocks", status.st_size // 512) * 512 for status in found)


def _wait(child: subprocess.Popen[str], tick: Callable[[], object]) -> str:
    """Wait for a child, calling `tick` every second; return what it wrote to stderr."""
    while True:
        try:
            return child.communicate(timeout=1)[1]
        except subprocess.TimeoutExpired:
            tick()
