"""Queries: LlamaIndex's modes as searches of the index, by LlamaIndex's vector where it is the index's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode

from ultrarag.doors.llamaindex.adding import ADVICE, LEAST_COSINE, check_width, cosine, dense, former
from ultrarag.doors.llamaindex.filters import translated
from ultrarag.doors.llamaindex.made import made
from ultrarag.encoder import Encoder
from ultrarag.errors import FingerprintError, UsageError
from ultrarag.retrieve import Hits, LiveIndex, rerank
from ultrarag.types import Embeddings

Mode = VectorStoreQueryMode
#: Nodes that mmr chooses from, for each that is asked for; as many are reranked by semantic_hybrid.
PREFETCH = 4
#: Tries at a search whose encoder is exchanged between its steps.
TRIES = 3


@dataclass(frozen=True)
class Asked:
    """One query of LlamaIndex's, over an index."""

    live: LiveIndex
    query: VectorStoreQuery
    #: arguments of the vector store's `query`: of LlamaIndex (mmr_threshold, mmr_prefetch_factor), and of `search`
    more: Mapping[str, Any]
    reranker: Encoder | None
    #: whether the index has words
    bm25: bool

    def answer(self) -> Hits:
        """The hits of the mode.

        Raises:
            UsageError: this index cannot serve the mode, or the query lacks what it needs; says what would do.
            FingerprintError: the query's vector is another model's.
        """
        if self.query.output_fields or self.query.embedding_field:
            raise UsageError("output_fields and embedding_field are not served: nodes come whole, with one vector each")
        modes = {
            Mode.DEFAULT: lambda: self.by_vector({"dense": 1.0}, self.k),
            Mode.SPARSE: lambda: self.by_text({self.lexical(): 1.0}, self.k),
            Mode.TEXT_SEARCH: lambda: self.by_text({"bm25": 1.0}, self.k),
            Mode.HYBRID: lambda: self.hybrid(self.query.hybrid_top_k or self.k),
            Mode.SEMANTIC_HYBRID: self.semantic_hybrid,
            Mode.MMR: self.mmr,
        }
        if self.query.mode not in modes:
            raise UsageError(
                f"the query mode '{self.query.mode.value}' is not served: it fits a classifier to all vectors for each "
                f"query; served are {', '.join(mode.value for mode in modes)}"
            )
        return modes[self.query.mode]()

    @property
    def k(self) -> int:
        return self.query.similarity_top_k

    @property
    def text(self) -> str:
        if self.query.query_str is None:
            raise UsageError(f"the query mode '{self.query.mode.value}' searches words: give query_str")
        return self.query.query_str

    def lexical(self) -> str:
        """The head that compares words: the model's own lexical weights where they are stored, else BM25."""
        with self.live.encoding() as lent:
            return "sparse" if "sparse" in lent.heads else "bm25"

    def options(self, k: int) -> dict[str, Any]:
        """What holds for every mode; the rest of `more` is for `search`, which names what it does not know."""
        ours = ("mmr_threshold", "mmr_prefetch_factor", "mmr_prefetch_k")
        given = {name: value for name, value in self.more.items() if name not in ours}
        found = {"k": k, "filter": translated(self.live, self.query.filters, self.query.doc_ids)}
        if self.query.node_ids:  # LlamaIndex's retriever gives an empty list where it means no condition
            found["ids"] = self.query.node_ids
        return {**found, **given}

    def by_text(self, weights: dict[str, float], k: int, **asked: Any) -> Hits:
        return self.live.search(self.text, **{"weights": weights, **asked, **self.options(k)})

    def by_vector(self, weights: dict[str, float], k: int, **asked: Any) -> Hits:
        """By the query's vector, where it has one, and by its text."""
        vector, options = self.query.query_embedding, {"weights": weights, **asked, **self.options(k)}
        for _ in range(TRIES):
            if vector is None:
                return self.live.search(self.text, **options)
            vectors, fingerprint = self.own(vector)
            try:
                given = {"texts": [self.query.query_str], **options} if self.query.query_str is not None else options
                return self.live.search_embeddings(vectors, fingerprint, **given)[0]
            except FingerprintError:  # a swap came in between
                continue
        raise FingerprintError("the index's encoder was exchanged again and again as this query was asked; ask again")

    def own(self, vector: list[float]) -> tuple[Embeddings, str]:
        """The vector as the live encoder's, made anew where it is a former one's; and that encoder's fingerprint."""
        origin = made.of(vector, "query")
        with self.live.encoding() as lent:
            if origin is None:
                self.check(vector, lent)
            elif origin.fingerprint != lent.fingerprint:
                if origin.fingerprint not in former(self.live) or not origin.texts:
                    raise FingerprintError(
                        f"the query's vector was made by the encoder {origin.fingerprint[:12]}, and the index has "
                        f"{lent.fingerprint[:12]}: {ADVICE}or only query_str"
                    )
                vector = np.mean(dense(lent, list(origin.texts), "query"), axis=0).tolist()
            return Embeddings(dense=np.asarray([vector], dtype=np.float32)), lent.fingerprint

    def check(self, vector: list[float], lent: Any) -> None:
        """Refuse a vector of unknown origin that is not what the encoder makes of the query's text."""
        if self.query.query_str is None:
            raise FingerprintError(
                f"nothing tells which model made the query's vector: {ADVICE}or give query_str beside it"
            )
        (wanted,) = dense(lent, [self.query.query_str], "query")
        check_width(vector, len(wanted), "the query's vector")
        if cosine(vector, wanted) < LEAST_COSINE:
            raise FingerprintError(
                f"the query's vector is not what the index's model makes of {self.query.query_str!r}: {ADVICE}or only "
                f"query_str"
            )

    def hybrid(self, k: int) -> Hits:
        """Dense vectors and words; alpha weighs the former, 1 - alpha the latter."""
        alpha = 0.5 if self.query.alpha is None else _share(self.query.alpha)
        asked = {"candidates": max(self.query.sparse_top_k, self.k, k)} if self.query.sparse_top_k else {}
        _ = self.text
        if self.bm25:
            return self.by_vector({"dense": alpha, "bm25": 1 - alpha}, k, **asked)
        # lexical weights are encoded, and the dense vector with them
        return self.by_text({"dense": alpha, self.lexical(): 1 - alpha}, k, **asked)

    def semantic_hybrid(self) -> Hits:
        """The best of a hybrid search, in the order of the reranker."""
        if self.reranker is None:
            raise UsageError(
                "the query mode 'semantic_hybrid' orders the hits of a hybrid search by a reranker, and this store has "
                "none: give UltraRAGVectorStore a reranker, or ask for 'hybrid'"
            )
        wanted = self.query.hybrid_top_k or self.k
        found = self.hybrid(PREFETCH * wanted)
        return found.with_hits(rerank(self.reranker, self.text, found)[:wanted])

    def mmr(self) -> Hits:
        """Near the query, and far from each other: out of more hits, in the order in which they are chosen."""
        threshold = self.more.get("mmr_threshold", self.query.mmr_threshold)
        wanted = self.more.get("mmr_prefetch_k") or int(self.k * self.more.get("mmr_prefetch_factor", PREFETCH))
        weight = 0.5 if threshold is None else threshold
        return self.by_vector({"dense": 1.0}, self.k, mmr=weight, candidates=max(wanted, self.k))


def _share(alpha: float) -> float:
    """The weight of the vectors, checked."""
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise UsageError(f"alpha is {alpha!r}; it must be from 0 (words alone) to 1 (vectors alone)")
    return float(alpha)
