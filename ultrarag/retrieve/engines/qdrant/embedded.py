"""The embedded default engine: Qdrant in this process, through qdrant-edge-py.

Dense vectors are searched through an HNSW graph once `optimize` has built it (and exactly before that, or on
demand), lexical weights and MaxSim always exactly. What the engine does not do by itself is done here: ids of any
form, clear errors, checksums while it is closed, and an optimisation that leaves the serving process responsive.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
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
    verify_seal,
)
from ultrarag.retrieve.engines.arrays import (
    assemble,
    dense_query,
    prepare,
    sparse_query,
    sparse_rows,
    token_query,
    token_rows,
)
from ultrarag.retrieve.engines.base import Progress, Schema, write_schema
from ultrarag.retrieve.engines.qdrant.optimize import optimize_in_child
from ultrarag.retrieve.engines.qdrant.payload import (
    FACTS,
    NUMBERS,
    field,
    key,
    new_number_fields,
    stored_id,
    to_payload,
)
from ultrarag.retrieve.ranking import Scored, beam, check_ids, check_k, ranked, through_ties
from ultrarag.retrieve.search import AllOf, AnyOf, Filter, HasFact, InRange, Node, Not, parse
from ultrarag.types import Embeddings

#: Directory of the engine's own files, below the backend's.
SHARD = "shard"
#: Candidates kept while searching the graph.
HNSW_EF = 128
#: Points written to the engine in one operation.
CHUNK_POINTS = 500

#: Edges per node and candidates while building: the engine's defaults are 16 and 100.
HNSW_M, HNSW_EF_CONSTRUCT = 16, 128
#: Segments of fewer vectors than these kilobytes hold get no graph: an exact scan is faster there (0.5 ms against
#: 0.8 ms at 10,000 x 384, one core).
HNSW_FROM_KB = 20_000
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

        They are removed before the engine sees its files, for it consumes some while it loads: after a kill at
        that moment they would say that files are missing. As the engine writes while it loads, what is only read is
        loaded from a copy in the system's folder for temporary files (TMPDIR).
        """
        backend = cls(directory, schema, read_only)
        with backend._releasing(), backend._named_errors():
            backend._sums = verify_seal(directory) if verify else read_seal(directory)
            if read_only:
                backend._copy = copied(directory / SHARD)
            else:
                check_room(directory, ROOM)
                remove_seal(directory)
            backend._load()
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
            for start in range(0, len(points), CHUNK_POINTS):
                self._update(qdrant.UpdateOperation.upsert_points(points[start : start + CHUNK_POINTS]))

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points."""
        check_ids(ids)
        with self._writing:
            if ids:
                self._update(qdrant.UpdateOperation.delete_points([key(id) for id in ids]))

    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Search the graph, or compare with all where `exact` or where there is no graph yet.

        A graph need not reach every passage (1,188 of 3,000 for a huge k, measured): when it gives fewer than were
        asked for, all are compared, so that k hits come back whenever k passages pass the filter.
        """
        k, query = check_k(k), dense_query(self.schema, vector)

        def in_graph(hits: int) -> list[Scored]:
            return self._search(query, "dense", hits, filter, qdrant.SearchParams(hnsw_ef=beam(hits, HNSW_EF)))

        def among_all(hits: int) -> list[Scored]:
            return self._search(query, "dense", hits, filter, _EXACT)

        return through_ties(among_all, k) if exact else through_ties(in_graph, k, among_all)

    def search_sparse(
        self, token_ids: Sequence[int], weights: Sequence[float], k: int, filter: Filter = None
    ) -> list[Scored]:
        """Search the inverted index."""
        k, query = check_k(k), sparse_query(self.schema, token_ids, weights)
        if not len(query[0]):
            return []
        return through_ties(lambda hits: self._search(sparse_vector(query), "sparse", hits, filter, None), k)

    def search_tokens(self, tokens: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Compare with all; the engine adds over the query's tokens, the mean is taken here."""
        k, query = check_k(k), token_query(self.schema, tokens)
        if not len(query):
            return []
        hits = through_ties(lambda n: self._search(query, "colbert", n, filter, _EXACT), k)
        return [(id, score / len(query)) for id, score in hits]

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
            self._detach("is being optimised; search it afterwards")
            try:
                # the child holds the owner's lock too, so that nobody gets in if this process dies before it
                optimize_in_child(self.directory / SHARD, self._lock.descriptors(), progress)
            finally:
                self._load()
                self._dirty = True

    def close(self) -> None:
        """Flush, write the checksums, and let another owner in."""
        with self._writing, self._named_errors():
            if self._shard is None:
                return
            self._shard.flush()
            self._detach("was closed; open it again")
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
        for name in new_number_fields(payloads, self._number_indexes):
            self._update(qdrant.UpdateOperation.create_field_index(name, qdrant.FloatIndexParams()))
            self._number_indexes.add(name)

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

    def _detach(self, why: str) -> None:
        shard, self._shard, self._away = self._shard, None, why
        if shard is not None:
            shard.close()  # waits for the searches in flight

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


def config(schema: Schema) -> qdrant.EdgeConfig:
    """Inner products for every head; a graph for the dense vectors only, as MaxSim is asked for candidates."""
    vectors = {}
    if schema.dense:
        vectors["dense"] = qdrant.EdgeVectorParams(size=schema.dense, distance=qdrant.Distance.Dot)
    if schema.colbert:
        vectors["colbert"] = qdrant.EdgeVectorParams(
            size=schema.colbert,
            distance=qdrant.Distance.Dot,
            multivector_config=qdrant.MultiVectorConfig(qdrant.MultiVectorComparator.MaxSim),
            hnsw_config=qdrant.HnswIndexConfig(m=0, ef_construct=16, full_scan_threshold=HNSW_FROM_KB),
            memory=qdrant.Memory.Cold,
        )
    return qdrant.EdgeConfig(
        vectors=vectors,
        sparse_vectors={"sparse": qdrant.EdgeSparseVectorParams()} if schema.sparse else None,
        hnsw_config=qdrant.HnswIndexConfig(HNSW_M, HNSW_EF_CONSTRUCT, full_scan_threshold=HNSW_FROM_KB // 4),
        optimizers=qdrant.EdgeOptimizersConfig(indexing_threshold=HNSW_FROM_KB),
    )


def named_vectors(ids: Sequence[str], batch: Embeddings) -> list[dict[str, Any]]:
    """The vectors of each point by head; a head without tokens is left out, which the engine would refuse."""
    vectors: list[dict[str, Any]] = [{} for _ in ids]
    if batch.dense is not None:
        for point, row in zip(vectors, batch.dense, strict=True):
            point["dense"] = np.ascontiguousarray(row, np.float32)
    if batch.sparse is not None:
        for point, weights in zip(vectors, sparse_rows(ids, batch.sparse), strict=True):
            if len(weights[0]):
                point["sparse"] = sparse_vector(weights)
    if batch.colbert is not None:
        for point, tokens in zip(vectors, token_rows(batch), strict=True):
            if len(tokens):
                point["colbert"] = tokens
    return vectors


def sparse_vector(weights: tuple[np.ndarray, np.ndarray]) -> qdrant.SparseVector:
    return qdrant.SparseVector(weights[0].tolist(), weights[1].tolist())


def lexical_row(vector: qdrant.SparseVector | None) -> tuple[np.ndarray, np.ndarray]:
    if vector is None:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    return np.array(vector.indices, np.int64), np.array(vector.values, np.float32)


def to_filter(node: Node) -> qdrant.Filter:
    """Translate a filter's tree."""
    if isinstance(node, Not):
        return qdrant.Filter(must_not=[to_filter(node.node)])
    if isinstance(node, AllOf):
        return qdrant.Filter(must=[to_filter(child) for child in node.nodes])
    if isinstance(node, AnyOf):
        return qdrant.Filter(should=[to_filter(child) for child in node.nodes])
    if isinstance(node, HasFact):
        return qdrant.Filter(must=[qdrant.FieldCondition(FACTS, match=qdrant.MatchAny(list(node.facts)))])
    return qdrant.Filter(must=[qdrant.FieldCondition(f"{NUMBERS}.{field(node.fact)}", range=_range(node))])


def _range(node: InRange) -> qdrant.RangeFloat:
    return qdrant.RangeFloat(gt=node.gt, gte=node.gte, lt=node.lt, lte=node.lte)
