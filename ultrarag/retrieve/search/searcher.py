"""One search on one generation: which heads, how deep, fused how, and the passages that they found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ultrarag.errors import FingerprintError, UsageError, did_you_mean
from ultrarag.retrieve.bm25 import BM25
from ultrarag.retrieve.generation import Serving
from ultrarag.retrieve.passages import Store
from ultrarag.retrieve.ranking import check_k
from ultrarag.retrieve.search.encoding import Encoding
from ultrarag.retrieve.search.filters import Filter, parse
from ultrarag.retrieve.search.fusion import Fused, Method, check_weights, fuse
from ultrarag.retrieve.search.hits import Hits
from ultrarag.types import Embeddings, Hit, head_weights, is_blank

Fusion = Literal["weighted", "rrf"]
Normalize = Literal["minmax", "raw"]
Scored = tuple[str, float]
#: The retriever that needs no encoder.
BM25_HEAD = "bm25"
#: Where candidates come from for ColBERT alone, the first that the index has; without either it compares with all.
_SOURCES = ("dense", "sparse")
#: Passages up to which a query's tokens are compared with those of all.
MOST_COMPARED = 100_000


@dataclass(frozen=True)
class SearchOptions:
    """How to search; see `LiveIndex.search` for what each means."""

    k: int = 10
    weights: Mapping[str, float] | None = None
    filter: Filter = None
    fusion: Fusion = "weighted"
    normalize: Normalize = "minmax"
    heads: Sequence[str] | None = None
    candidates: int | None = None
    exact: bool = False

    @staticmethod
    def of(values: Mapping[str, Any]) -> SearchOptions:
        """Check the names of keyword arguments."""
        known = SearchOptions.__dataclass_fields__
        for name in values:
            if name not in known:
                raise UsageError(
                    f"search has no argument '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}"
                )
        return SearchOptions(**values)


@dataclass(frozen=True)
class SearchPlan:
    """Search options, checked against what an index has."""

    k: int
    #: what counts in the score
    heads: tuple[str, ...]
    weights: dict[str, float]
    method: Method
    #: hits asked of each head
    depth: int
    #: gives ColBERT its candidates when nothing else that counts does
    source: str | None
    filter: Filter
    exact: bool

    @property
    def encoded(self) -> tuple[str, ...]:
        """The heads for which the query must be encoded."""
        wanted = (*self.heads, self.source)
        return tuple(head for head in wanted if head and head != BM25_HEAD)


def plan(options: SearchOptions, stored: Sequence[str], bm25: bool) -> SearchPlan:
    """Check options against the heads that are stored; UsageError says what cannot be, and what can."""
    known = (*stored, BM25_HEAD) if bm25 else tuple(stored)
    heads = _heads(options, tuple(stored), known)
    method: Method = "raw" if len(heads) == 1 else _method(options)
    weights = check_weights(heads, _chosen(options.weights, heads), method != "rrf")
    if len(heads) == 1:
        weights = dict.fromkeys(heads, 1.0)  # its own scores, whatever it weighs
    heads = tuple(head for head in heads if weights[head] > 0)
    k = check_k(options.k)
    depth = check_k(options.candidates) if options.candidates is not None else max(4 * k, 100)
    source = next((name for name in _SOURCES if name in known), None) if heads == ("colbert",) else None
    single = len(heads) == 1 and source is None
    kept = {head: weights[head] for head in heads}
    return SearchPlan(
        k, heads, kept, method, k if single else max(k, depth), source, parse(options.filter), options.exact
    )


def _heads(options: SearchOptions, stored: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The heads named, else those that have a weight, else all that the encoder has."""
    named = [options.heads] if isinstance(options.heads, str) else options.heads
    if named is None and options.weights is None:
        named = stored
    elif named is None:
        named = [head for head, weight in head_weights(options.weights).items() if weight != 0]
        if not named:
            raise UsageError("weights: all are 0; at least one head must count")
    for head in named:
        if head not in known:
            raise UsageError(f"the index has no head '{head}'{did_you_mean(head, known)}; it has {', '.join(known)}")
    if not named:
        raise UsageError(f"heads names none; the index has {', '.join(known)}")
    return tuple(dict.fromkeys(named))


def _chosen(weights: Mapping[str, float] | None, heads: tuple[str, ...]) -> Mapping[str, float] | None:
    """Leave out the weights of 0 for heads that are not searched."""
    if weights is None:
        return None
    return {head: weight for head, weight in head_weights(weights).items() if head in heads or weight != 0}


