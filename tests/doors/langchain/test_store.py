"""our own: filters, scores, thresholds, MMR, vectors, ids, metadata, wrong input"""

import asyncio
import json
import math
import pickle
import uuid
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from ultrarag.doors.langchain import UltraRAGEmbeddings, UltraRAGVectorStore
from ultrarag.doors.langchain.filters import translated
from ultrarag.errors import DataError, ExistsError, FingerprintError, IndexStateError, UsageError
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.search import parse

TEXTS = {
    "milvus": "Milvus is a database for vectors.",
    "qdrant": "Qdrant is a vector search engine.",
    "qdrant-2": "Qdrant is an engine that searches vectors.",
    "opera": "The opera begins at eight in the evening.",
    "bread": "Bake the bread for forty minutes.",
}
YEARS = {"milvus": 2019, "qdrant": 2021, "qdrant-2": 2023, "opera": 1900}
QUERY, NONSENSE = "which database stores vectors?", "qwertz zzyx blorp"
HYBRID = {"dense": 1, "bm25": 0.5}


@pytest.fixture
def filled(store: UltraRAGVectorStore) -> UltraRAGVectorStore:
    metadatas = [{"year": YEARS[id]} if id in YEARS else {} for id in TEXTS]
    assert store.add_texts(TEXTS.values(), metadatas, ids=list(TEXTS)) == list(TEXTS)
    return store


def ids(found) -> list[str]:
    return [one.id if isinstance(one, Document) else one[0].id for one in found]


def both(store, name: str, *args, **kwargs):
    """What a method gives, which its async form gives too."""
    found = getattr(store, name)(*args, **kwargs)
    assert asyncio.run(getattr(store, f"a{name}")(*args, **kwargs)) == found
    return found


# Filters and scores


def test_filters_are_those_of_the_index(filled) -> None:
    assert both(filled, "similarity_search", QUERY, filter={"year": 2019})[0] == Document(
        id="milvus", page_content=TEXTS["milvus"], metadata={"year": 2019}
    )
    assert set(ids(filled.similarity_search(QUERY, filter={"year": {"gte": 2020}}))) == {"qdrant", "qdrant-2"}
    assert set(ids(filled.similarity_search(QUERY, filter={"or": [{"year": 1900}, {"year": None}]}))) == {
        "opera",
        "bread",
    }
    assert ids(filled.as_retriever(search_kwargs={"filter": {"year": [1900]}, "k": 3}).invoke(QUERY)) == ["opera"]
    assert ids(filled.similarity_search(QUERY, filter={"year": {"$gt": 2019, "$ne": 2021}})) == ["qdrant-2"]
    with pytest.raises(UsageError, match=r"operator '\$gtee'; did you mean '\$gte"):
        filled.similarity_search(QUERY, filter={"year": {"$gtee": 2020}})
    with pytest.raises(UsageError, match="a filter is a mapping"):
        filled.similarity_search(QUERY, filter=lambda one: True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"a": {"$eq": 1}, "b": "x"}, {"a": 1, "b": "x"}),
        ({"a": {"$in": [1, 2]}}, {"a": [1, 2]}),
        ({"a": {"$nin": [1]}, "b": {"$ne": 2}}, {"and": [{"not": {"a": [1]}}, {"not": {"b": 2}}]}),
        ({"a": {"$gte": 1, "$lt": 5, "$ne": 3}}, {"and": [{"not": {"a": 3}}, {"a": {"gte": 1, "lt": 5}}]}),
        ({"$or": [{"a": 1}, {"not": {"b": {"$lt": 2}}}]}, {"or": [{"a": 1}, {"not": {"b": {"lt": 2}}}]}),
        ({"$not": {"$and": [{"a": {"$exists": True}}]}}, {"not": {"and": [{"not": {"a": None}}]}}),
        ({"a": {"$exists": False}}, {"a": None}),
        ({"day": {"gte": date(2024, 5, 1)}, "tag": ("x", "y")}, {"day": {"gte": "2024-05-01"}, "tag": ["x", "y"]}),
        ({"price.$": 3}, {"price.$": 3}),
    ],
)
def test_filters_of_other_stores_are_translated(theirs, ours) -> None:
    assert translated(theirs) == ours
    assert translated(ours) == ours
    parse(ours)


