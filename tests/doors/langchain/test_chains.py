"""our own: chains, swaps under a retriever, rerankers, the indexing API, loading from JSON"""

import asyncio
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.load import dumps, loads
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from pydantic import ValidationError

from ultrarag import Encoder
from ultrarag.doors.langchain import UltraRAGReranker, UltraRAGRetriever, UltraRAGVectorStore
from ultrarag.errors import FingerprintError, IndexStateError, UsageError
from ultrarag.retrieve import LiveIndex

TEXTS = {"castle": "the old castle", "river": "a river near the castle", "books": "shelves of books"}


@pytest.fixture
def filled(swapped: LiveIndex) -> LiveIndex:
    swapped.add([{"id": id, "text": text, "metadata": {"n": n}} for n, (id, text) in enumerate(TEXTS.items())])
    return swapped


def ids(documents) -> list[str]:
    return [one.id for one in documents]


# Retrievers


def test_a_retriever_follows_a_swap(filled, checkpoint) -> None:
    retriever = UltraRAGRetriever(index=filled, k=2, weights={"dense": 1, "bm25": 1})
    chain = (
        RunnablePassthrough() | retriever | (lambda found: {one.metadata["ultrarag"]["generation"] for one in found})
    )
    generation = filled.build(checkpoint)
    assert chain.invoke("castle") == {1}
    filled.swap(generation)
    assert chain.invoke("castle") == {2}
    assert asyncio.run(chain.ainvoke("castle")) == {2}
    filled.rollback()
    assert chain.batch(["castle", "books"]) == [{1}, {1}]


def test_documents_say_how_they_were_found(filled) -> None:
    retriever = UltraRAGRetriever(index=filled, weights={"dense": 1, "bm25": 1}, filter={"n": {"lt": 2}})
    found = retriever.invoke("castle")
    hits = filled.search("castle", 4, weights={"dense": 1, "bm25": 1}, filter={"n": {"lt": 2}})
    assert [one.page_content for one in found] == [hit.passage.text for hit in hits]
    for one, hit in zip(found, hits, strict=True):
        said = dict(one.metadata["ultrarag"])
        assert len(said.pop("query_id")) == 32
        assert said == {
            "score": hit.score,
            "scores": hit.scores,
            "generation": 1,
            "fingerprint": filled.fingerprint,
        }
        assert one.metadata == {"n": list(TEXTS).index(one.id), "ultrarag": one.metadata["ultrarag"]}
    assert "ultrarag" not in filled.get("castle").metadata
    assert [one.id for one in asyncio.run(retriever.ainvoke("castle"))] == ids(found)


def test_a_call_says_otherwise_for_itself(filled) -> None:
    retriever = UltraRAGRetriever(index=filled, search_kwargs={"heads": ["bm25"]})
    assert set(ids(retriever.invoke("castle"))) == {"castle", "river"}
    assert len(retriever.invoke("castle", k=1)) == 1
    assert ids(retriever.invoke("castle", filter={"n": 1})) == ["river"]
    assert len(retriever.invoke("castle", weights={"dense": 1, "colbert": 1}, fusion="rrf")) == 3
    assert len(UltraRAGRetriever(index=filled, k=1).invoke("castle")) == 1  # of the dense head, which others have too
    with pytest.raises(UsageError, match="no argument 'fliter'; did you mean 'filter'"):
        retriever.invoke("castle", fliter={})


@pytest.mark.parametrize("option", [{"k": 1}, {"filter": {"n": 1}}, {"weights": {"bm25": 1}}])
def test_what_is_a_field_is_no_option(filled, option) -> None:
    with pytest.raises(ValueError, match=f"search_kwargs has '{next(iter(option))}', which is a field"):
        UltraRAGRetriever(index=filled, search_kwargs=option)


def test_options_of_a_store(filled) -> None:
    words = UltraRAGVectorStore(filled, search_kwargs={"weights": {"bm25": 1}})  # which a store has no field for
    assert set(ids(words.similarity_search("castle"))) == {"castle", "river"}
    assert len(words.similarity_search("castle", weights={"dense": 1})) == 3
    with pytest.raises(UsageError, match="search_kwargs has 'k', which each search says itself"):
        UltraRAGVectorStore(filled, search_kwargs={"k": 1})


