"""Documents: every field comes back, and whose an embedding is stays known"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from haystack import Document
from haystack.dataclasses import ByteStream, SparseEmbedding
from haystack.document_stores.errors import DocumentStoreError, DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy

from haystack_integrations.components.embedders.ultrarag import UltraRAGDocumentEmbedder, UltraRAGTextEmbedder
from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore, Vector, document_store
from haystack_integrations.document_stores.ultrarag.vectors import dense
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.generation import Serving

WHOLE = Document(
    id="whole",
    content="A text.",
    meta={"lang": "en", "list": [1, {"a": None}], "nothing": None},
    embedding=[0.1, 1e300, -2.0],
    sparse_embedding=SparseEmbedding([3, 70000], [0.5, 0.25]),
    blob=ByteStream(b"\x00\xff", {"page": 1}, "image/png"),
    score=0.75,
)


def test_every_field_comes_back(store: UltraRAGDocumentStore):
    store.write_documents([WHOLE])
    assert store.filter_documents() == [WHOLE]
    found = store.documents_of(store.live.search("text", heads=["bm25"]))[0]
    assert found == replace(WHOLE, embedding=None, score=found.score)
    store.return_embedding = False
    assert store.filter_documents() == [replace(WHOLE, embedding=None)]


def test_what_it_keeps_is_one_value_of_the_metadata(store: UltraRAGDocumentStore):
    """A filter looks at every value: a vector must not be hundreds of them."""
    store.write_documents([WHOLE, Document(id="bare", content="Bare.")])
    assert isinstance(store.live.get("whole").metadata["_haystack"], str)
    assert store.live.get("bare").metadata == {}
    assert "_haystack" not in store.get_metadata_fields_info()
    with pytest.raises(DocumentStoreError, match="document 'x': its meta has the key '_haystack'"):
        store.write_documents([Document(id="x", content="A text.", meta={"_haystack": 1})])
    with pytest.raises(DocumentStoreError, match="'_haystack' cannot be updated"):
        store.update_by_filter({"field": "lang", "operator": "==", "value": "en"}, {"_haystack": None})


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (Document(id="x", content=None), "document 'x' has no content"),
        (Document(id="x", content=" "), "'x' is blank"),
        (Document(id="x", content="A text.", meta={"a": object()}), "document 'x': metadata: 'a' is builtins.object"),
    ],
)
def test_a_document_that_no_index_can_hold_is_named(store: UltraRAGDocumentStore, document: Document, says: str):
    with pytest.raises(DocumentStoreError, match=says):
        store.write_documents([Document(content="Another text."), document])
    assert store.count_documents() == 0


def test_a_duplicate_leaves_all_as_it_was(store: UltraRAGDocumentStore):
    store.write_documents([Document(id="a", content="First.")])
    again = [Document(id="b", content="New."), Document(id="a", content="Second.")]
    with pytest.raises(DuplicateDocumentError, match=r"'a'; nothing was added \(DuplicatePolicy.OVERWRITE or SKIP"):
        store.write_documents(again)
    assert store.write_documents(again, policy=DuplicatePolicy.SKIP) == 1
    assert [document.content for document in store.filter_documents()] == ["First.", "New."]
    assert store.write_documents(again, policy=DuplicatePolicy.OVERWRITE) == 2
    assert [document.content for document in store.filter_documents()] == ["Second.", "New."]
    with pytest.raises(ValueError, match="policy is 'skip'; it is a DuplicatePolicy"):
        store.write_documents(again, policy="skip")


def test_a_title_among_the_metadata_is_embedded_and_searched(place: Path):
    store = UltraRAGDocumentStore(place, meta_fields_to_embed=["title", "year"], embedding_separator=" / ")
    document = Document(id="1", content="It begins at eight.", meta={"title": "Opera", "year": 1960})
    store.write_documents([document, Document(id="2", content="No title.")])
    assert store.live.get("1").content == "Opera / 1960\nIt begins at eight."
    assert [hit.id for hit in store.live.search("opera", heads=["bm25"])] == ["1"]
    assert store.filter_documents()[0] == document
    with pytest.raises(DocumentStoreError, match="meta 'title' cannot be updated by itself"):
        store.update_by_filter({"field": "year", "operator": "==", "value": 1960}, {"title": "Other"})
    store.close()


def test_passages_that_were_no_documents_are_whole(store: UltraRAGDocumentStore):
    store.live.add([{"id": "1", "text": "It begins at eight.", "title": "Opera", "metadata": {"year": 1960}}])
    assert store.filter_documents() == [Document(id="1", content="Opera\nIt begins at eight.", meta={"year": 1960})]


def test_a_vector_keeps_its_fingerprint_through_copies():
    vector = Vector.of([1.0, 2.0], "f")
    document = Document(content="A text.", embedding=vector)
    for kept in (
        copy.copy(vector),
        copy.deepcopy(vector),
        pickle.loads(pickle.dumps(vector)),
        type(vector)(value for value in vector),  # as a pipeline does with the inputs of a component
        replace(document, score=1.0).embedding,
        copy.deepcopy(document).embedding,
    ):
        assert kept == [1.0, 2.0]
        assert kept.fingerprint == "f"
    assert Vector([1.0]).fingerprint is None


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("passages were encoded")

    monkeypatch.setattr(Serving, "encode_passages", refuse)


def test_what_the_index_s_encoder_embedded_is_not_encoded_again(
    store: UltraRAGDocumentStore, tiny_m3: str, request: pytest.FixtureRequest
):
    """Whether it was borrowed from the store, or loaded beside it."""
    written = [Document(id=str(n), content=f"Text number {n}.") for n in range(3)]
    beside = UltraRAGDocumentEmbedder(tiny_m3, adapter="bgem3").run(written)["documents"]
    lent = UltraRAGDocumentEmbedder(document_store=store).run(written)["documents"]
    request.getfixturevalue("no_encoding")
    assert lent[0].embedding.fingerprint == store.live.fingerprint
    store.write_documents(beside)
    assert store.write_documents(lent, policy=DuplicatePolicy.OVERWRITE) == 3
    assert [document.embedding for document in store.filter_documents()] == [
        pytest.approx(document.embedding, abs=1e-6) for document in lent
    ]
    assert beside[0].embedding == pytest.approx(lent[0].embedding, abs=1e-6)


async def test_vectors_that_a_swap_made_another_encoder_s_are_made_again(
    store: UltraRAGDocumentStore, monkeypatch: pytest.MonkeyPatch
):
    """It came between the look at whose they are and the write."""
    given = {"embeddings": dense([[1.0] * store.live.encoder.dim]), "fingerprint": "of the encoder before"}
    monkeypatch.setattr(document_store, "given_vectors", lambda *_: given)
    store.write_documents([Document(id="1", content="A text.")])
    await store.write_documents_async([Document(id="2", content="A text.")])
    first, second = store.live.vectors(["1", "2"]).dense
    assert first.tolist() == second.tolist() != [1.0] * len(first)


def test_an_embedding_of_the_index_s_own_follows_a_swap(
    store: UltraRAGDocumentStore, checkpoint: Path, quick_builds: None
):
    document = Document(id="own", content="A text.")
    own = UltraRAGDocumentEmbedder(document_store=store).run([document])["documents"][0]
    foreign = replace(document, id="foreign", embedding=[1.0, 2.0])
    theirs = replace(document, id="theirs", embedding=Vector.of([1.0, 0.5], "of another encoder"))
    store.write_documents([own, foreign, theirs])
    before = store.live.fingerprint
    store.live.swap(store.live.build(checkpoint))
    found = {document.id: document for document in store.filter_documents()}
    assert found["own"].embedding.fingerprint == store.live.fingerprint != before
    assert found["own"].embedding == store.live.vectors(["own"]).dense[0].tolist() != own.embedding
    assert found["foreign"] == foreign
    assert found["theirs"] == theirs
    assert found["theirs"].embedding.fingerprint == "of another encoder"


def test_embedders_of_an_index_with_more_heads(tiny_m3: str, tmp_path: Path):
    """Dense vectors alone are given: the index makes the others, so it encodes."""
    store = UltraRAGDocumentStore(tmp_path / "kb", model=tiny_m3, adapter="bgem3", backend="numpy")
    documents = UltraRAGDocumentEmbedder(document_store=store).run([Document(id="1", content="A text.")])["documents"]
    store.write_documents(documents)
    assert store.live.vectors(["1"]).heads == ("dense", "sparse", "colbert")
    assert store.filter_documents()[0].embedding == pytest.approx(documents[0].embedding, abs=1e-6)
    store.close()


def test_embedders_say_what_they_take(store: UltraRAGDocumentStore, tiny_m3: str):
    with pytest.raises(ValueError, match="either a model, or the document_store"):
        UltraRAGTextEmbedder()
    with pytest.raises(ValueError, match="either a model, or the document_store"):
        UltraRAGTextEmbedder(tiny_m3, document_store=store)
    with pytest.raises(TypeError, match="expects a string, not list"):
        UltraRAGTextEmbedder(document_store=store).run(["a"])
    embedder = UltraRAGDocumentEmbedder(document_store=store, meta_fields_to_embed=["title"])
    with pytest.raises(TypeError, match="expects a list of Documents"):
        embedder.run("a text")
    assert embedder.run([]) == {"documents": [], "meta": {"fingerprint": None}}
    titled, plain = Document(content="Text.", meta={"title": "Title"}), Document(content="Title\nText.")
    vectors = [document.embedding for document in embedder.run([titled, plain])["documents"]]
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)


def test_a_store_is_opened_when_it_is_used(tmp_path: Path, tiny_m3: str):
    with pytest.raises(ValueError, match="needs the path of an index"):
        UltraRAGDocumentStore()
    missing = UltraRAGDocumentStore(tmp_path / "none")
    with pytest.raises(DocumentStoreError, match=r"no index '.*none', and no model to make one with"):
        missing.count_documents()
    store = UltraRAGDocumentStore(tmp_path / "kb", model=tiny_m3, adapter="bgem3", heads=["dense"], bm25=False)
    assert not (tmp_path / "kb").exists()
    store.write_documents([Document(content="A text.")])
    status = store.live.status()
    assert (status["live"]["heads"], status["bm25"]) == (["dense"], False)
    store.close()
    with LiveIndex.open(tmp_path / "kb") as live:  # nobody else has it open
        assert len(live) == 1
    assert store.count_documents() == 1
    store.close()