@pytest.mark.parametrize(
    "theirs", [{"$nor": [{"year": 1900}]}, {"$or": None}, {"$and": {"year": 1900}}, {"year": 1900, "$gt": 3}]
)
def test_an_operator_in_the_place_of_a_key_is_no_key(filled, theirs) -> None:
    """As one it would pass nothing, or everything: `{"$or": None}` would be "without the field '$or'"."""
    with pytest.raises(UsageError, match="join a list of filters"):
        filled.similarity_search(QUERY, filter=theirs)
    with pytest.raises(UsageError, match="join a list of filters"):
        filled.delete(filter=theirs)
    assert len(filled.index) == len(TEXTS)


def test_scores_are_similarities(filled) -> None:
    found = both(filled, "similarity_search_with_score", QUERY, k=5)
    scores = [score for _, score in found]
    assert ids(found)[0] == "milvus"
    assert scores == sorted(scores, reverse=True)
    question, texts = filled.embeddings.embed_query(QUERY), filled.embeddings.embed_documents([TEXTS["milvus"]])
    assert scores[0] == pytest.approx(np.dot(question, texts[0]), abs=1e-4)
    hybrid = filled.similarity_search_with_score(QUERY, k=5, weights=HYBRID, normalize="raw")
    assert hybrid[0][1] > scores[0] + 0.1


def test_a_threshold_means_the_same_for_every_query_and_weights(filled) -> None:
    hybrid = UltraRAGVectorStore(filled.index, weights=HYBRID)
    assert hybrid.similarity_search_with_score(NONSENSE)[0][1] >= 1  # a fused score: the best of this query has it
    for store in (filled, hybrid):
        good = both(store, "similarity_search_with_relevance_scores", QUERY, k=5, score_threshold=0.4)
        assert "milvus" in ids(good)
        assert all(0.4 <= score <= 1 for _, score in good)
        assert both(store, "similarity_search_with_relevance_scores", NONSENSE, score_threshold=0.4) == []
        everything = dict(zip(TEXTS, (0.0,) * 5, strict=True))
        everything |= {one.id: s for one, s in store.similarity_search_with_relevance_scores(NONSENSE, k=5)}
        assert max(everything.values()) < 0.4
    retriever = hybrid.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.4})
    assert ids(retriever.invoke(QUERY)) == ids(good[:4])
    assert asyncio.run(retriever.ainvoke(NONSENSE)) == []


def test_a_threshold_leaves_k_hits_where_so_many_pass(filled) -> None:
    """The fused order has a passage with the words before those that are near: it is passed over, not counted."""
    filled.add_texts(["stores stores stores stores which which"], ids=["words"])
    weights = {"dense": 0.1, "bm25": 1}
    assert "words" in ids(filled.similarity_search(QUERY, k=1, weights=weights))
    found = filled.similarity_search_with_relevance_scores(QUERY, k=2, weights=weights, score_threshold=0.45)
    assert len(found) == 2
    assert "words" not in ids(found)
    bounded = filled.similarity_search_with_relevance_scores(QUERY, min_scores={"dense": 0.45}, score_threshold=0.1)
    assert all(score >= 0.45 for _, score in bounded)


def test_relevance_without_cosines_is_refused(filled, swapped, monkeypatch) -> None:
    for asked in ({"weights": {"bm25": 1}}, {"heads": ["bm25"]}):
        with pytest.raises(UsageError, match="relevance scores are cosines"):
            filled.similarity_search_with_relevance_scores(QUERY, **asked)
    with pytest.raises(UsageError, match="weights is \\['dense'\\]; it maps each head to a number"):
        filled.similarity_search_with_relevance_scores(QUERY, weights=["dense"])
    for wrong in (40, -0.1, "0.5"):
        with pytest.raises(UsageError, match="score_threshold is"):
            filled.similarity_search_with_relevance_scores(QUERY, score_threshold=wrong)
    monkeypatch.setattr(filled.index.encoder.settings, "normalize", False)
    with pytest.raises(UsageError, match="length 1"):
        filled.similarity_search_with_relevance_scores(QUERY)


# MMR and vectors


