"""One search on one generation: which heads, how deep, fused how, and the passages that they found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ultrarag.errors import FingerprintError, UsageError
from ultrarag.retrieve.bm25 import BM25
from ultrarag.retrieve.engines import held_vectors
from ultrarag.retrieve.generation import Serving
from ultrarag.retrieve.passages import Store
from ultrarag.retrieve.search.diversity import most_diverse
from ultrarag.retrieve.search.encoding import Encoding
from ultrarag.retrieve.search.filters import Filter, matches
from ultrarag.retrieve.search.fusion import Fused, fuse
from ultrarag.retrieve.search.hits import Hits
from ultrarag.retrieve.search.options import BM25_HEAD, SOURCES, SearchOptions, SearchPlan, plan
from ultrarag.types import Embeddings, Hit, is_blank

Scored = tuple[str, float]
#: What each head gives to passages, by their ids; NaN where it has none of theirs.
Scorers = dict[str, Callable[[Sequence[str]], Any]]
#: Passages up to which a query's tokens are compared with those of all.
MOST_COMPARED = 100_000


def _check_queries(queries: Sequence[str]) -> None:
    for number, query in enumerate(queries):
        if not isinstance(query, str):
            raise UsageError(f"query {number} is {type(query).__name__}, not a string")


class Searcher:
    """Searches one generation; anything that evaluates can take it, as it can take a LiveIndex."""

    def __init__(self, serving: Serving, store: Store, bm25: BM25 | None) -> None:
        self._serving, self._store, self._bm25 = serving, store, bm25

    def search_many(self, queries: Sequence[str], **options: Any) -> list[Hits]:
        """The hits of each query, in their order; an empty query has none."""
        return self._search_many(self._plan(options), queries)

    def score(self, query: str, ids: Sequence[str], **options: Any) -> Hits:
        """Score given passages for a query, best first: all of them, also those that a search would not find.

        Left out are ids that do not exist, and passages that a head has no vectors of. An empty query scores none.
        """
        chosen = self._plan({"normalize": "raw", **options, "ids": ids, "k": max(1, len(ids))})
        return self._search_many(replace(chosen, every=True), [query])[0]

    def _search_many(self, chosen: SearchPlan, queries: Sequence[str]) -> list[Hits]:
        _check_queries(queries)
        asked = [row for row, query in enumerate(queries) if not is_blank(query)]
        results = [self._hits() for _ in queries]
        if not asked or not self._store.count():
            return results
        texts = [queries[row] for row in asked]
        embeddings = self._serving.encode_queries(texts, chosen.encoded) if chosen.encoded else None
        for position, row in enumerate(asked):
            one = None if embeddings is None else embeddings[position : position + 1]
            results[row] = self._search(chosen, one, texts[position])
        return results

    def encoding(self) -> Encoding:
        """The encoder of this search."""
        return Encoding(self._serving)

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are passages."""
        return self._store.existing(ids)

    def search_embeddings(
        self, embeddings: Embeddings, fingerprint: str, *, texts: Sequence[str] | None = None, **options: Any
    ) -> list[Hits]:
        """The hits of queries that were encoded elsewhere, by the encoder with this fingerprint; `texts` for BM25."""
        if fingerprint != self._serving.fingerprint:
            raise FingerprintError(
                f"the query vectors come from the encoder {fingerprint[:12] or '(unnamed)'}, the live generation "
                f"{self._serving.generation.id} from {self._serving.fingerprint[:12]}: encode the queries with the "
                f"live encoder"
            )
        if options.get("heads") is None and options.get("weights") is None:
            options["heads"] = embeddings.heads
        chosen = self._plan(options)
        held = embeddings.heads if texts is None else (*embeddings.heads, BM25_HEAD)
        for head in chosen.heads if chosen.source is None else (*chosen.heads, chosen.source):
            if head not in held:
                raise UsageError(f"head '{head}' is to be searched, but {_lacking(head, embeddings)}")
        words = _words(texts, len(embeddings))
        if not self._store.count():
            return [self._hits() for _ in range(len(embeddings))]
        arrays = embeddings.numpy()
        return [self._search(chosen, arrays[row : row + 1], words[row]) for row in range(len(arrays))]

    def _hits(self, hits: Iterable[Hit] = ()) -> Hits:
        return Hits(hits, generation=self._serving.generation.id, fingerprint=self._serving.fingerprint)

    def _plan(self, options: dict[str, Any]) -> SearchPlan:
        found = plan(SearchOptions.of(options), self._serving.heads, self._bm25 is not None)
        if found.source is None or not self._finds_tokens:
            return found
        return replace(found, source=None, depth=found.k if found.mmr is None else found.depth)

    def _search(self, chosen: SearchPlan, query: Embeddings | None, text: str) -> Hits:
        """The k best, or out of the best those that are unlike each other."""
        if chosen.mmr is None or query is None:
            return self._hits(self._best(chosen, query, text))
        if query.dense is None:
            raise UsageError(f"mmr compares dense vectors, but the embeddings hold {', '.join(query.heads)}")
        pool = {hit.id: hit for hit in self._best(replace(chosen, k=chosen.depth), query, text)}
        ids, vectors = held_vectors(self._serving.backend, list(pool))
        places = most_diverse(query.dense[0], vectors.dense, chosen.k, chosen.mmr) if ids else []
        return self._hits(pool[ids[place]] for place in places)

    def _best(self, chosen: SearchPlan, query: Embeddings | None, text: str) -> list[Hit]:
        """The k best; engines may still hold passages that a write beside this search deletes, so it looks deeper."""
        more = 0
        while True:
            fused = self._fused(chosen, query, text, more)
            passages = self._store.get([found.id for found in fused])
            gone = len(fused) - len(passages)
            if not gone or len(fused) < chosen.k + more:
                hits = [Hit(f.id, f.score, passages[f.id], f.scores) for f in fused if f.id in passages]
                return hits[: chosen.k]
            more = 2 * more + gone

    def _fused(self, chosen: SearchPlan, query: Embeddings | None, text: str, more: int) -> Sequence[Fused]:
        """The k and some more best of all heads."""
        score = self._scorers(query, text)
        counted = self._found(chosen, query, text, more) if chosen.ids is None else self._given(chosen, score)
        bounded: dict[str, dict[str, float]] = {}
        if chosen.min_scores:
            counted, bounded = _above(counted, chosen.min_scores, score)
        fused = fuse(counted, chosen.k + more, chosen.weights, chosen.method, lambda h, ids: score[h](ids))
        if not bounded:
            return fused
        return [replace(f, scores={**{h: s[f.id] for h, s in bounded.items()}, **f.scores}) for f in fused]

    def _given(self, chosen: SearchPlan, score: Scorers) -> dict[str, list[Scored]]:
        """What each head gives to the passages that were named and pass the filter."""
        named = self._store.get(chosen.ids or ())
        ids = [id for id, passage in named.items() if matches(chosen.filter, passage.metadata)]
        lists = {head: _scored(score[head], ids) for head in chosen.heads}
        if not chosen.every:
            for head in ("sparse", BM25_HEAD):  # which find what has a word in common with the query
                if head in lists:
                    lists[head] = [(id, value) for id, value in lists[head] if value]
        return lists

    def _found(self, chosen: SearchPlan, query: Embeddings | None, text: str, more: int) -> dict[str, list[Scored]]:
        """What each head finds."""
        search = self._retrievers(chosen, query, text, more)
        names = [head for head in (*chosen.heads, chosen.source) if head and head != "colbert"]
        lists = {name: search[name]() for name in names}
        if "colbert" in chosen.heads and self._finds_itself(names):
            lists["colbert"] = search["colbert"]()
        elif "colbert" in chosen.heads:
            found = list(dict.fromkeys(id for scored in lists.values() for id, _ in scored))
            lists["colbert"] = _scored(self._scorers(query, text)["colbert"], found)
        return {head: lists[head] for head in chosen.heads}

    @property
    def _finds_tokens(self) -> bool:
        """Whether the engine finds candidates for ColBERT, among any number of passages."""
        return bool(getattr(self._serving.backend, "finds_tokens", False))

    def _finds_itself(self, others: Sequence[str]) -> bool:
        """Whether ColBERT finds its passages itself: where the engine finds candidates, and in an index of its vectors
        alone, up to MOST_COMPARED passages.

        Raises:
            UsageError: there are more, and nothing else that is searched gives candidates.
        """
        if self._finds_tokens:
            return True
        if any(head in SOURCES for head in self._serving.heads):
            return False
        held = self._store.count()
        if held > MOST_COMPARED and not others:
            raise UsageError(
                f"the index holds {held:,} passages and late interaction (colbert) alone is compared with at most "
                f"{MOST_COMPARED:,}: let BM25 give the candidates (weights={{'colbert': 1, 'bm25': 1}}; "
                "--weights colbert=1,bm25=1), build a generation with the engine 'plaid', which finds them itself "
                "(backend='plaid', --backend plaid), or search a dense model's index and rerank with it"
            )
        return held <= MOST_COMPARED

    def _depth(self, asked: int) -> int:
        """How many hits to ask of each head: no more than the engine holds, which is more than the store while a
        delete is under way.
        """
        held = self._store.count()
        return asked if asked <= held else min(asked, max(1, held, self._serving.backend.count()))

    def _retrievers(
        self, chosen: SearchPlan, query: Embeddings | None, text: str, more: int
    ) -> dict[str, Callable[[], list[Scored]]]:
        backend, depth = self._serving.backend, self._depth(chosen.depth + more)
        search: dict[str, Callable[[], list[Scored]]] = {}
        if query is not None and query.dense is not None:
            search["dense"] = lambda: backend.search_dense(query.dense[0], depth, chosen.filter, chosen.exact)
        if query is not None and query.sparse is not None:
            ids, weights = query.sparse.ids[0], query.sparse.weights[0]
            search["sparse"] = lambda: backend.search_sparse(ids, weights, depth, chosen.filter)
        if query is not None and query.colbert is not None:
            tokens = query.colbert[0][query.mask[0].astype(bool)]
            search["colbert"] = lambda: _search_tokens(backend, tokens, depth, chosen.filter, chosen.exact)
        if (bm25 := self._bm25) is not None:
            search[BM25_HEAD] = lambda: bm25.search(text, depth, chosen.filter)
        return search

    def _scorers(self, query: Embeddings | None, text: str) -> Scorers:
        """What each head gives to passages that it did not find itself."""
        backend = self._serving.backend
        score: Scorers = {}
        if query is not None and query.dense is not None:
            score["dense"] = lambda ids: backend.score_dense(query.dense[0], ids)
        if query is not None and query.sparse is not None:
            sparse = query.sparse
            score["sparse"] = lambda ids: backend.score_sparse(sparse.ids[0], sparse.weights[0], ids)
        if query is not None and query.colbert is not None:
            tokens = query.colbert[0][query.mask[0].astype(bool)]
            score["colbert"] = lambda ids: backend.maxsim(tokens, ids)
        if (bm25 := self._bm25) is not None:
            score[BM25_HEAD] = lambda ids: bm25.score(text, ids)
        return score


