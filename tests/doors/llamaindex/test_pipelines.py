"""VectorStoreIndex, StorageContext, IngestionPipeline, fusion and query engines over it"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import (
    Document,
    MockEmbedding,
    StorageContext,
    VectorStoreIndex,
    load_index_from_storage,
)
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import MetadataReplacementPostProcessor, SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, TransformQueryEngine
from llama_index.core.retrievers import AutoMergingRetriever, QueryFusionRetriever, VectorIndexRetriever
from llama_index.core.schema import IndexNode, MetadataMode, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

from tests.doors.llamaindex.conftest import HELD
from ultrarag.doors.llamaindex import FoundNode, UltraRAGEmbedding, UltraRAGRetriever, UltraRAGVectorStore
from ultrarag.errors import FingerprintError
from ultrarag.retrieve import LiveIndex


def documents() -> list[Document]:
    return [Document(id_=f"d{n}", text=text, metadata=dict(told)) for n, (text, told, _) in enumerate(HELD, start=1)]


@pytest.fixture
def store(live: LiveIndex) -> UltraRAGVectorStore:
    """An empty one."""
    return UltraRAGVectorStore(live)


@pytest.fixture
def index(store: UltraRAGVectorStore) -> VectorStoreIndex:
    context = StorageContext.from_defaults(vector_store=store)
    return VectorStoreIndex.from_documents(documents(), storage_context=context, embed_model=store.embed_model)


def ids(found: Any) -> list[str]:
    return [item.node.ref_doc_id for item in found]


def test_documents_are_encoded_once(live: LiveIndex, store: UltraRAGVectorStore, encoded: list[str]) -> None:
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex.from_documents(documents(), storage_context=context, embed_model=store.embed_model)
    assert (len(live), len(encoded)) == (len(HELD), len(HELD))
    index.as_retriever().retrieve("opera")
    assert encoded[len(HELD) :] == ["opera"]


def test_an_index_inserts_updates_and_deletes(index: VectorStoreIndex, live: LiveIndex) -> None:
    index.insert(Document(id_="new", text="Annoy is a library."))
    assert live.count({"ref_doc_id": "new"}) == 1
    index.update_ref_doc(Document(id_="new", text="Annoy is a forest of trees."))
    assert [p.text for p in live.passages({"ref_doc_id": "new"})] == ["Annoy is a forest of trees."]
    index.delete_ref_doc("new", delete_from_docstore=True)
    index.delete_nodes([p.id for p in live.passages({"ref_doc_id": "d1"})])
    assert (len(live), live.count({"ref_doc_id": "d1"})) == (3, 0)


def test_an_index_in_async(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex.from_documents(
        documents(), storage_context=context, embed_model=store.embed_model, use_async=True
    )

    async def use() -> None:
        await index.ainsert(Document(id_="new", text="Annoy is a library."))
        found = await index.as_retriever(similarity_top_k=1).aretrieve("Annoy is a library.")
        assert ids(found) == ["new"]
        await index.adelete_ref_doc("new")

    asyncio.run(use())
    assert len(live) == 4


@pytest.mark.parametrize("mode", ["default", "hybrid", "mmr"])
def test_retrievers_of_an_index_take_modes_and_filters(index: VectorStoreIndex, mode: str) -> None:
    filters = MetadataFilters(filters=[MetadataFilter(key="lang", value="de")])
    found = index.as_retriever(vector_store_query_mode=mode, filters=filters).retrieve("die oper beginnt")
    assert ids(found) == ["d4"]


def test_an_index_is_opened_again_from_what_lies_there(
    index: VectorStoreIndex, live: LiveIndex, tmp_path: Path
) -> None:
    index.storage_context.persist(str(tmp_path / "storage"))
    store = UltraRAGVectorStore(live)
    text = live.search("opera", heads=["bm25"])[0].passage.text
    for again in (
        VectorStoreIndex.from_vector_store(store, embed_model=store.embed_model),
        load_index_from_storage(
            StorageContext.from_defaults(persist_dir=str(tmp_path / "storage"), vector_store=store),
            embed_model=store.embed_model,
        ),
    ):
        assert ids(again.as_retriever(similarity_top_k=1).retrieve(text)) == ["d3"]


def test_another_embedding_model_is_refused_in_words(store: UltraRAGVectorStore) -> None:
    context = StorageContext.from_defaults(vector_store=store)
    with pytest.raises(FingerprintError, match="is 8 wide"):
        VectorStoreIndex.from_documents(documents(), storage_context=context, embed_model=MockEmbedding(8))
    store.add([TextNode(text="A text.")])
    wrong = VectorStoreIndex.from_vector_store(store, embed_model=MockEmbedding(8))
    with pytest.raises(FingerprintError, match="the query's vector is 8 wide"):
        wrong.as_retriever().retrieve("opera")
    assert wrong.as_retriever(vector_store_query_mode="text_search").retrieve("text")


def test_a_pipeline_upserts_by_its_docstore(store: UltraRAGVectorStore, live: LiveIndex, encoded: list[str]) -> None:
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), store.embed_model],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    pipeline.run(documents=documents())
    assert (len(live), len(encoded)) == (4, 4)
    pipeline.run(documents=documents())
    changed = documents()
    changed[0].set_content("Milvus is another thing.")
    pipeline.run(documents=changed)
    assert (len(live), len(encoded)) == (4, 5)
    pipeline.run(documents=changed[:2])
    assert sorted(node.ref_doc_id or "" for node in store.get_nodes()) == ["d1", "d2"]
    assert store.get_nodes()[1].get_content() == "Milvus is another thing."


def test_a_pipeline_without_a_splitter_updates_and_deletes_too(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    pipeline = IngestionPipeline(
        transformations=[store.embed_model],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    asyncio.run(pipeline.arun(documents=documents()))
    asyncio.run(pipeline.arun(documents=documents()[1:]))
    assert sorted(p.id for p in live.passages()) == ["d2", "d3", "d4"]


def test_a_pipelines_cache_gives_no_vectors_of_before_a_swap(
    store: UltraRAGVectorStore, live: LiveIndex, swapped: Any, encoded: list[str]
) -> None:
    pipeline = IngestionPipeline(transformations=[store.embed_model], vector_store=store)
    pipeline.run(documents=documents())
    pipeline.run(documents=documents())
    assert len(encoded) == 4
    swapped()
    pipeline.run(documents=documents())
    assert live.vectors(["d1"]).dense[0] == pytest.approx(
        store.embed_model.get_text_embedding(documents()[0].get_content(MetadataMode.EMBED)), abs=1e-6
    )


def test_a_query_engine_answers_from_the_nodes(index: VectorStoreIndex) -> None:
    text = "The opera begins at eight."
    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=1, vector_store_query_mode="text_search")
    answer = engine.query(text)
    assert ids(answer.source_nodes) == ["d3"]
    assert text in str(answer)  # the mock repeats its prompt


def test_our_retriever_in_a_query_engine_with_postprocessors(index: VectorStoreIndex, live: LiveIndex) -> None:
    engine = RetrieverQueryEngine.from_args(
        UltraRAGRetriever(live, 3, weights={"dense": 1, "bm25": 1}),
        llm=MockLLM(),
        node_postprocessors=[
            SimilarityPostprocessor(similarity_cutoff=-9),
            MetadataReplacementPostProcessor(target_metadata_key="window"),
        ],
    )
    answer = engine.query("opera at eight")
    assert len(answer.source_nodes) == 3
    assert {item.fingerprint for item in answer.source_nodes if isinstance(item, FoundNode)} == {live.fingerprint}
    assert {told["generation"] for told in (answer.metadata or {}).values()} == {1}
    assert "generation" not in str(answer)
    assert asyncio.run(engine.aquery("opera at eight")).source_nodes[0].score == answer.source_nodes[0].score


@pytest.mark.parametrize("mode", ["reciprocal_rerank", "relative_score", "dist_based_score", "simple"])
def test_a_fusion_finds_a_node_once(index: VectorStoreIndex, live: LiveIndex, mode: str) -> None:
    retrievers = [
        index.as_retriever(similarity_top_k=4),
        index.as_retriever(similarity_top_k=4, vector_store_query_mode="hybrid"),
        UltraRAGRetriever(live, 4, generation_key=None),
    ]
    fusion = QueryFusionRetriever(
        retrievers, llm=MockLLM(), similarity_top_k=9, num_queries=1, mode=mode, use_async=False
    )
    found = fusion.retrieve("the opera begins")
    assert sorted(ids(found)) == ["d1", "d2", "d3", "d4"]
    ours = [UltraRAGRetriever(live, 4), UltraRAGRetriever(live, 4, weights={"dense": 1, "bm25": 1})]
    fusion = QueryFusionRetriever(ours, llm=MockLLM(), similarity_top_k=9, num_queries=3, mode=mode, use_async=True)
    assert len(fusion.retrieve("the opera begins")) == 4


def test_hyde_searches_by_the_made_up_answer(index: VectorStoreIndex, live: LiveIndex) -> None:
    text = live.search("opera eight", heads=["bm25"])[0].passage.text

    class Answers(MockLLM):
        def predict(self, *args: Any, **kwargs: Any) -> str:
            return text

    engine = TransformQueryEngine(
        index.as_query_engine(llm=MockLLM(), similarity_top_k=1),
        HyDEQueryTransform(llm=Answers(), include_original=False),
    )
    assert ids(engine.query("zzz qqq").source_nodes) == ["d3"]
    bundle = QueryBundle("zzz", custom_embedding_strs=[text, text])
    assert ids(index.as_retriever(similarity_top_k=1).retrieve(bundle)) == ["d3"]
    found = index.as_retriever(similarity_top_k=1, vector_store_query_mode="hybrid", alpha=1.0).retrieve(bundle)
    assert ids(found) == ["d3"]


def test_a_swap_changes_what_an_index_answers_with(index: VectorStoreIndex, live: LiveIndex, swapped: Any) -> None:
    retriever, ours = index.as_retriever(similarity_top_k=4), UltraRAGRetriever(live, 4)
    before = [item.score for item in retriever.retrieve("opera")]
    swapped()
    after = retriever.retrieve("opera")
    assert [item.score for item in after] != before
    assert [item.score for item in after] == pytest.approx([item.score for item in ours.retrieve("opera")], abs=1e-6)
    assert {item.metadata["generation"] for item in ours.retrieve("opera")} == {2}


def test_index_nodes_lead_to_what_they_stand_for(store: UltraRAGVectorStore) -> None:
    inner = TextNode(id_="inner", text="The whole chapter.")
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex(
        nodes=[TextNode(id_="plain", text="A plain node.")],
        objects=[IndexNode(id_="pointer", text="A summary of a chapter.", index_id="chapter", obj=inner)],
        storage_context=context,
        embed_model=store.embed_model,
    )
    found = VectorIndexRetriever(index, similarity_top_k=2, object_map={"chapter": inner}).retrieve("A summary")
    assert {item.node_id for item in found} == {"inner", "plain"}


def test_parents_are_merged_from_the_docstore(store: UltraRAGVectorStore) -> None:
    from llama_index.core.node_parser import HierarchicalNodeParser, get_leaf_nodes

    text = " ".join(f"Sentence number {n} of the chapter." for n in range(60))
    parsed = HierarchicalNodeParser.from_defaults(chunk_sizes=[256, 64]).get_nodes_from_documents([Document(text=text)])
    docstore = SimpleDocumentStore()
    docstore.add_documents(parsed)
    context = StorageContext.from_defaults(vector_store=store, docstore=docstore)
    index = VectorStoreIndex(get_leaf_nodes(parsed), storage_context=context, embed_model=store.embed_model)
    merged = AutoMergingRetriever(index.as_retriever(similarity_top_k=20), context).retrieve("Sentence number 3")
    assert merged
    assert {item.node.node_id for item in merged} & {node.node_id for node in parsed if node.child_nodes}


def test_an_index_made_elsewhere_is_searched(live: LiveIndex) -> None:
    live.add([{"id": "1", "title": "Milvus", "text": "A vector database.", "metadata": {"lang": "en"}}])
    index = VectorStoreIndex.from_vector_store(UltraRAGVectorStore(live), embed_model=UltraRAGEmbedding(live))
    found = index.as_retriever().retrieve("database")
    assert (found[0].node_id, found[0].text, found[0].metadata) == ("1", "Milvus\nA vector database.", {"lang": "en"})
