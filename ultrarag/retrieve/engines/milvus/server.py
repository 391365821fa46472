"""A collection in a Milvus server, or in Milvus Lite run as one.

Dense vectors are searched through an HNSW graph, lexical weights through inverted lists. Scores of given passages, and
MaxSim, are computed here from the stored vectors; so are those of the best codes, where dense vectors are quantised:
every version can do that, at the price of fetching them. Milvus has no exact search beside its graph: `exact` searches
with a beam of thousands.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.retrieve.engines.arrays import (
    assemble,
    dense_query,
    prepare,
    products,
    sparse_query,
    token_query,
)
from ultrarag.retrieve.engines.base import Progress
from ultrarag.retrieve.engines.milvus.client import (
    INDEXES,
    LISTS,
    SINCE,
    STRONG,
    MilvusConnection,
    expression,
    lexical_row,
    main_indexes,
    main_rows,
    main_schema,
    quoted,
    token_key,
    token_rows_of,
    tokens_indexes,
    tokens_per_row,
    tokens_schema,
    word_index,
)
from ultrarag.retrieve.engines.qdrant import key
from ultrarag.retrieve.engines.server import OVERSAMPLING, REQUEST_POINTS, ServerBackend, requests
from ultrarag.retrieve.ranking import Scored, beam, check_ids, check_k, ranked, through_ties, top
from ultrarag.retrieve.search import Filter, parse
from ultrarag.types import Embeddings

#: Candidates kept while searching the graph, and where an exact search was asked for.
HNSW_EF, EXACT_EF = 128, 4096
#: Lists of binary codes that a search looks into, of each segment.
PROBES = 64
#: Most hits that Milvus gives to a search.
MOST_HITS = 16_384


class MilvusServer(MilvusConnection, ServerBackend):
    """The vectors of one generation in a collection of a Milvus server; token vectors in one beside it."""

    @property
    def _tokens(self) -> str:
        return f"{self.collection}_tokens"

    def upsert(self, ids: Sequence[str], embeddings: Embeddings, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Write rows; one that exists is replaced as a whole. Token vectors come before the row that counts them."""
        ids, batch, payloads = prepare(self.schema, ids, embeddings, payloads)
        rows = main_rows(ids, batch, payloads)
        if self.schema.colbert:
            self._write(self._tokens, token_rows_of(rows, batch, self.schema.colbert))
        self._write(self.collection, rows)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows, then their token vectors."""
        check_ids(ids)
        for part in requests([key(id) for id in ids], lambda key: 1):
            self._delete(self.collection, f"key in {quoted(part)}")
            if self.schema.colbert:
                self._delete(self._tokens, f"passage in {quoted(part)}")

    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Search the graph, with a wider beam where `exact`, or where it reaches fewer than k.

        A graph need not reach every passage: where k are there and it gives fewer, all are compared here. Of quantised
        vectors the best codes are compared anew, where `exact` at least as many as the wider beam has.
        """
        k, query = check_k(k), dense_query(self.schema, vector)

        def in_graph(hits: int, least: int = HNSW_EF) -> list[Scored]:
            if hits > MOST_HITS:
                return []
            if self.address.quantise:
                return self._search_codes(query, hits, filter, exact=least == EXACT_EF)
            return self._search(query, "dense", hits, filter, {"ef": beam(hits, least)})

        def among_all(hits: int) -> list[Scored]:
            found = in_graph(hits, EXACT_EF)
            if found and len(found) in (hits, self._passing(filter)):
                return found
            return self._scan("dense", lambda rows: products(_matrix(rows, self.schema.dense), query), hits, filter)

        return through_ties(among_all, k) if exact else through_ties(in_graph, k, among_all)

    def _search_codes(self, query: np.ndarray, hits: int, filter: Filter, exact: bool) -> list[Scored]:
        """The best by their codes, of which the best by their vectors."""
        wanted = max(int(OVERSAMPLING[self.address.quantise] * hits), EXACT_EF if exact else 0)
        wanted = min(wanted, MOST_HITS)
        lists = {"nprobe": LISTS if exact else PROBES}
        params = lists if self.address.quantise == "binary" else {"ef": beam(wanted, HNSW_EF)}
        ids = [id for id, _ in self._search(query, "dense", wanted, filter, params)]
        scores = self.score_dense(query, ids)
        held = np.flatnonzero(~np.isnan(scores))  # one may have been deleted meanwhile
        return ranked([ids[place] for place in held], scores[held], hits)

    def search_sparse(
        self, token_ids: Sequence[int], weights: Sequence[float], k: int, filter: Filter = None
    ) -> list[Scored]:
        """Search the inverted lists."""
        k, query = check_k(k), sparse_query(self.schema, token_ids, weights)
        if not len(query[0]):
            return []
        wanted = dict(zip(query[0].tolist(), query[1].tolist(), strict=True))

        def search(hits: int) -> list[Scored]:
            if hits <= MOST_HITS:
                return self._search(wanted, "sparse", hits, filter, {"drop_ratio_search": 0.0})
            return self._scan(
                "sparse", lambda rows: np.array([_overlap(wanted, r["sparse"]) for r in rows]), hits, filter
            )

        return [(id, score) for id, score in through_ties(search, k) if score > 0]

    def search_tokens(self, tokens: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """Refuse: token vectors are kept to score given passages, and the server cannot compare with all.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a Milvus server gives late interaction (colbert) no candidates of its own: use the engine qdrant-edge, "
            "numpy or a Qdrant server, or let BM25 give them (weights={'colbert': 1, 'bm25': 1})"
        )

    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages."""
        query = dense_query(self.schema, vector)
        return self._scores(ids, ["dense"], lambda row: float(np.asarray(row["dense"], np.float32) @ query))

    def score_sparse(self, token_ids: Sequence[int], weights: Sequence[float], ids: Sequence[str]) -> np.ndarray:
        """Lexical scores of given passages."""
        query = sparse_query(self.schema, token_ids, weights)
        wanted = dict(zip(query[0].tolist(), query[1].tolist(), strict=True))
        return self._scores(ids, ["sparse"], lambda row: _overlap(wanted, row["sparse"]))

    def maxsim(self, tokens: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """MaxSim with given passages, whose token vectors are fetched."""
        query = token_query(self.schema, tokens)
        found = np.full(len(ids), np.nan)
        step = REQUEST_POINTS // 8
        for start in range(0, len(ids), step):
            part = [key(id) for id in ids[start : start + step]]
            held = self._stored_tokens(self._rows(part, ["tokens"]))
            for place, name in enumerate(part, start):
                if (stored := held.get(name)) is not None:
                    found[place] = (query @ stored.T).max(1).mean() if len(query) and len(stored) else 0.0
        return found

    def count(self) -> int:
        """The number of passages stored."""
        return self._passing(None)

    def _passing(self, filter: Filter) -> int:
        node = parse(filter)
        condition = "" if node is None else expression(node)
        rows = self._call(
            lambda client: client.query(
                self.collection, filter=condition, output_fields=["count(*)"], **STRONG, **self._time
            )
        )
        return int(rows[0]["count(*)"])

    def ids(self) -> Iterator[str]:
        """Iterate over the ids, a thousand at a time."""
        for rows in self._pages([], None):
            yield from (json.loads(row["id"]) for row in rows)

    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What is stored for these ids."""
        keys = [key(id) for id in ids]
        rows = self._rows(list(dict.fromkeys(keys)), ["tokens", *self._vector_fields])
        for id, name in zip(ids, keys, strict=True):
            if name not in rows:
                raise UsageError(f"'{self.directory}' stores no passage '{id}'")
        tokens = self._stored_tokens(rows) if self.schema.colbert else {}
        return assemble(
            self.schema,
            [np.asarray(rows[name]["dense"], np.float32) for name in keys] if self.schema.dense else [],
            [lexical_row(rows[name].get("sparse")) for name in keys],
            [tokens.get(name, np.zeros((0, 0), np.float32)) for name in keys],
        )

    def optimize(self, progress: Progress | None = None) -> None:
        """Let the server seal what was written and build its graph; searches are answered meanwhile."""
        started = time.monotonic()
        names = [self.collection, *([self._tokens] if self.schema.colbert else [])]
        for name in names:
            self._call(lambda client, name=name: client.flush(name, **self._time))  # type: ignore[misc]
        while self.schema.dense and self._unindexed():
            time.sleep(0.5)
            if progress is not None:
                progress(time.monotonic() - started)

    def _unindexed(self) -> bool:
        found = self._call(lambda client: client.describe_index(self.collection, "dense", **self._time)) or {}
        return int(found.get("pending_index_rows") or 0) > 0

    @property
    def _vector_fields(self) -> list[str]:
        return [*(["dense"] if self.schema.dense else []), *(["sparse"] if self.schema.sparse else [])]

    def _create(self) -> None:
        quantise = self.address.quantise
        if self.schema.dense and quantise == "binary" and self._is_lite():
            raise UsageError(self._no_index("Milvus Lite takes any name of an index, and keeps float32"))
        if self.schema.colbert:
            self._make(self._tokens, tokens_schema(self.schema, quantise), tokens_indexes(quantise))
        self._make(self.collection, main_schema(self.schema, quantise), main_indexes(self.schema, quantise))

    def _is_lite(self) -> bool:
        return "lite" in str(self._call(lambda client: client.get_server_version(**self._time)))

    def _make(self, name: str, fields: Any, indexes: Any) -> None:
        words = "facts" if name == self.collection else "passage"
        self._call(lambda client: client.create_collection(name, schema=fields, **STRONG, **self._time))
        try:
            self._call(lambda client: client.create_index(name, indexes, sync=False, **self._time))
        except IndexStateError as error:
            if "invalid index type" not in str(error):
                raise
            raise UsageError(self._no_index(str(error))) from error
        try:
            self._call(lambda client: client.create_index(name, word_index(words), sync=False, **self._time))
        except IndexStateError as error:
            if "does not support" not in str(error):  # Milvus Lite has no index over arrays, and filters all the same
                raise
        self._call(lambda client: client.load_collection(name, **self._time))

    def _no_index(self, why: str) -> str:
        quantise = self.address.quantise
        others = " or quantise=int8, which all since 2.5 and Milvus Lite can" if quantise == "binary" else ""
        return (
            f"'{self.address.uri}' has no index {INDEXES[quantise]}, which quantise={quantise} needs ({why}): use a "
            f"Milvus server of version {SINCE[quantise]} or later,{others} or leave quantise out"
        )

    def _exists(self) -> bool:
        if not self._call(lambda client: client.has_collection(self.collection, **self._time)):
            return False
        self._load()
        return True

    def _load(self) -> None:
        for name in [self.collection, *([self._tokens] if self.schema.colbert else [])]:
            self._call(lambda client, name=name: client.load_collection(name, **self._time))  # type: ignore[misc]

    def _drop(self) -> None:
        for name in [self.collection, *([self._tokens] if self.schema.colbert else [])]:
            self._call(lambda client, name=name: client.drop_collection(name, **self._time))  # type: ignore[misc]

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        for part in requests(rows, _floats_of):
            self._call(lambda client, part=part: client.upsert(name, part, **self._time))  # type: ignore[misc]

    def _delete(self, name: str, condition: str) -> None:
        self._call(lambda client: client.delete(name, filter=condition, **self._time))

    def _search(self, query: Any, head: str, k: int, filter: Filter, params: dict[str, Any]) -> list[Scored]:
        node = parse(filter)
        found = self._call(
            lambda client: client.search(
                self.collection,
                data=[query],
                anns_field=head,
                limit=k,
                filter="" if node is None else expression(node),
                output_fields=["id"],
                search_params={"metric_type": "IP", "params": params},
                **STRONG,
                **self._time,
            )
        )[0]
        return ranked((json.loads(hit["entity"]["id"]) for hit in found), (hit["distance"] for hit in found), k)

    def _scan(self, head: str, score: Callable[[Any], np.ndarray], k: int, filter: Filter) -> list[Scored]:
        """Compare with all that pass a filter, here: for more hits than Milvus gives to a search."""
        ids: list[str] = []
        scores: list[np.ndarray] = []
        for rows in self._pages([head], filter):
            ids += [json.loads(row["id"]) for row in rows]
            scores.append(score(rows))
        values = np.concatenate(scores) if scores else np.zeros(0)
        places = top(values, k)
        return ranked([ids[place] for place in places], values[places], k)

    def _pages(self, fields: list[str], filter: Filter) -> Iterator[list[dict[str, Any]]]:
        node = parse(filter)
        pages = self._call(
            lambda client: client.query_iterator(
                self.collection,
                batch_size=1000,
                filter="" if node is None else expression(node),
                output_fields=["id", *fields],
                **STRONG,
                **self._time,
            )
        )
        try:
            while rows := self._call(lambda client: pages.next()):
                yield rows
        finally:
            pages.close()

    def _rows(self, keys: Sequence[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        """The rows of these keys that exist."""
        return {row["key"]: row for row in self._get(self.collection, keys, fields)}

    def _get(self, name: str, keys: Sequence[str], fields: list[str]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(keys), REQUEST_POINTS):
            condition = f"key in {quoted(keys[start : start + REQUEST_POINTS])}"
            yield from self._call(
                lambda client, condition=condition: client.query(  # type: ignore[misc]
                    name, filter=condition, output_fields=["key", *fields], **STRONG, **self._time
                )
            )

    def _stored_tokens(self, rows: Mapping[str, dict[str, Any]]) -> dict[str, np.ndarray]:
        """The token vectors of passages, (tokens, dim) each."""
        width = self.schema.colbert or 1
        step = tokens_per_row(width)
        wanted = {name: -(-int(row["tokens"]) // step) for name, row in rows.items()}
        keys = [token_key(name, number) for name, count in wanted.items() for number in range(count)]
        held = {
            row["key"]: np.asarray(row["vectors"], np.float32) for row in self._get(self._tokens, keys, ["vectors"])
        }
        found = {}
        for name, count in wanted.items():
            parts = [held[key].reshape(-1, width) for n in range(count) if (key := token_key(name, n)) in held]
            found[name] = np.concatenate([np.zeros((0, width), np.float32), *parts])[: int(rows[name]["tokens"])]
        return found

    def _scores(self, ids: Sequence[str], fields: list[str], score: Callable[[Any], float]) -> np.ndarray:
        rows = self._rows(list(dict.fromkeys(key(id) for id in ids)), fields)
        known = (rows.get(key(id)) for id in ids)
        return np.array([np.nan if row is None else score(row) for row in known], np.float64)


def _matrix(rows: Sequence[Mapping[str, Any]], width: int | None) -> np.ndarray:
    return np.array([row["dense"] for row in rows], np.float32).reshape(-1, width or 1)


def _overlap(wanted: Mapping[int, float], stored: Mapping[int, float]) -> float:
    return sum(wanted[int(token)] * weight for token, weight in stored.items() if int(token) in wanted)


def _floats_of(row: Mapping[str, Any]) -> int:
    vectors = (len(row.get("dense", ())), 2 * len(row.get("sparse", ())), len(row.get("vectors", ())))
    return sum(vectors) + len(row.get("facts", ())) * 4
