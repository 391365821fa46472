"""A collection in a Qdrant server, or in qdrant-client's local mode (exact search in Python, for tests).

Dense vectors are searched through the server's HNSW graph, lexical weights and MaxSim exactly, as in the embedded
engine. Where vectors are quantised, graph and MaxSim compare codes, and the best of them are compared anew with the
vectors themselves: scores are exact all the same. A write returns when the server has applied it, which is what keeps
a fast writer from running ahead of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qdrant_client import models

from ultrarag.errors import UsageError
from ultrarag.retrieve.engines.address import Address
from ultrarag.retrieve.engines.arrays import (
    assemble,
    dense_query,
    prepare,
    sparse_query,
    token_query,
)
from ultrarag.retrieve.engines.base import Progress, Schema
from ultrarag.retrieve.engines.qdrant.client import (
    QdrantConnection,
    floats_of,
    lexical_row,
    named_vectors,
    settings,
    to_filter,
)
from ultrarag.retrieve.engines.qdrant.payload import FACTS, key, new_number_fields, stored_id, to_payload
from ultrarag.retrieve.engines.server import OVERSAMPLING, REQUEST_POINTS, ServerBackend, requests
from ultrarag.retrieve.ranking import Scored, beam, check_ids, check_k, ranked, through_ties
from ultrarag.retrieve.search import Filter, parse
from ultrarag.types import Embeddings

#: Candidates kept while searching the graph.
HNSW_EF = 128
#: A server makes room for as many hits as are asked for; more than these are asked for only where they exist.
MANY = 10_000

_EXACT = models.SearchParams(exact=True)
_NUDGE = models.OptimizersConfigDiff()


class QdrantServer(QdrantConnection, ServerBackend):
    """The vectors of one generation in a collection of a Qdrant server."""

    def __init__(
        self, directory: Path, schema: Schema, address: Address, collection: str, read_only: bool = False
    ) -> None:
        super().__init__(directory, schema, address, collection, read_only)
        self._number_indexes: set[str] | None = None

    def upsert(self, ids: Sequence[str], embeddings: Embeddings, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Write points; one that exists is replaced as a whole."""
        ids, batch, payloads = prepare(self.schema, ids, embeddings, payloads)
        vectors = named_vectors(ids, batch)
        held = [to_payload(id, payload) for id, payload in zip(ids, payloads, strict=True)]
        self._index_numbers(held)
        points = [
            models.PointStruct(id=key(id), vector=vector, payload=payload)
            for id, vector, payload in zip(ids, vectors, held, strict=True)
        ]
        for part in requests(points, floats_of):
            self._call(lambda client, part=part: client.upsert(self.collection, part, wait=True))  # type: ignore[misc]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points."""
        check_ids(ids)
        for part in requests(list(ids), lambda id: 1):
            selector = models.PointIdsList(points=[key(id) for id in part])
            self._call(lambda client, s=selector: client.delete(self.collection, s, wait=True))  # type: ignore[misc]

    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Search the graph, or compare with all where `exact`, or where the graph reaches fewer than k."""
        k, query = check_k(k), dense_query(self.schema, vector).tolist()

        def in_graph(hits: int) -> list[Scored]:
            graph = models.SearchParams(hnsw_ef=min(beam(hits, HNSW_EF), MANY), quantization=self._anew(hits))
            return self._search(query, "dense", hits, filter, graph)

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
        hits = through_ties(lambda hits: self._search(_sparse(query), "sparse", hits, filter, None), k)
        return [(id, score) for id, score in hits if score > 0]

    def search_tokens(self, tokens: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Compare with all, by codes where there are; the engine adds over query tokens, the mean is taken here."""
        k, query = check_k(k), token_query(self.schema, tokens)
        if not len(query):
            return []

        def search(hits: int) -> list[Scored]:
            anew = None if exact else self._anew(hits)
            params = _EXACT if anew is None else models.SearchParams(quantization=anew)
            return self._search(query.tolist(), "colbert", hits, filter, params)

        hits = through_ties(search, k)
        return [(id, score / len(query)) for id, score in hits]

    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages."""
        return self._score(dense_query(self.schema, vector).tolist(), "dense", ids)

    def score_sparse(self, token_ids: Sequence[int], weights: Sequence[float], ids: Sequence[str]) -> np.ndarray:
        """Lexical scores of given passages."""
        query = sparse_query(self.schema, token_ids, weights)
        return self._score(_sparse(query) if len(query[0]) else None, "sparse", ids)

    def maxsim(self, tokens: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """MaxSim with given passages; the engine adds over the query's tokens, the mean is taken here."""
        query = token_query(self.schema, tokens)
        return self._score(query.tolist() if len(query) else None, "colbert", ids) / max(1, len(query))

    def count(self) -> int:
        """The number of passages stored."""
        return int(self._call(lambda client: client.count(self.collection, exact=True)).count)

    def ids(self) -> Iterator[str]:
        """Iterate over the ids, a thousand at a time."""
        offset: Any = None
        while True:
            records, offset = self._call(
                lambda client, offset=offset: client.scroll(  # type: ignore[misc]
                    self.collection, limit=1000, offset=offset, with_payload=["id"], with_vectors=False
                )
            )
            yield from (stored_id(record) for record in records)
            if offset is None:
                return

    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What is stored for these ids."""
        held: dict[str, Any] = {}
        for part in requests(list(dict.fromkeys(ids)), lambda id: 1):
            for record in self._retrieve(part, payload=True, vectors=True):
                held[stored_id(record)] = record.vector or {}
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

    def optimize(self, progress: Progress | None = None) -> None:
        """Wait until the server has built its graph, which it does by itself; searches are answered meanwhile."""
        started, nudged = time.monotonic(), False
        while (status := self._call(lambda client: client.get_collection(self.collection)).status) != "green":
            if status == "grey" and not nudged:  # a server that was started again waits for a word
                nudged = self._call(lambda client: client.update_collection(self.collection, optimizers_config=_NUDGE))
            time.sleep(0.5)
            if progress is not None:
                progress(time.monotonic() - started)

    def _create(self) -> None:
        self._call(
            lambda client: client.create_collection(self.collection, **settings(self.schema, self.address.quantise))
        )
        self._number_indexes = set()
        self._index(FACTS, models.PayloadSchemaType.KEYWORD)

    def _exists(self) -> bool:
        return bool(self._call(lambda client: client.collection_exists(self.collection)))

    def _drop(self) -> None:
        self._call(lambda client: client.delete_collection(self.collection))

    def _search(self, query: Any, head: str, k: int, filter: Filter, params: Any) -> list[Scored]:
        node = parse(filter)
        if k > MANY:
            k = min(k, max(1, self.count()))
        found = self._call(
            lambda client: client.query_points(
                self.collection,
                query=query,
                using=head,
                limit=k,
                query_filter=None if node is None else to_filter(node),
                search_params=self._params(params),
                with_payload=["id"],
            )
        )
        return ranked((stored_id(p) for p in found.points), (p.score for p in found.points), k)

    def _anew(self, hits: int) -> models.QuantizationSearchParams | None:
        """How many of the best codes are compared anew, by vectors on the server's disk; None where none are kept."""
        if not self.address.quantise:
            return None
        most = max(1.0, min(OVERSAMPLING[self.address.quantise], MANY / hits))
        return models.QuantizationSearchParams(rescore=True, oversampling=most)

    def _params(self, params: models.SearchParams | None) -> models.SearchParams | None:
        return params if self.address.folder is None else None  # the local mode is exact, and warns

    def _score(self, query: Any, head: str, ids: Sequence[str]) -> np.ndarray:
        """Exact scores of given passages; 0 where the passage has nothing that the query could meet."""
        found: dict[str, float] = {}
        for part in requests(list(dict.fromkeys(ids)), lambda id: 1):
            if query is not None:
                found.update(self._score_part(query, head, [key(id) for id in part]))
            rest = [id for id in part if key(id) not in found]
            found.update({str(record.id): 0.0 for record in self._retrieve(rest)} if rest else {})
        return np.array([found.get(key(id), np.nan) for id in ids], np.float64)

    def _score_part(self, query: Any, head: str, keys: list[str]) -> dict[str, float]:
        among = models.Filter(must=[models.HasIdCondition(has_id=list(keys))])
        found = self._call(
            lambda client: client.query_points(
                self.collection,
                query=query,
                using=head,
                limit=len(keys),
                query_filter=among,
                search_params=self._params(_EXACT),
            )
        )
        return {str(point.id): point.score for point in found.points}

    def _retrieve(self, ids: Sequence[str], payload: bool = False, vectors: bool = False) -> list[Any]:
        keys = [key(id) for id in ids]
        fields = ["id"] if payload else False
        found: list[Any] = []
        step = REQUEST_POINTS if not self.schema.colbert else 32
        for start in range(0, len(keys), step):
            part = keys[start : start + step]
            found += self._call(
                lambda client, part=part: client.retrieve(  # type: ignore[misc]
                    self.collection, part, with_payload=fields, with_vectors=vectors
                )
            )
        return found

    def _index_numbers(self, payloads: list[dict[str, Any]]) -> None:
        """Create the indexes of ordered keys seen for the first time, before the points that have them."""
        if self._number_indexes is None:
            info = self._call(lambda client: client.get_collection(self.collection))
            self._number_indexes = set(info.payload_schema) - {FACTS}
        for field in new_number_fields(payloads, self._number_indexes):
            self._index(field, models.PayloadSchemaType.FLOAT)
            self._number_indexes.add(field)

    def _index(self, field: str, kind: models.PayloadSchemaType) -> None:
        if self.address.folder is None:  # the local mode has no indexes
            self._call(lambda client: client.create_payload_index(self.collection, field, kind, wait=True))


def _sparse(weights: tuple[np.ndarray, np.ndarray]) -> models.SparseVector:
    return models.SparseVector(indices=weights[0].tolist(), values=weights[1].tolist())
