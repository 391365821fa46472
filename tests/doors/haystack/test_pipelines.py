"""Pipelines: retrievers, embedders and a ranker, sync and async, loaded twice, under a swap"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from haystack import Document, Pipeline
from haystack.components.preprocessors import DocumentSplitter
from haystack.components.retrievers import (
    AutoMergingRetriever,
    FilterRetriever,
    MultiQueryTextRetriever,
    SentenceWindowRetriever,
    TextEmbeddingRetriever,
)
from haystack.components.writers import DocumentWriter
from haystack.core.errors import PipelineRuntimeError
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy
from haystack.utils import ComponentDevice

from haystack_integrations.components.embedders.ultrarag import UltraRAGDocumentEmbedder, UltraRAGTextEmbedder
from haystack_integrations.components.rankers.ultrarag import UltraRAGRanker
from haystack_integrations.components.retrievers.ultrarag import UltraRAGEmbeddingRetriever, UltraRAGRetriever
from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from ultrarag.errors import FingerprintError, UsageError
from ultrarag.retrieve import LiveIndex

TEXTS = {
    "milvus": "Milvus is a vector database.",
    "opera": "The opera begins at eight.",
    "oper": "Die Oper beginnt um acht.",
}
GERMAN = {"field": "meta.lang", "operator": "==", "value": "de"}


@pytest.fixture
def filled(store: UltraRAGDocumentStore) -> UltraRAGDocumentStore:
    documents = [
        Document(id=id, content=text, meta={"lang": "de" if id == "oper" else "en"}) for id, text in TEXTS.items()
    ]
    store.write_documents(documents)
    return store


def chain(store: UltraRAGDocumentStore, cross_encoder: Path) -> Pipeline:
    """Embedder, retriever, ranker."""
    pipeline = Pipeline()
    pipeline.add_component("embedder", UltraRAGTextEmbedder(document_store=store))
    pipeline.add_component("retriever", UltraRAGEmbeddingRetriever(store, top_k=2))
    pipeline.add_component("ranker", UltraRAGRanker(cross_encoder, adapter="bge-reranker", top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "ranker.documents")
    return pipeline


def asked(text: str) -> dict[str, Any]:
    return {"embedder": {"text": text}, "ranker": {"query": text}}


def test_embedder_retriever_ranker(filled: UltraRAGDocumentStore, cross_encoder: Path):
    pipeline = chain(filled, cross_encoder)
    found = pipeline.run(asked(TEXTS["opera"]), {"retriever"})
    retrieved, ranked = found["retriever"]["documents"], found["ranker"]["documents"]
    assert retrieved[0].id == "opera"
    assert retrieved[0].score == pytest.approx(1, abs=1e-5)
    assert len(ranked) == 1
    assert ranked[0].id in {document.id for document in retrieved}
    assert ranked[0].score != next(d.score for d in retrieved if d.id == ranked[0].id)


@pytest.mark.parametrize("option", [{"k": 1}, {"filter": {"lang": "de"}}, {"ids": ["oper"]}, {"weights": {"bm25": 1}}])
def test_an_option_that_would_not_count_is_refused(filled: UltraRAGDocumentStore, option: dict[str, Any]):
    for kind in (UltraRAGRetriever, UltraRAGEmbeddingRetriever):
        with pytest.raises(ValueError, match=f"search_options has '{next(iter(option))}'"):
            kind(filled, search_options=option)


def test_one_name_is_not_taken_for_its_letters(filled: UltraRAGDocumentStore, cross_encoder: Path):
    for make in (
        lambda: UltraRAGDocumentStore("kb", heads="dense"),
        lambda: UltraRAGDocumentStore("kb", meta_fields_to_embed="lang"),
        lambda: UltraRAGDocumentEmbedder(document_store=filled, meta_fields_to_embed="lang"),
        lambda: UltraRAGRanker(cross_encoder, meta_fields_to_embed="lang"),
        lambda: UltraRAGRetriever(filled, heads="dense"),
    ):
        with pytest.raises(ValueError, match="put one alone into a list"):
            make()


def test_of_a_model_with_several_heads_the_dense_one_is_searched(tiny_m3: str, tmp_path: Path):
    """As in the other doors: a retriever with nothing but its store answers, whatever the model has."""
    store = UltraRAGDocumentStore(tmp_path / "kb", model=tiny_m3, adapter="bgem3", backend="numpy")
    store.write_documents([Document(content=text) for text in TEXTS.values()])
    for found in (UltraRAGRetriever(store).run("opera"), asyncio.run(UltraRAGRetriever(store).run_async("opera"))):
        assert [list(scores) for scores in found["meta"]["scores"]] == [["dense"]] * 3
    store.close()


async def test_the_same_pipeline_in_an_async_program(filled: UltraRAGDocumentStore, cross_encoder: Path):
    pipeline = chain(filled, cross_encoder)
    wanted = {text: pipeline.run(asked(text))["ranker"]["documents"] for text in TEXTS.values()}
    found = await asyncio.gather(*(pipeline.run_async(asked(text)) for text in TEXTS.values()))
    for text, answer in zip(TEXTS.values(), found, strict=True):
        assert [d.id for d in answer["ranker"]["documents"]] == [d.id for d in wanted[text]]


async def test_writing_and_retrieving_in_an_async_program(store: UltraRAGDocumentStore):
    indexing, query = Pipeline(), Pipeline()
    indexing.add_component("writer", DocumentWriter(store, policy=DuplicatePolicy.SKIP))
    query.add_component("retriever", UltraRAGRetriever(store, weights={"dense": 1, "bm25": 0.5}, top_k=1))
    documents = [Document(id=id, content=text) for id, text in TEXTS.items()]
    wrote = await asyncio.gather(
        *(indexing.run_async({"writer": {"documents": [document]}}) for document in documents * 2)
    )
    assert sum(answer["writer"]["documents_written"] for answer in wrote) == 3
    found = await asyncio.gather(*(query.run_async({"retriever": {"query": text}}) for text in TEXTS.values()))
    assert [answer["retriever"]["documents"][0].id for answer in found] == list(TEXTS)
    await query.close_async()
    assert await store.count_documents_async() == 3  # opened again


def test_a_retriever_by_any_head(filled: UltraRAGDocumentStore):
    retriever = UltraRAGRetriever(filled, top_k=1)
    assert retriever.run(TEXTS["opera"])["documents"][0].id == "opera"
    words = UltraRAGRetriever(filled, heads=["bm25"]).run("database")
    assert [document.id for document in words["documents"]] == ["milvus"]
    assert list(words["meta"]["scores"][0]) == ["bm25"]
    fused = UltraRAGRetriever(filled, heads=["dense", "bm25"], search_options={"fusion": "rrf"}).run("opera eight")
    assert fused["documents"][0].id == "opera"
    with pytest.raises(UsageError, match="need explicit weights"):
        UltraRAGRetriever(filled, heads=["dense", "bm25"]).run("opera")
    assert retriever.run("opera", weights={"bm25": 1})["documents"][0].id == "opera"


def test_filters_by_policy(filled: UltraRAGDocumentStore):
    options = {"filters": GERMAN, "top_k": 3}
    english = {"field": "meta.lang", "operator": "==", "value": "en"}
    replaced, merged = UltraRAGRetriever(filled, **options), UltraRAGRetriever(filled, **options, filter_policy="merge")
    assert [d.id for d in replaced.run("opera")["documents"]] == ["oper"]
    assert {d.id for d in replaced.run("opera", filters=english)["documents"]} == {"milvus", "opera"}
    assert merged.run("opera", filters={"field": "meta.year", "operator": "==", "value": 1})["documents"] == []
    assert len(replaced.run("opera", filters=english, top_k=1)["documents"]) == 1


def test_arguments_that_cannot_be(filled: UltraRAGDocumentStore, cross_encoder: Path):
    for kind in (UltraRAGRetriever, UltraRAGEmbeddingRetriever):
        with pytest.raises(ValueError, match="must be an UltraRAGDocumentStore, not InMemoryDocumentStore"):
            kind(InMemoryDocumentStore())
        with pytest.raises(ValueError, match="top_k must be greater than 0"):
            kind(filled, top_k=0)
    with pytest.raises(ValueError, match="top_k must be greater than 0"):
        UltraRAGRanker(cross_encoder, top_k=0)


def test_vectors_of_documents_can_be_compared_with_the_query(filled: UltraRAGDocumentStore):
    embedding = UltraRAGTextEmbedder(document_store=filled).run(TEXTS["opera"])["embedding"]
    for document in UltraRAGEmbeddingRetriever(filled, return_embedding=True).run(embedding)["documents"]:
        assert document.embedding.fingerprint == embedding.fingerprint
        product = sum(a * b for a, b in zip(document.embedding, embedding, strict=True))
        assert product == pytest.approx(document.score, abs=1e-5)


def test_an_embedding_must_say_whose_it_is(filled: UltraRAGDocumentStore):
    retriever = UltraRAGEmbeddingRetriever(filled, top_k=1)
    plain = list(UltraRAGTextEmbedder(document_store=filled).run(TEXTS["opera"])["embedding"])
    with pytest.raises(FingerprintError, match="says not what encoder made it: connect an UltraRAGTextEmbedder"):
        retriever.run(plain)
    assert retriever.run(plain, fingerprint=filled.live.fingerprint)["documents"][0].id == "opera"
    with pytest.raises(FingerprintError, match="come from the encoder of another"):
        retriever.run(plain, fingerprint="of another")


def test_a_ranker_s_weight_threshold_and_fields(cross_encoder: Path):
    documents = [Document(content=f"Text {n}.", meta={"title": f"Title {n}"}, score=float(n)) for n in range(4)]
    ranker = UltraRAGRanker(cross_encoder, adapter="bge-reranker", score_options={"normalize": True})
    alone = ranker.run("a title", documents)["documents"]
    assert [d.score for d in alone] == sorted((d.score for d in alone), reverse=True)
    assert all(0 < d.score < 1 for d in alone)
    middle = alone[1].score
    assert ranker.run("a title", documents, score_threshold=middle)["documents"] == alone[:2]
    assert ranker.run("a title", documents, top_k=1)["documents"] == alone[:1]
    assert ranker.run("a title", [])["documents"] == []
    own = UltraRAGRanker(cross_encoder, adapter="bge-reranker", weight=0.001).run("a title", documents)["documents"]
    assert own[0].id == documents[3].id  # the former scores decide
    titled = UltraRAGRanker(cross_encoder, adapter="bge-reranker", meta_fields_to_embed=["title"])
    plain = UltraRAGRanker(cross_encoder, adapter="bge-reranker")
    joined = Document(content="Title 0\nText 0.")
    assert titled.run("q", documents[:1])["documents"][0].score == plain.run("q", [joined])["documents"][0].score


def test_a_pipeline_loaded_twice_in_one_process(filled: UltraRAGDocumentStore, cross_encoder: Path):
    """By its YAML, as a server or a notebook does; each closes its own handle."""
    first = chain(filled, cross_encoder)
    text = first.dumps()
    second, third = Pipeline.loads(text), Pipeline.loads(text)
    assert second.dumps() == text
    for pipeline in (first, second, third):
        assert pipeline.run(asked(TEXTS["opera"]), {"retriever"})["retriever"]["documents"][0].id == "opera"
    second.close()
    other = third.get_component("retriever").document_store
    other.write_documents([Document(id="late", content="Written through the third pipeline.")])
    assert filled.count_documents() == 4
    third.close()
    assert first.run(asked("opera"), {"retriever"})["retriever"]["documents"]


def test_every_parameter_is_serialized(filled: UltraRAGDocumentStore, cross_encoder: Path):
    device = ComponentDevice.from_str("cpu")
    store = UltraRAGDocumentStore(
        "kb", model="m", uri="qdrant://localhost/kb", checkpoints="shared",
        adapter="bge", backend="numpy", heads=["dense"], bm25=False, device=device,
        meta_fields_to_embed=["title"], embedding_separator=" ", return_embedding=False, trust_remote_code=True,
    )  # fmt: skip
    model: dict[str, Any] = {"adapter": "bge", "device": device, "model_kwargs": {"precision": "bf16"}}
    fields: dict[str, Any] = {"meta_fields_to_embed": ["title"], "embedding_separator": " "}
    retrieval: dict[str, Any] = {"filters": GERMAN, "top_k": 3, "filter_policy": "merge", "return_embedding": True}
    components = [
        UltraRAGTextEmbedder("m", **model, trust_remote_code=True),
        UltraRAGTextEmbedder(document_store=store),
        UltraRAGDocumentEmbedder("m", **model, **fields),
        UltraRAGRetriever(store, **retrieval, weights={"dense": 1}, heads=["dense"], search_options={"log": True}),
        UltraRAGEmbeddingRetriever(store, **retrieval, search_options={"exact": True}),
        UltraRAGRanker("m", **model, **fields, top_k=2, weight=0.5, score_threshold=0.1, score_options={"weights": {}}),
    ]
    for part in (store, *components):
        written = part.to_dict()
        read = type(part).from_dict(written)
        assert read.to_dict() == written
        parameters = set(written["init_parameters"])
        assert parameters == set(type(part).__init__.__code__.co_varnames[1 : len(parameters) + 1])
    pipeline = Pipeline()
    for number, part in enumerate(components):
        pipeline.add_component(f"part{number}", part)
    assert Pipeline.loads(pipeline.dumps()).to_dict() == pipeline.to_dict()


def test_a_swap_under_a_pipeline(
    filled: UltraRAGDocumentStore, tiny_m3: str, checkpoint: Path, cross_encoder: Path, quick_builds: None
):
    """A text always has its answer. An embedding made before the swap is refused after it, and never compared."""
    followed = chain(filled, cross_encoder)
    text = UltraRAGRetriever(filled, weights={"dense": 1, "bm25": 0.1})
    fixed = UltraRAGTextEmbedder(tiny_m3, adapter="bgem3")
    pinned = Pipeline()
    pinned.add_component("embedder", fixed)
    pinned.add_component("retriever", UltraRAGEmbeddingRetriever(filled))
    pinned.connect("embedder.embedding", "retriever.query_embedding")
    assert pinned.run({"embedder": {"text": "opera"}})["retriever"]["documents"]

    answers: list[Any] = []
    refused: list[PipelineRuntimeError] = []
    end = threading.Event()

    def ask() -> None:
        while not end.is_set():
            answers.append(text.run(TEXTS["opera"]))
            try:
                answers.append(followed.run(asked(TEXTS["opera"]), {"retriever"})["retriever"])
            except PipelineRuntimeError as error:  # the swap came between embedder and retriever
                refused.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    filled.live.swap(filled.live.build(checkpoint))
    seen = len(answers)
    while len(answers) < seen + 4:
        assert asker.is_alive()
        time.sleep(0.01)
    end.set()
    asker.join()
    assert all(found["documents"][0].id == "opera" for found in answers)
    assert [found["meta"]["generation"] for found in answers[-2:]] == [2, 2]
    assert len(refused) <= 1
    assert all(isinstance(error.__cause__, FingerprintError) for error in refused)
    with pytest.raises(PipelineRuntimeError, match="the query vectors come from the encoder"):
        pinned.run({"embedder": {"text": "opera"}})


def test_a_search_is_remembered_and_gets_feedback(filled: UltraRAGDocumentStore):
    retriever = UltraRAGRetriever(filled, search_options={"log": True, "client": "me"})
    answer = retriever.run(TEXTS["opera"])
    filled.live.feedback(answer["meta"]["query_id"], answer["documents"][0].id, "relevant")
    (remembered,) = filled.live.feedback_log.queries(None)
    assert remembered.text == TEXTS["opera"]


def test_an_index_in_a_server(tiny: Any, rest: Any, tmp_path: Path):
    LiveIndex.create(tmp_path / "first", tiny, uri=rest.uri, heads=["dense"]).close()
    store = UltraRAGDocumentStore(tmp_path / "second", uri=rest.uri)
    document = Document(id="1", content=TEXTS["opera"], embedding=[1.0, 0.5])
    store.write_documents([document])
    pipeline = Pipeline()
    pipeline.add_component("retriever", UltraRAGRetriever(store))
    again = Pipeline.loads(pipeline.dumps())
    assert [d.id for d in again.run({"retriever": {"query": "opera"}})["retriever"]["documents"]] == ["1"]
    assert store.filter_documents() == [document]
    again.close()
    store.close()


def test_haystack_s_own_retrievers_over_this_store(store: UltraRAGDocumentStore):
    """They call our retrievers, or filter by ids and ranges of the metadata."""
    splitter = DocumentSplitter(split_by="word", split_length=5, split_overlap=0)
    store.write_documents(splitter.run([Document(content=" ".join(TEXTS.values()))])["documents"])
    retriever = UltraRAGRetriever(store, top_k=1, heads=["bm25"])
    hits = retriever.run("opera")["documents"]
    window = SentenceWindowRetriever(store, window_size=1).run(hits)["context_documents"]
    assert [document.meta["split_id"] for document in window] == [0, 1, 2]
    both = MultiQueryTextRetriever(retriever=retriever).run(queries=["opera", "milvus"])["documents"]
    assert len(both) == 2
    by_text = TextEmbeddingRetriever(
        retriever=UltraRAGEmbeddingRetriever(store), text_embedder=UltraRAGTextEmbedder(document_store=store)
    )
    assert by_text.run("opera")["documents"]
    assert FilterRetriever(store).run({"field": "meta.split_id", "operator": "<", "value": 2})["documents"]
    parent = Document(id="parent", content="A parent.", meta={"__level": 0, "__children_ids": ["a", "b"]})
    store.write_documents([parent])
    leaves = [
        Document(id=id, content=id, meta={"__parent_id": "parent", "__level": 1, "__block_size": 1}) for id in "ab"
    ]
    assert [d.id for d in AutoMergingRetriever(store).run(leaves)["documents"]] == ["parent"]


def test_embeddings_for_another_store(tiny_m3: str):
    """A checkpoint in place of any other embedder."""
    kwargs: dict[str, Any] = {"adapter": "bgem3", "model_kwargs": {"heads": ["dense"]}}
    store = InMemoryDocumentStore()
    embedder, queries = UltraRAGDocumentEmbedder(tiny_m3, **kwargs), UltraRAGTextEmbedder(tiny_m3, **kwargs)
    written = embedder.run([Document(id=id, content=text) for id, text in TEXTS.items()])["documents"]
    store.write_documents(written)
    found = store.embedding_retrieval(queries.run(TEXTS["opera"])["embedding"], top_k=1)
    assert found[0].id == "opera"
    for part in (embedder, queries):
        part.close()
    assert embedder.run(written[:1])["documents"][0].embedding == pytest.approx(written[0].embedding, abs=1e-6)