def _lacking(head: str, embeddings: Embeddings) -> str:
    """Why a head cannot be searched with embeddings made elsewhere."""
    held = f"the embeddings hold {', '.join(embeddings.heads)}"
    return f"{held}; give the queries' texts for it" if head == BM25_HEAD else held


def _words(texts: Sequence[str] | None, queries: int) -> Sequence[str]:
    """The text of each query, for BM25."""
    if texts is None:
        return [""] * queries
    if isinstance(texts, str) or len(texts) != queries:
        raise UsageError(f"texts must list a text for each of the {queries} embeddings")
    _check_queries(texts)
    return texts


def _scored(score: Callable[[Sequence[str]], Any], ids: Sequence[str]) -> list[Scored]:
    """(id, score) of the passages that a head has something of."""
    values = score(ids) if ids else []
    return [(id, float(value)) for id, value in zip(ids, values, strict=True) if not np.isnan(value)]


def _above(
    lists: dict[str, list[Scored]], least: Mapping[str, float], score: Scorers
) -> tuple[dict[str, list[Scored]], dict[str, dict[str, float]]]:
    """The candidates that have as much as they must from each head, whichever of the lists they are in.

    Returns:
        the lists of those, and what they have from each head of `least`.
    """
    passing = {id for scored in lists.values() for id, _ in scored}
    known: dict[str, dict[str, float]] = {}
    for head, bound in least.items():
        known[head] = dict(lists[head])
        known[head] |= dict(_scored(score[head], sorted(passing - known[head].keys())))
        passing = {id for id in passing if known[head].get(id, -math.inf) >= bound}
    return {head: [(id, value) for id, value in scored if id in passing] for head, scored in lists.items()}, known


def _search_tokens(backend: Any, tokens: Any, depth: int, filter: Filter, exact: bool) -> list[Scored]:
    search = getattr(backend, "search_tokens", None)
    if search is None:
        raise UsageError(
            f"the vector engine {type(backend).__name__} has no 'search_tokens', so late interaction (colbert) needs "
            "candidates from another head: use the engine plaid, qdrant-edge or numpy, or "
            "weights={'colbert': 1, 'bm25': 1}"
        )
    found: list[Scored] = search(tokens, depth, filter, exact)
    return found
