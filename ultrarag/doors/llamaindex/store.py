"""Vector store: LlamaIndex's over a live index, which keeps texts, vectors and words, and answers all query modes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import fsspec
from llama_index.core.bridge.pydantic import ConfigDict, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from ultrarag.doors import Source, opened
from ultrarag.doors.llamaindex.adding import add
from ultrarag.doors.llamaindex.embedding import UltraRAGEmbedding
from ultrarag.doors.llamaindex.filters import translated
from ultrarag.doors.llamaindex.nodes import DOCUMENT, to_node
from ultrarag.doors.llamaindex.query import Asked
from ultrarag.encoder import Encoder
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.passages import OnExisting


class UltraRAGVectorStore(BasePydanticVectorStore):
    """The passages of a live index as nodes; it follows every swap, and what is written is durable at once.

    Args:
        source: a `LiveIndex`, or the folder of one.
        reranker: a cross-encoder, or its checkpoint, for the query mode "semantic_hybrid".

    Example:
        >>> store = UltraRAGVectorStore(live)
        >>> index = VectorStoreIndex.from_vector_store(store, embed_model=store.embed_model)
        >>> index.insert(Document(text="Milvus is a vector database."))
        >>> index.as_retriever(vector_store_query_mode="hybrid", alpha=0.7).retrieve("what is milvus?")
    """

    model_config = ConfigDict(extra="forbid")
    stores_text: bool = True
    is_embedding_query: bool = True
    #: of the index; it makes this again from `to_dict`
    path: str | None = None
    _live: LiveIndex = PrivateAttr()
    _reranker: Encoder | None = PrivateAttr(default=None)
    _bm25: bool = PrivateAttr(default=True)

    def __init__(
        self,
        source: Source | None = None,
        *,
        reranker: Encoder | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        source = options.pop("path", None) if source is None else source
        if source is None:
            raise UsageError("UltraRAGVectorStore is made over a live index: give a LiveIndex, or the folder of one")
        super().__init__(**options)
        self._live = opened(source)
        self.path, self._bm25 = str(self._live.path), self._live.status()["bm25"]
        self._reranker = reranker if isinstance(reranker, Encoder | None) else Encoder.load(reranker)

    @classmethod
    def class_name(cls) -> str:
        return "UltraRAGVectorStore"

    @property
    def client(self) -> LiveIndex:
        """The live index: its `refresh`, `rollback`, `status`, `feedback`."""
        return self._live

    @property
    def embed_model(self) -> UltraRAGEmbedding:
        """The embedding model that belongs to this store."""
        return UltraRAGEmbedding(self._live)

    def add(self, nodes: Sequence[BaseNode], *, on_existing: OnExisting = "replace", **add_kwargs: Any) -> list[str]:
        """Add nodes, or replace those of the same id; a vector of the index's own model is not made again.

        Args:
            on_existing: as for `LiveIndex.add`: "replace", "skip" or "fail".

        Raises:
            FingerprintError: a node's embedding is another model's; names the node.
        """
        if add_kwargs:
            raise UsageError(f"add has no argument '{next(iter(add_kwargs))}'; known: on_existing")
        add(self._live, nodes, on_existing)
        return [node.node_id for node in nodes]

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        return await self._live.arun(partial(self.add, nodes, **kwargs))

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete the nodes of a document."""
        self._live.delete(filter=_of(ref_doc_id))

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        await self._live.adelete(filter=_of(ref_doc_id))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete these nodes, those that pass the filters, or of these nodes those that pass them."""
        condition = translated(self._live, filters)
        if node_ids is None and condition is None:
            raise UsageError("delete_nodes takes node_ids, filters or both; clear deletes everything")
        if node_ids is None:
            self._live.delete(filter=condition)
        else:
            self._live.delete([passage.id for passage in self._live.passages(condition, ids=node_ids)])

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        await self._live.arun(self.delete_nodes, node_ids, filters)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """These nodes, those that pass the filters, or all; ids that do not exist are left out."""
        condition = translated(self._live, filters)
        return [to_node(passage) for passage in self._live.passages(condition, ids=node_ids)]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        return await self._live.arun(self.get_nodes, node_ids, filters)

    def clear(self) -> None:
        """Delete all nodes; the encoder and its generations stay."""
        self._live.clear()

    async def aclear(self) -> None:
        await self._live.arun(self.clear)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The best nodes of a query.

        Args:
            query: in the modes default (dense), sparse (the model's lexical weights, else BM25), text_search (BM25),
                hybrid (dense and words; alpha), semantic_hybrid (the same, reranked) and mmr.
            kwargs: mmr_threshold, mmr_prefetch_factor and mmr_prefetch_k; others are options of `LiveIndex.search`,
                such as fusion, candidates, min_scores and exact. A retriever's vector_store_kwargs come here.

        Raises:
            UsageError: for a mode that this index cannot serve; says why.
            FingerprintError: the query's vector is another model's.
        """
        hits = Asked(self._live, query, kwargs, self._reranker, self._bm25).answer()
        return VectorStoreQueryResult(
            nodes=[to_node(hit.passage) for hit in hits],
            similarities=[hit.score for hit in hits],
            ids=[hit.id for hit in hits],
        )

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return await self._live.arun(partial(self.query, query, **kwargs))

    def persist(self, persist_path: str, fs: fsspec.AbstractFileSystem | None = None) -> None:
        """Nothing is left to do: the index is on the disk, in its own folder (`path`)."""

    def __reduce__(self) -> Any:
        return self._live.__reduce__()  # which says that it stays in its process

    def close(self) -> None:
        """Close the index, or this handle of it."""
        self._live.close()


def _of(ref_doc_id: Any) -> dict[str, str]:
    """The filter for a document's nodes; compared with None it would be all passages that are no nodes."""
    if not isinstance(ref_doc_id, str) or not ref_doc_id:
        raise UsageError(f"ref_doc_id is {ref_doc_id!r}; it must be the id of a document, such as node.ref_doc_id")
    return {DOCUMENT: ref_doc_id}
