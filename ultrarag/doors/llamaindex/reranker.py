"""Reranker: a cross-encoder as a postprocessor of nodes."""

from __future__ import annotations

import os
from typing import Any

from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from ultrarag.doors.llamaindex.nodes import note
from ultrarag.encoder import Encoder
from ultrarag.errors import UsageError
from ultrarag.retrieve import rerank
from ultrarag.types import Hit, Passage

dispatcher = get_dispatcher(__name__)


class UltraRAGRerank(BaseNodePostprocessor):
    """The nodes in the order of a reranker, whose score becomes theirs.

    Args:
        model: a cross-encoder, or its checkpoint.
        weight: of its scores beside the nodes' own, as for `ultrarag.retrieve.rerank`; default: its scores alone.
        keep_retrieval_score: keep the former score in the metadata, under "retrieval_score".
        score: options of `Encoder.score`, such as normalize=True.

    Example:
        >>> engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[UltraRAGRerank(model, top_n=5)])
    """

    model_config = ConfigDict(extra="forbid")
    model: str = Field(description="The checkpoint of the reranker.")
    top_n: int = Field(default=2, description="How many nodes are returned.", gt=0)
    weight: float | None = Field(default=None, description="Of the reranker's scores beside the nodes' own.")
    keep_retrieval_score: bool = Field(default=False, description="Whether the former score is kept in the metadata.")
    score: dict[str, Any] = Field(default_factory=dict, description="Options of Encoder.score.")
    _encoder: Encoder = PrivateAttr()

    def __init__(self, model: Encoder | str | os.PathLike[str], top_n: int = 2, **options: Any) -> None:
        encoder = model if isinstance(model, Encoder) else Encoder.load(model)
        name = encoder.fingerprint[:12] if isinstance(model, Encoder) else str(model)
        super().__init__(model=name, top_n=top_n, **options)
        self._encoder = encoder

    @classmethod
    def class_name(cls) -> str:
        return "UltraRAGRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise UsageError("a reranker compares the nodes with a query: give query_str or query_bundle")
        if not nodes:
            return []
        dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=self.top_n, model_name=self.model))
        payload = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query_bundle.query_str,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            ordered = self._ordered(nodes, query_bundle.query_str)[: self.top_n]
            event.on_end(payload={EventPayload.NODES: ordered})
        dispatcher.event(ReRankEndEvent(nodes=ordered))
        return ordered

    def _ordered(self, nodes: list[NodeWithScore], query: str) -> list[NodeWithScore]:
        hits = [
            Hit(str(row), node.score or 0.0, Passage(str(row), node.node.get_content(metadata_mode=MetadataMode.EMBED)))
            for row, node in enumerate(nodes)
        ]
        ranked = rerank(self._encoder, query, hits, weight=self.weight, **self.score)
        return [self._scored(nodes[int(hit.id)], hit.score) for hit in ranked]

    def _scored(self, node: NodeWithScore, score: float) -> NodeWithScore:
        if self.keep_retrieval_score:
            note(node.node, "retrieval_score", node.score)
        node.score = score
        return node