def test_mmr_chooses_as_langchain_does(filled) -> None:
    question = filled.embeddings.embed_query(QUERY)
    vectors = filled.embeddings.embed_documents(list(TEXTS.values()))
    order = ids(filled.similarity_search(QUERY, k=5))
    by_rank = [vectors[list(TEXTS).index(id)] for id in order]
    for weight in (0.0, 0.3, 0.5, 0.8, 1.0):
        theirs = maximal_marginal_relevance(np.array(question), by_rank, lambda_mult=weight, k=3)
        asked = {"k": 3, "fetch_k": 5, "lambda_mult": weight}
        found = both(filled, "max_marginal_relevance_search", QUERY, **asked)
        assert ids(found) == [order[place] for place in theirs], weight
        assert both(filled, "max_marginal_relevance_search_by_vector", question, **asked) == found
    assert set(ids(filled.max_marginal_relevance_search(QUERY, k=3, fetch_k=3))) == set(order[:3])
    assert ids(filled.max_marginal_relevance_search(QUERY, filter={"year": 1900})) == ["opera"]
    asked = {"k": 2, "fetch_k": 5, "lambda_mult": 0.3}
    retriever = filled.as_retriever(search_type="mmr", search_kwargs=asked)
    assert retriever.invoke(QUERY) == filled.max_marginal_relevance_search(QUERY, **asked)


def test_vectors_say_who_made_them(filled) -> None:
    vector = filled.embeddings.embed_query(QUERY)
    found = both(filled, "similarity_search_by_vector", vector, k=2)
    assert found == filled.similarity_search(QUERY, k=2)
    assert filled.similarity_search_by_vector(vector, k=2, filter={"year": 1900})[0].id == "opera"
    assert pickle.loads(pickle.dumps(vector)).fingerprint == vector.fingerprint == filled.index.fingerprint
    plain = json.loads(json.dumps(vector))
    with pytest.raises(UsageError, match=r"which encoder made it.*store\.index\.fingerprint"):
        filled.similarity_search_by_vector(plain)
    assert filled.similarity_search_by_vector(plain, k=2, fingerprint=filled.index.fingerprint) == found
    with pytest.raises(FingerprintError, match="come from the encoder abc"):
        filled.similarity_search_by_vector(plain, fingerprint="abc")
    with pytest.raises(UsageError, match="384"):
        filled.similarity_search_by_vector(plain[:5], fingerprint=filled.index.fingerprint)
    hybrid = UltraRAGVectorStore(filled.index, weights=HYBRID)  # a vector has no words to search by
    assert hybrid.similarity_search_by_vector(vector, k=2) == found


def test_vectors_of_the_model_before_a_swap_are_refused(swapped, checkpoint) -> None:
    store = UltraRAGVectorStore(swapped)
    store.add_texts(["the old castle", "books"])
    embeddings = store.embeddings
    old = embeddings.embed_query("castle")
    swapped.swap(swapped.build(checkpoint))
    with pytest.raises(FingerprintError, match="live generation 2"):
        store.similarity_search_by_vector(old)
    new = embeddings.embed_query("castle")
    assert ids(store.similarity_search_by_vector(new)) == ids(store.similarity_search("castle"))
    assert new.fingerprint != old.fingerprint


def test_a_model_with_several_heads_is_searched_by_its_dense_one(swapped) -> None:
    store = UltraRAGVectorStore(swapped)
    store.add_texts(["the old castle", "books"])
    scored = store.similarity_search_with_score("castle")
    assert [score for _, score in scored] == [hit.score for hit in swapped.search("castle", k=4, heads=["dense"])]
    assert store.similarity_search("castle", heads=["bm25"])[0].page_content == "the old castle"
    hybrid = UltraRAGVectorStore(swapped, weights={"dense": 1, "colbert": 1}, search_kwargs={"normalize": "raw"})
    found = hybrid.similarity_search_with_score("castle")
    hits = swapped.search("castle", weights={"dense": 1, "colbert": 1}, normalize="raw")
    assert [score for _, score in found] == [hit.score for hit in hits]
    assert len(hybrid.similarity_search("castle", heads=["bm25"])) == 1


def test_an_index_without_dense_vectors(tmp_path, tiny) -> None:
    LiveIndex.create(tmp_path / "kb", tiny, backend="numpy", heads=["sparse"]).close()
    store = UltraRAGVectorStore(tmp_path / "kb")
    store.add_texts(["the old castle", "books"], ids=["castle", "books"])
    assert store.embeddings is None
    assert "castle" in ids(store.as_retriever().invoke("castle"))
    for refused in (store.similarity_search_with_relevance_scores, store.max_marginal_relevance_search):
        with pytest.raises(UsageError, match="dense"):
            refused("castle")
    with pytest.raises(UsageError, match="embeddings are dense vectors, and the model has sparse"):
        UltraRAGEmbeddings(store.index)
    store.index.close()


# Documents


