"""Retriever and reranker"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode

from ultrarag.doors.llamaindex import UltraRAGRerank, UltraRAGRetriever, UltraRAGVectorStore
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex


def test_hits_are_those_of_the_index(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    options: dict[str, Any] = {"weights": {"dense": 1, "bm25": 0.5}, "fusion": "rrf"}
    retriever = UltraRAGRetriever(live, 3, filters={"lang": "en"}, **options)
    assert isinstance(retriever, BaseRetriever)
    found, hits = retriever.retrieve("opera"), live.search("opera", 3, filter={"lang": "en"}, **options)
    assert [(item.node_id, item.score, item.scores) for item in found] == [(h.id, h.score, h.scores) for h in hits]
    assert asyncio.run(retriever.aretrieve("opera"))[0].score == found[0].score
    assert [item.score for item in UltraRAGRetriever(live, 2).retrieve("opera")] == [
        hit.score for hit in live.search("opera", 2, heads=["dense"])
    ]
    with pytest.raises(UsageError, match="no argument 'weigths'"):
        UltraRAGRetriever(live, weigths={"dense": 1}).retrieve("opera")


def test_nodes_say_who_answered_to_programs_alone(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    found = UltraRAGRetriever(live, 1).retrieve("opera")[0]
    assert (found.metadata["generation"], found.generation, found.fingerprint) == (1, 1, live.fingerprint)
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert "generation" not in found.node.get_content(metadata_mode=mode)
    plain = UltraRAGRetriever(live, 1, generation_key=None).retrieve("opera")[0]
    assert plain.node == store.get_nodes([plain.node_id])[0]


def test_a_search_can_be_judged_afterwards(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    found = UltraRAGRetriever(live, 2, log=True).retrieve("opera")
    live.feedback(found[0].query_id, found[0].node_id, "relevant")
    assert found[0].query_id == found[1].query_id


def test_a_reranker_orders_nodes(store: UltraRAGVectorStore, live: LiveIndex, cross_encoder: Any) -> None:
    reranker = UltraRAGRerank(cross_encoder, top_n=3, keep_retrieval_score=True)
    assert isinstance(reranker, BaseNodePostprocessor)
    found = UltraRAGRetriever(live, 4).retrieve("opera")
    former = {item.node_id: item.score for item in found}
    texts = {item.node_id: item.node.get_content(metadata_mode=MetadataMode.EMBED) for item in found}
    scores = cross_encoder.score([("opera", text) for text in texts.values()])
    ordered = reranker.postprocess_nodes(found, query_str="opera")
    assert [item.score for item in ordered] == pytest.approx(sorted(scores, reverse=True)[:3])
    assert all(item.metadata["retrieval_score"] == former[item.node_id] for item in ordered)
    again = asyncio.run(reranker.apostprocess_nodes(found, QueryBundle("opera")))
    assert [item.node_id for item in again] == [item.node_id for item in ordered]


def test_a_reranker_weighs_and_refuses(cross_encoder: Any) -> None:
    nodes = [
        NodeWithScore(node=TextNode(text=text), score=score) for text, score in (("a", 9.0), ("b", 1.0), ("c", 0.0))
    ]
    weighed = UltraRAGRerank(cross_encoder, weight=0.0).postprocess_nodes(nodes, query_str="q")
    assert [item.text for item in weighed] == ["a", "b"]
    assert UltraRAGRerank(cross_encoder).postprocess_nodes([], query_str="q") == []
    with pytest.raises(UsageError, match="give query_str"):
        UltraRAGRerank(cross_encoder).postprocess_nodes(nodes)
    with pytest.raises(ValueError, match="top_k"):
        UltraRAGRerank(cross_encoder, top_k=3)


def test_a_rerankers_checkpoint_may_be_given(cross_encoder: Any, tmp_path: Any) -> None:
    folder = cross_encoder.save(tmp_path / "reranker")
    assert UltraRAGRerank(folder).model == str(folder)