def test_a_search_is_remembered_where_it_is_asked(filled) -> None:
    found = UltraRAGRetriever(index=filled, search_kwargs={"log": True}).invoke("castle")
    filled.feedback(found[0].metadata["ultrarag"]["query_id"], found[0].id, "relevant")
    silent = UltraRAGRetriever(index=filled).invoke("castle")
    with pytest.raises(UsageError, match="is not in the feedback log"):
        filled.feedback(silent[0].metadata["ultrarag"]["query_id"], found[0].id, "relevant")


def test_a_retriever_is_checked_when_it_is_made(filled) -> None:
    for wrong, why in (
        ({"index": 5}, "index is int"),
        ({"index": filled, "k": 0}, "greater than or equal to 1"),
        ({"index": filled, "top_k": 3}, "top_k"),
        ({"index": filled, "weights": {"dense": "much"}}, "weights"),
        ({}, "index"),
    ):
        with pytest.raises(ValidationError, match=why):
            UltraRAGRetriever(**wrong)
    with pytest.raises(IndexStateError, match="nowhere"):
        UltraRAGRetriever(index="nowhere")


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_a_retriever_goes_through_json_by_its_path(filled) -> None:
    retriever = UltraRAGRetriever(index=str(filled.path), k=2, weights={"dense": 1, "bm25": 1}, tags=["kb"])
    text = dumps(retriever)
    loaded = loads(text, allowed_objects=[UltraRAGRetriever], valid_namespaces=["ultrarag"])
    assert ids(loaded.invoke("castle")) == ids(retriever.invoke("castle"))
    assert (loaded.k, loaded.weights, loaded.tags) == (2, {"dense": 1, "bm25": 1}, ["kb"])
    assert loaded.index is not retriever.index
    assert "not_implemented" not in text
    assert f"index=LiveIndex('{filled.path}')" in repr(retriever)
    loaded.index.close()
    retriever.index.close()
    assert len(filled) == 3


def test_fields_can_be_configured(filled) -> None:
    retriever = UltraRAGRetriever(index=filled).configurable_fields(k=ConfigurableField(id="k"))
    assert len(retriever.invoke("castle", config={"configurable": {"k": 1}})) == 1


def test_a_chain_of_the_usual_parts(filled) -> None:
    """As in LangChain's guides: context from a retriever, a prompt, a model (here one that repeats it)."""
    retriever = UltraRAGRetriever(index=filled, k=1, weights={"bm25": 1})
    context = retriever | (lambda found: "\n".join(one.page_content for one in found))
    prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
    chain = {"context": context, "question": RunnablePassthrough()} | prompt | RunnableLambda(lambda p: p.to_string())
    assert chain.invoke("books") == "Human: shelves of books\n\nbooks"
    assert asyncio.run(chain.abatch(["books", "castle"]))[0] == chain.invoke("books")

    async def events() -> list[str]:
        return [event["event"] async for event in chain.astream_events("books", version="v2")]

    assert "on_retriever_end" in asyncio.run(events())


def test_searches_at_once_meet_swaps(filled, checkpoint) -> None:
    retriever = UltraRAGRetriever(index=filled, k=1)
    generation = filled.build(checkpoint)

    async def ask() -> list[list[Document]]:
        loop = asyncio.get_running_loop()
        flips = loop.run_in_executor(None, lambda: (filled.swap(generation), filled.rollback(), filled.rollback()))
        found = [await retriever.ainvoke("castle")]
        while not flips.done():
            found += await asyncio.gather(*(retriever.ainvoke(f"castle {n}") for n in range(8)))
        await flips
        return [*found, await retriever.ainvoke("castle")]

    answers = asyncio.run(ask())
    assert all(len(one) == 1 for one in answers)
    assert answers[-1][0].metadata["ultrarag"]["generation"] == 2


# Rerankers


def scores(documents) -> list[float]:
    return [one.metadata["relevance_score"] for one in documents]