def test_ids_and_metadata(store) -> None:
    key, day = uuid.uuid4(), date(2024, 5, 1)
    metadata = {"day": day, "key": key, "file": Path("a/b"), "score": np.float32(0.5), "tags": ("x", "y")}
    given = [Document(page_content="one", metadata=metadata), Document(page_content="two", id="2")]
    made, two = store.add_documents(given)
    assert two == "2"
    assert uuid.UUID(made)
    kept = {"day": "2024-05-01", "key": str(key), "file": "a/b", "score": 0.5, "tags": ["x", "y"]}
    found = both(store, "get_by_ids", ["2", "nobody", made])
    assert found == [Document(page_content="two", id="2"), Document(page_content="one", id=made, metadata=kept)]
    assert ids(store.similarity_search("one", filter={"day": {"gt": "2024-01-01"}})) == [made]
    assert given[0].metadata == metadata
    assert store.add_documents(given, ids=["a", "b"]) == ["a", "b"]
    assert asyncio.run(store.aadd_documents(given[1:])) == ["2"]
    with pytest.raises(ExistsError, match="'2'"):
        store.add_documents(given[1:], on_existing="fail")


def test_a_title_stands_before_the_text(store) -> None:
    store.index.add([{"id": "1", "title": "Milvus", "text": "A database."}])
    assert store.get_by_ids(["1"])[0].page_content == "Milvus\nA database."


def test_documents_that_cannot_be_kept_are_named(store) -> None:
    page = {"source": "a.pdf", "page": 3}
    with pytest.raises(DataError, match=r"document 1 \(source a.pdf, page 3\): it has no visible text"):
        store.add_texts(["x", " \n"], [{}, page])
    with pytest.raises(DataError, match="document 0: metadata: 'x' is nan"):
        store.add_texts(["x"], [{"x": math.nan}])
    for wrong in ({"ids": ["1"]}, {"metadatas": [{}]}):  # langchain-core would drop the second text
        with pytest.raises(UsageError, match="2 texts and 1"):
            store.add_texts(["x", "y"], **wrong)
    with pytest.raises(DataError, match="'id' is int"):
        store.add_texts(["x"], ids=[5])
    with pytest.raises(DataError, match="document 0: its text is NoneType"):
        store.add_texts([None])
    with pytest.raises(TypeError, match="batch_sise"):
        store.add_texts(["x"], batch_sise=3)
    assert len(store.index) == 0


def test_deleting(filled) -> None:
    assert filled.delete(["opera", "nobody"])
    assert filled.delete(filter={"year": {"$gt": 2020}})
    assert {passage.id for passage in filled.index.passages()} == {"milvus", "bread"}
    assert asyncio.run(filled.adelete(["bread"]))
    assert filled.delete([])
    with pytest.raises(UsageError, match="either ids or a filter"):
        filled.delete(filter=None)  # no filter is not every document
    with pytest.raises(TypeError, match="namespace"):
        filled.delete(namespace="x")
    assert len(filled.index) == 1
    assert filled.delete()
    assert len(filled.index) == 0
    filled.add_texts(["x"])
    assert asyncio.run(filled.adelete())
    assert len(filled.index) == 0


# Indexes


