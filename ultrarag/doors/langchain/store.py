"""A vector store over a live index."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings as LangChainEmbeddings
from langchain_core.vectorstores import VectorStore

from ultrarag.doors import opened
from ultrarag.doors.langchain.documents import document, passages
from ultrarag.doors.langchain.embeddings import UltraRAGEmbeddings
from ultrarag.doors.langchain.filters import translated
from ultrarag.doors.langchain.index import DENSE, search_options
from ultrarag.errors import UsageError
from ultrarag.retrieve import Hits, LiveIndex
from ultrarag.retrieve.passages import records
from ultrarag.types import Embeddings, head_weights

Scored = list[tuple[Document, float]]


class UltraRAGVectorStore(VectorStore):
    """Documents in a live index: found by their dense vectors, or by the heads that `weights` name.

    A search takes the options of `LiveIndex.search` beside LangChain's own: `filter`, `weights`, `min_scores`, ...
    Scores are similarities: greater is better.

    Example:
        >>> store = UltraRAGVectorStore("kb")
        >>> store.add_texts(["Milvus is a vector database."], [{"lang": "en"}], ids=["milvus"])
        ['milvus']
        >>> [found.id for found in store.similarity_search("what is milvus?", filter={"lang": "en"})]
        ['milvus']
    """

    def __init__(
        self,
        index: LiveIndex | str | os.PathLike[str],
        *,
        weights: Mapping[str, float] | None = None,
        search_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Use an index that is there; `from_texts` makes one.

        Args:
            index: a LiveIndex, or the path of one, which is opened to be shared; `store.index.close()` closes it.
            weights: of each head, such as {"dense": 1, "bm25": 0.5}; default: the dense head alone.
            search_kwargs: other options of every search, where it says nothing else.
        """
        self.index = opened(index)
        if "k" in (search_kwargs or {}):
            raise UsageError(
                "search_kwargs has 'k', which each search says itself: store.as_retriever(search_kwargs=...)"
            )
        self.search_kwargs = {**(search_kwargs or {})}
        if weights is not None:
            self.search_kwargs["weights"] = weights

    def __repr__(self) -> str:
        return f"UltraRAGVectorStore({self.index!r})"

    @property
    def embeddings(self) -> UltraRAGEmbeddings | None:
        """The encoder of the index, whatever is swapped; its vectors can be searched with. None without dense ones."""
        with self.index.encoding() as lent:
            return UltraRAGEmbeddings(self.index) if DENSE in lent.heads else None

    # Making and changing

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: LangChainEmbeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        path: str | os.PathLike[str] | None = None,
        weights: Mapping[str, float] | None = None,
        search_kwargs: Mapping[str, Any] | None = None,
        **create: Any,
    ) -> UltraRAGVectorStore:
        """Make an index around an encoder, or open the one that is there, and add the texts.

        Args:
            embedding: UltraRAGEmbeddings, whose encoder the index copies; of one that is there, it must be the live
                one's. Other classes are refused: their model could neither be fine-tuned nor swapped.
            path: the folder of the index; needed.
            create: arguments of `LiveIndex.create`, such as `backend` and `heads`, for a new one.

        Raises:
            FingerprintError: the index that is there has another encoder.
        """
        if not isinstance(embedding, UltraRAGEmbeddings):
            raise UsageError(
                f"embedding is {type(embedding).__name__}: an index keeps the model itself, to fine-tune it and to "
                f"swap it; give UltraRAGEmbeddings(model), of a checkpoint folder or a hub name (one of "
                f"sentence-transformers, say)"
            )
        if path is None:
            raise UsageError("from_texts and from_documents need path, the folder of the index, such as path='kb'")
        added = passages(texts, metadatas, ids)
        list(records(added))  # what is wrong with them is said before anything is made
        store = cls(_made(Path(path), embedding, create), weights=weights, search_kwargs=search_kwargs)
        store.index.add(added)
        return store

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        batch_size: int | None = None,
        **add: Any,
    ) -> list[str]:
        """Add texts, or replace those of the same ids; returned when they are durable and can be found.

        Args:
            metadatas: dates, UUIDs, numpy numbers and the like are kept as JSON (`ultrarag.retrieve.jsonable`).
            ids: default, also for a None among them: a new UUID each.
            batch_size: what LangChain's indexing API says; the index has its own.
            add: `on_existing` of `LiveIndex.add`.
        """
        added = passages(texts, metadatas, ids)
        self.index.add(added, **add)
        return [passage.id for passage in added]

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        batch_size: int | None = None,
        **add: Any,
    ) -> list[str]:
        """`add_texts`, for async programs."""
        added = passages(texts, metadatas, ids)
        await self.index.aadd(added, **add)
        return [passage.id for passage in added]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete by ids, or by `filter`; as LangChain has it, without either all documents. Unknown ids are ignored."""
        if ids is None and not kwargs:
            self.index.clear()
        else:
            self.index.delete(ids, **_filtered(kwargs))
        return True

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """`delete`, for async programs."""
        if ids is None and not kwargs:
            await self.index.arun(self.index.clear)
        else:
            await self.index.adelete(ids, **_filtered(kwargs))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of these ids, in their order; unknown ones are left out."""
        return [document(passage) for passage in self.index.get_many(ids).values()]

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """`get_by_ids`, for async programs."""
        return await self.index.arun(self.get_by_ids, ids)

    # Searching

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The k best documents, best first."""
        return _documents(self.index.search(query, k, **self._options(kwargs)))

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """`similarity_search`, for async programs."""
        return _documents(await self.index.asearch(query, k, **self._options(kwargs)))

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> Scored:
        """The k best documents with their scores: cosines, inner products or fused ones, as the heads give them."""
        return _scored(self.index.search(query, k, **self._options(kwargs)))

    async def asimilarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> Scored:
        """`similarity_search_with_score`, for async programs."""
        return _scored(await self.index.asearch(query, k, **self._options(kwargs)))

    def similarity_search_with_relevance_scores(self, query: str, k: int = 4, **kwargs: Any) -> Scored:
        """The k best documents whose cosine with the query is `score_threshold` or more, each with it.

        Their order is that of the search, so a hybrid one ranks by its weights. A negative cosine counts as 0.

        Raises:
            UsageError: the dense head is not searched, or its vectors are not of length 1: there are no cosines then.
        """
        return _relevant(self.index.search(query, k, **self._relevance(kwargs)))

    async def asimilarity_search_with_relevance_scores(self, query: str, k: int = 4, **kwargs: Any) -> Scored:
        """`similarity_search_with_relevance_scores`, for async programs."""
        return _relevant(await self.index.asearch(query, k, **self._relevance(kwargs)))

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The k best documents by the dense vector of a query, which the encoder of the index must have made.

        Args:
            embedding: of `embeddings`, which says who made it; a plain list needs `fingerprint`, such as
                `store.index.fingerprint`.

        Raises:
            FingerprintError: another encoder made it.
        """
        return _documents(self.index.search_embeddings(**self._by_vector(embedding, kwargs), k=k)[0])

    async def asimilarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """`similarity_search_by_vector`, for async programs."""
        return await self.index.arun(self.similarity_search_by_vector, embedding, k, **kwargs)

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Out of the `fetch_k` best, k that are unlike each other (1: the best, 0: the least alike)."""
        return self.similarity_search(query, k, candidates=fetch_k, mmr=lambda_mult, **kwargs)

    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """`max_marginal_relevance_search`, for async programs."""
        return await self.asimilarity_search(query, k, candidates=fetch_k, mmr=lambda_mult, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """`max_marginal_relevance_search` with a vector, as of `similarity_search_by_vector`."""
        return self.similarity_search_by_vector(embedding, k, candidates=fetch_k, mmr=lambda_mult, **kwargs)

    async def amax_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """`max_marginal_relevance_search_by_vector`, for async programs."""
        return await self.asimilarity_search_by_vector(embedding, k, candidates=fetch_k, mmr=lambda_mult, **kwargs)

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        return search_options(self.index, self.search_kwargs, asked)

    def _relevance(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Options of a search whose hits all have a cosine of the threshold or more."""
        options = self._options({name: value for name, value in asked.items() if name != "score_threshold"})
        weights = head_weights(options.get("weights", {}))
        searched = options.get("heads") or [head for head, weight in weights.items() if weight]
        if DENSE not in searched or not self.index.encoder.settings.normalize:
            raise UsageError(
                "relevance scores are cosines, so the dense head must be searched, with vectors of length 1; "
                "similarity_search_with_score and min_scores have the scores of others"
            )
        bounds = dict(options.get("min_scores") or {})
        return {**options, "min_scores": {**bounds, DENSE: max(_least(asked), bounds.get(DENSE, -math.inf))}}

    def _by_vector(self, embedding: list[float], asked: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `search_embeddings`: a vector is searched by its own head."""
        made_by = asked.get("fingerprint") or getattr(embedding, "fingerprint", None)
        if made_by is None:
            raise UsageError(
                "the vector does not say which encoder made it: take it from store.embeddings.embed_query, or give "
                "fingerprint, which is store.index.fingerprint where the live encoder did"
            )
        options = self._options({"heads": [DENSE], **asked, "fingerprint": None})
        return {**options, "embeddings": Embeddings(dense=np.asarray([embedding], np.float32)), "fingerprint": made_by}


def _made(path: Path, embedding: UltraRAGEmbeddings, create: dict[str, Any]) -> LiveIndex:
    """The index at a path, made where nothing is there; others in this process may share it."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        LiveIndex.create(path, embedding.encoder, **create).close()
    elif create:
        raise UsageError(f"'{path}' is there already, and {', '.join(create)} can be said of a new index alone")
    return LiveIndex.open(path, embedding.encoder, share=True)


def _filtered(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: translated(value) if name == "filter" else value for name, value in asked.items()}


def _least(asked: Mapping[str, Any]) -> float:
    """The cosine that a hit must have: of a threshold of 0, any."""
    threshold = asked.get("score_threshold") or 0
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise UsageError(f"score_threshold is {threshold!r}; it is a number from 0 to 1")
    return threshold or -sys.float_info.max


def _documents(hits: Hits) -> list[Document]:
    return [document(hit.passage) for hit in hits]


def _scored(hits: Hits) -> Scored:
    return [(document(hit.passage), hit.score) for hit in hits]


def _relevant(hits: Hits) -> Scored:
    return [(document(hit.passage), min(max(hit.scores[DENSE], 0.0), 1.0)) for hit in hits]