def test_a_cross_encoder_reranks(reranker_folder) -> None:
    model = Encoder.load(reranker_folder)
    documents = [Document(page_content=text, id=id, metadata={"n": 1}) for id, text in TEXTS.items()]
    found = UltraRAGReranker(model=model, top_n=2).compress_documents(documents, "castle")
    expected = model.score([("castle", text) for text in TEXTS.values()], normalize=True)
    assert scores(found) == pytest.approx(sorted(expected, reverse=True)[:2])
    assert found[0].id == list(TEXTS)[int(np.argmax(expected))]
    assert found[0].metadata["n"] == 1
    assert all(one.metadata == {"n": 1} for one in documents)
    everything = UltraRAGReranker(model=str(reranker_folder), top_n=None)
    assert len(everything.compress_documents(documents, "castle")) == 3
    assert asyncio.run(everything.acompress_documents(documents, "castle"))[:2] == found
    assert everything.compress_documents([], "castle") == []
    for wrong in ({"top_n": 0}, {"weight": -1}, {"topn": 3}, {"model": everything}):
        with pytest.raises(ValidationError):
            UltraRAGReranker(**{"model": model, **wrong})


def test_the_heads_of_an_index_rerank_whatever_is_swapped(filled, checkpoint) -> None:
    documents = [Document(page_content=text, id=id) for id, text in TEXTS.items()]
    reranker = UltraRAGReranker(model=filled, weights={"colbert": 1})
    for _ in range(2):
        found = reranker.compress_documents(documents, "castle")
        hits = filled.score("castle", list(TEXTS), weights={"colbert": 1})
        assert ids(found) == [hit.id for hit in hits]
        assert scores(found) == pytest.approx([hit.score for hit in hits], abs=1e-4)
        if hits.generation == 1:
            filled.swap(filled.build(checkpoint))


def test_scores_of_both_count_with_a_weight(filled, reranker_folder) -> None:
    model = Encoder.load(reranker_folder)
    retriever = UltraRAGRetriever(index=filled)
    alone, none = (UltraRAGReranker(model=model, weight=weight) for weight in (None, 0))
    retrieved = retriever.invoke("castle")
    assert ids(none.compress_documents(retrieved, "castle")) == ids(retrieved)
    chain = ContextualCompressionRetriever(base_retriever=retriever, base_compressor=alone)
    assert scores(chain.invoke("castle")) == sorted(scores(alone.compress_documents(retrieved, "castle")), reverse=True)
    assert scores(asyncio.run(chain.ainvoke("castle"))) == scores(chain.invoke("castle"))
    with pytest.raises(UsageError, match="document 0 has no score of an UltraRAGRetriever"):
        none.compress_documents([Document(page_content="x")], "castle")


def test_retrievers_are_mixed(filled) -> None:
    dense, words = UltraRAGRetriever(index=filled), UltraRAGRetriever(index=filled, weights={"bm25": 1})
    both = EnsembleRetriever(retrievers=[dense, words], weights=[0.5, 0.5], id_key=None)
    assert set(ids(both.invoke("castle"))) == set(TEXTS)


# The indexing API


def test_the_indexing_api_keeps_the_index_in_step(filled) -> None:
    filled.clear()
    store, records = UltraRAGVectorStore(filled), InMemoryRecordManager(namespace="kb")
    records.create_schema()
    how: dict[str, Any] = {"cleanup": "incremental", "source_id_key": "source", "key_encoder": "blake2b"}
    one = Document(page_content="the old castle", metadata={"source": "a.txt"})
    two = Document(page_content="books", metadata={"source": "b.txt"})
    assert index([one, two], records, store, **how)["num_added"] == 2
    assert index([one, two], records, store, **how)["num_skipped"] == 2
    changed = Document(page_content="the new castle", metadata={"source": "a.txt"})
    assert {k: v for k, v in index([changed], records, store, **how).items() if v} == {"num_added": 1, "num_deleted": 1}
    assert {passage.text for passage in filled.passages()} == {"the new castle", "books"}
    full = asyncio.run(aindex([two], records, store, cleanup="full", key_encoder="blake2b"))
    assert (full["num_skipped"], full["num_deleted"]) == (1, 1)
    assert [passage.text for passage in filled.passages()] == ["books"]


# The framework


def test_a_missing_framework_is_said_with_its_command() -> None:
    code = "import sys; sys.modules['langchain_core'] = None; import ultrarag.doors.langchain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: ultrarag.doors.langchain needs langchain-core: pip install langchain-core==" in done.stderr


def test_importing_the_library_imports_no_framework() -> None:
    code = "import ultrarag.retrieve, ultrarag.doors, sys; print('langchain_core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_an_index_of_another_model_is_refused(filled, other) -> None:
    with pytest.raises(FingerprintError):
        LiveIndex.open(filled.path, other, share=True)