def test_from_documents(tmp_path, tiny, other) -> None:
    embeddings, path = UltraRAGEmbeddings(tiny), tmp_path / "made"
    first = [Document(page_content="the old castle", metadata={"n": 1}, id="1")]
    store = UltraRAGVectorStore.from_documents(first, embeddings, path=path, backend="numpy", weights={"bm25": 1})
    again = UltraRAGVectorStore.from_texts(["books"], embeddings, [{"n": 2}], ids=["2"], path=path)
    assert ids(store.get_by_ids(["1", "2"])) == ["1", "2"]
    assert ids(store.similarity_search("books")) == ["2"]
    more = asyncio.run(UltraRAGVectorStore.afrom_texts(["rivers"], embeddings, ids=["3"], path=path))
    with pytest.raises(UsageError, match="backend can be said of a new index alone"):
        UltraRAGVectorStore.from_texts(["x"], embeddings, path=path, backend="numpy")
    with pytest.raises(FingerprintError, match="leave the encoder out"):
        UltraRAGVectorStore.from_texts(["x"], UltraRAGEmbeddings(other), path=path)
    for one in (store, again, more):
        assert len(one.index) == 3
        one.index.close()
    with pytest.raises(IndexStateError, match="closed"):
        store.similarity_search("books")
    with pytest.raises(DataError, match="document 0"):
        UltraRAGVectorStore.from_texts([" "], embeddings, path=tmp_path / "never")
    with pytest.raises(DataError, match="lone surrogate"):
        UltraRAGVectorStore.from_texts(["half \ud83d"], embeddings, path=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_foreign_embeddings_are_refused_in_words(tmp_path, tiny) -> None:
    with pytest.raises(UsageError, match=r"embedding is DeterministicFakeEmbedding.*give UltraRAGEmbeddings"):
        UltraRAGVectorStore.from_texts(["x"], DeterministicFakeEmbedding(size=6), path=tmp_path / "kb")
    with pytest.raises(UsageError, match="need path, the folder of the index"):
        UltraRAGVectorStore.from_texts(["x"], UltraRAGEmbeddings(tiny))


def test_one_alone_is_not_taken_for_several(store) -> None:
    for arguments in ({"texts": "abc"}, {"texts": ["a", "b"], "ids": "xy"}, {"texts": ["a"], "metadatas": {"x": 1}}):
        with pytest.raises(UsageError, match="put one alone into a list"):
            store.add_texts(**arguments)
        with pytest.raises(UsageError, match="put one alone into a list"):
            asyncio.run(store.aadd_texts(**arguments))
    assert len(store.index) == 0


def test_an_index_is_opened_by_its_path_and_shared(filled) -> None:
    by_path = UltraRAGVectorStore(str(filled.index.path))
    assert by_path.similarity_search(QUERY) == filled.similarity_search(QUERY)
    by_path.add_texts(["Weaviate is a vector database."], ids=["weaviate"])
    assert filled.get_by_ids(["weaviate"])
    by_path.index.close()
    assert filled.similarity_search(QUERY)
    assert repr(filled) == f"UltraRAGVectorStore(LiveIndex('{filled.index.path}'))"
    with pytest.raises(UsageError, match="index is int"):
        UltraRAGVectorStore(5)
    with pytest.raises(IndexStateError, match="nowhere"):
        UltraRAGVectorStore("nowhere")


def test_searches_that_cannot_be_are_refused(filled) -> None:
    with pytest.raises(UsageError, match="no argument 'fliter'; did you mean 'filter'"):
        filled.similarity_search(QUERY, fliter={})
    with pytest.raises(UsageError, match="k is 0"):
        filled.similarity_search(QUERY, k=0)
    with pytest.raises(UsageError, match="the index has no head 'bm52'"):
        filled.similarity_search(QUERY, weights={"bm52": 1})
    with pytest.raises(UsageError, match="mmr is 7"):
        filled.max_marginal_relevance_search(QUERY, lambda_mult=7)
    assert filled.similarity_search("") == []


# Embeddings


def test_embeddings_read_queries_and_passages_apart(minilm, live) -> None:
    loaded = UltraRAGEmbeddings(minilm, adapter="bge", query_instruction="query: ")
    assert loaded.embed_query("a text") != loaded.embed_documents(["a text"])[0]
    assert loaded.embed_documents([]) == []
    of_index = UltraRAGEmbeddings(live)
    np.testing.assert_allclose(of_index.embed_documents(["a text"]), loaded.embed_documents(["a text"]), atol=1e-6)
    assert np.linalg.norm(of_index.embed_query("a text")) == pytest.approx(1, abs=1e-4)
    assert "LiveIndex" in repr(of_index)
    assert loaded.fingerprint[:12] in repr(loaded)
    assert asyncio.run(of_index.aembed_query("a text")) == of_index.embed_query("a text")
    assert asyncio.run(of_index.aembed_documents(["a text"])) == of_index.embed_documents(["a text"])
    with pytest.raises(UsageError, match="adapter: what is loaded already takes no arguments"):
        UltraRAGEmbeddings(live, adapter="bge")
    with pytest.raises(UsageError, match="model is UltraRAGEmbeddings; it must be an Encoder"):
        UltraRAGEmbeddings(of_index)


def test_queries_at_once_are_encoded_together(minilm_encoder, monkeypatch) -> None:
    embeddings, rows = UltraRAGEmbeddings(minilm_encoder), []
    encode = minilm_encoder.encode_tokens

    def noting(tokens, *rest):
        rows.append(len(tokens))
        return encode(tokens, *rest)

    async def ask() -> list:
        return await asyncio.gather(*(embeddings.aembed_query(f"query {number}") for number in range(12)))

    monkeypatch.setattr(minilm_encoder, "encode_tokens", noting)
    assert len(asyncio.run(ask())) == sum(rows) == 12
    assert len(rows) < 12