def _method(options: SearchOptions) -> Method:
    if options.fusion not in get_args(Fusion):
        raise UsageError(f"fusion is '{options.fusion}'; it must be one of {', '.join(get_args(Fusion))}")
    if options.normalize not in get_args(Normalize):
        raise UsageError(f"normalize is '{options.normalize}'; it must be one of {', '.join(get_args(Normalize))}")
    return "rrf" if options.fusion == "rrf" else options.normalize


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
        chosen = self._plan(options)
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

    def search_embeddings(self, embeddings: Embeddings, fingerprint: str, **options: Any) -> list[Hits]:
        """The hits of queries that were encoded elsewhere, by the encoder with this fingerprint."""
        if fingerprint != self._serving.fingerprint:
            raise FingerprintError(
                f"the query vectors come from the encoder {fingerprint[:12] or '(unnamed)'}, the live generation "
                f"{self._serving.generation.id} from {self._serving.fingerprint[:12]}: encode the queries with the "
                f"live encoder"
            )
        if options.get("heads") is None and options.get("weights") is None:
            options["heads"] = embeddings.heads
        chosen = self._plan(options)
        for head in (*chosen.encoded, *([BM25_HEAD] if BM25_HEAD in (*chosen.heads, chosen.source) else [])):
            if head not in embeddings.heads:
                raise UsageError(
                    f"head '{head}' is to be searched, but the embeddings hold {', '.join(embeddings.heads)}"
                )
        if not self._store.count():
            return [self._hits() for _ in range(len(embeddings))]
        arrays = embeddings.numpy()
        return [self._search(chosen, arrays[row : row + 1], "") for row in range(len(arrays))]

    def _hits(self, hits: Iterable[Hit] = ()) -> Hits:
        return Hits(hits, generation=self._serving.generation.id, fingerprint=self._serving.fingerprint)

    def _plan(self, options: dict[str, Any]) -> SearchPlan:
        return plan(SearchOptions.of(options), self._serving.heads, self._bm25 is not None)

    def _search(self, chosen: SearchPlan, query: Embeddings | None, text: str) -> Hits:
        """The k best; engines may still hold passages that a write beside this search deletes, so it looks deeper."""
        more = 0
        while True:
            fused = self._fused(chosen, query, text, more)
            passages = self._store.get([found.id for found in fused])
            gone = len(fused) - len(passages)
            if not gone or len(fused) < chosen.k + more:
                hits = [Hit(f.id, f.score, passages[f.id], f.scores) for f in fused if f.id in passages]
                return self._hits(hits[: chosen.k])
            more = 2 * more + gone

    def _fused(self, chosen: SearchPlan, query: Embeddings | None, text: str, more: int) -> Sequence[Fused]:
        """The k and some more best of all heads."""
        score, search = self._scorers(query, text), self._retrievers(chosen, query, text, more)
        names = [head for head in (*chosen.heads, chosen.source) if head and head != "colbert"]
        lists = {name: search[name]() for name in names}
        if "colbert" in chosen.heads and self._compares_all(names):
            lists["colbert"] = search["colbert"]()
        elif "colbert" in chosen.heads:
            found = list(dict.fromkeys(id for scored in lists.values() for id, _ in scored))
            values = score["colbert"](found) if found else []
            lists["colbert"] = [(id, float(v)) for id, v in zip(found, values, strict=True) if not np.isnan(v)]
        counted = {head: lists[head] for head in chosen.heads}
        return fuse(counted, chosen.k + more, chosen.weights, chosen.method, lambda h, ids: score[h](ids))

    def _compares_all(self, others: Sequence[str]) -> bool:
        """Whether ColBERT finds its passages itself: in an index of its vectors alone, up to MOST_COMPARED passages.

        Raises:
            UsageError: there are more, and nothing else that is searched gives candidates.
        """
        if any(head in _SOURCES for head in self._serving.heads):
            return False
        held = self._store.count()
        if held > MOST_COMPARED and not others:
            raise UsageError(
                f"the index holds {held:,} passages and late interaction (colbert) alone is compared with at most "
                f"{MOST_COMPARED:,}: let BM25 give the candidates (weights={{'colbert': 1, 'bm25': 1}}; "
                "--weights colbert=1,bm25=1), or search a dense model's index and rerank with it"
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
            search["colbert"] = lambda: _search_tokens(backend, tokens, depth, chosen.filter)
        if (bm25 := self._bm25) is not None:
            search[BM25_HEAD] = lambda: bm25.search(text, depth, chosen.filter)
        return search

    def _scorers(self, query: Embeddings | None, text: str) -> dict[str, Callable[[Sequence[str]], Any]]:
        """What each head gives to passages that it did not find itself."""
        backend = self._serving.backend
        score: dict[str, Callable[[Sequence[str]], Any]] = {}
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


def _search_tokens(backend: Any, tokens: Any, depth: int, filter: Filter) -> list[Scored]:
    search = getattr(backend, "search_tokens", None)
    if search is None:
        raise UsageError(
            f"the vector engine {type(backend).__name__} has no 'search_tokens', so late interaction (colbert) needs "
            "candidates from another head: use the engine qdrant-edge or numpy, or weights={'colbert': 1, 'bm25': 1}"
        )
    found: list[Scored] = search(tokens, depth, filter)
    return found
