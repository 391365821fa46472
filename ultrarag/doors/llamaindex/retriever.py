"""Retriever: a live index searched as it offers, whose nodes say which generation answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from ultrarag.doors import Source, default_heads, opened
from ultrarag.doors.llamaindex.filters import translated
from ultrarag.doors.llamaindex.nodes import note, to_node
from ultrarag.retrieve import Hits


class FoundNode(NodeWithScore):
    """A node with its score, and what the search knows beside it."""

    #: of the heads, before they are fused
    scores: dict[str, float] = Field(default_factory=dict)
    generation: int = 0
    fingerprint: str = ""
    #: of the search, for `LiveIndex.feedback`
    query_id: str = ""

    @classmethod
    def class_name(cls) -> str:
        return "FoundNode"


class UltraRAGRetriever(BaseRetriever):
    """The k best nodes of a live index, by any of its heads; every query is answered by the generation live then.

    Args:
        source: a `LiveIndex`, or the folder of one.
        filters: LlamaIndex's, or the index's own (`ultrarag.retrieve.search.filters`).
        generation_key: under it each node's metadata names the generation that answered, which no language model and
            no embedding is shown. None leaves the metadata as it is: LlamaIndex tells nodes apart by their metadata,
            so that a fusion with retrievers of other kinds would take a node of both for two.
        search: options of `LiveIndex.search`, such as weights={"dense": 1, "bm25": 0.5}, fusion="rrf",
            min_scores={"dense": 0.3}, log=True. Default: the dense head alone.

    Example:
        >>> retriever = UltraRAGRetriever(live, similarity_top_k=5, weights={"dense": 1, "bm25": 0.5})
        >>> retriever.retrieve("what is milvus?")[0].metadata["generation"]
        1
    """

    def __init__(
        self,
        source: Source,
        similarity_top_k: int = DEFAULT_SIMILARITY_TOP_K,
        *,
        filters: MetadataFilters | Mapping[str, Any] | None = None,
        generation_key: str | None = "generation",
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        verbose: bool = False,
        **search: Any,
    ) -> None:
        self._live = opened(source)
        self.similarity_top_k = similarity_top_k
        self.filters, self._key = filters, generation_key
        if "heads" not in search and "weights" not in search:
            search["heads"] = default_heads(self._live)
        self._search = search
        super().__init__(callback_manager=callback_manager, object_map=object_map, verbose=verbose)

    def _options(self) -> dict[str, Any]:
        return {"k": self.similarity_top_k, "filter": translated(self._live, self.filters), **self._search}

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._nodes(self._live.search(query_bundle.query_str, **self._options()))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        options = await self._live.arun(self._options)
        return self._nodes(await self._live.asearch(query_bundle.query_str, **options))

    def _nodes(self, hits: Hits) -> list[NodeWithScore]:
        asked = {"generation": hits.generation, "fingerprint": hits.fingerprint, "query_id": hits.query_id}
        found = [
            FoundNode(node=to_node(hit.passage), score=hit.score, scores=dict(hit.scores), **asked) for hit in hits
        ]
        if self._key is not None:
            for item in found:
                note(item.node, self._key, item.generation)
        return list(found)

    def close(self) -> None:
        """Close the index, or this handle of it."""
        self._live.close()
