"""Vector store: own cases by kind, for llama-index-core ships no suite of stores

Kinds: nodes round-trip (types, relations, metadata, excluded keys), replacing, deleting (by document, ids, filters),
getting, clearing, query modes (default, sparse, hybrid, text_search, semantic_hybrid, mmr, those not served), node ids,
document ids, vectors that come along (own, stale, foreign, unknown), async twins, serialisation, swaps.
"""

from __future__ import annotations

import asyncio
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from tests.doors.llamaindex.conftest import HELD, nodes
from ultrarag.doors.llamaindex import UltraRAGEmbedding, UltraRAGRetriever, UltraRAGVectorStore
from ultrarag.errors import DataError, ExistsError, FingerprintError, UsageError
from ultrarag.retrieve import LiveIndex

OPERA = MetadataFilters(filters=[MetadataFilter(key="title", value="Oper", operator="text_match")])


def asked(text: str | None = None, **fields: Any) -> VectorStoreQuery:
    return VectorStoreQuery(query_str=text, **{"similarity_top_k": 2, **fields})


def test_it_is_what_llamaindex_calls_a_vector_store(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    assert isinstance(store, BasePydanticVectorStore)
    assert (store.stores_text, store.is_embedding_query, store.client) == (True, True, live)


def every_kind() -> list[Any]:
    related = {
        NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d9", hash="h", metadata={"a": 1}),
        NodeRelationship.PREVIOUS: RelatedNodeInfo(node_id="before"),
        NodeRelationship.CHILD: [RelatedNodeInfo(node_id="c1"), RelatedNodeInfo(node_id="c2")],
    }
    told = {"b": 1, "a": ["x", {"y": None}], "doc_id": "the user's own", "ref_doc_id": "and this", "ümlaut": "ß"}
    shaped = {
        "metadata_template": "{key}={value}",
        "metadata_separator": "; ",
        "text_template": "{content}|{metadata_str}",
    }
    return [
        TextNode(
            text="A text.",
            id_="text",
            metadata=told,
            relationships=related,
            excluded_embed_metadata_keys=["b"],
            excluded_llm_metadata_keys=["a"],
            start_char_idx=3,
            end_char_idx=10,
            mimetype="text/markdown",
            **shaped,
        ),
        Node(id_="node", text_resource=MediaResource(text="A resource.", mimetype="text/html"), metadata=told),
        Document(id_="document", text="A document.", metadata=told),
        IndexNode(id_="index", text="A summary.", index_id="other index", obj=TextNode(id_="inner", text="Inner.")),
        ImageNode(id_="image", text="A caption.", image="aGk=", image_mimetype="image/png"),
    ]


def test_nodes_of_every_kind_come_back_as_they_were(live: LiveIndex) -> None:
    store, given = UltraRAGVectorStore(live), every_kind()
    assert store.add(given) == [node.node_id for node in given]
    for node, found in zip(given, store.get_nodes([node.node_id for node in given]), strict=True):
        assert type(found) is type(node)
        assert found == node
        assert (found.hash, found.ref_doc_id, found.node_id) == (node.hash, node.ref_doc_id, node.node_id)
        assert list(found.metadata) == list(node.metadata)


def test_what_is_encoded_is_what_llamaindex_embeds(live: LiveIndex) -> None:
    node = every_kind()[0]
    UltraRAGVectorStore(live).add([node])
    held = live.get("text")
    assert held is not None
    assert held.text == node.get_content(metadata_mode=MetadataMode.EMBED)
    assert "b=" not in held.text
    assert "a=" in held.text


def test_values_that_json_lacks_become_what_filters_understand(live: LiveIndex) -> None:
    store = UltraRAGVectorStore(live)
    told = {"day": date(2024, 5, 1), "path": Path("a/b"), "n": np.int64(3), "pair": (1, 2)}
    store.add([TextNode(text="A text.", id_="x", metadata=told)])
    assert store.get_nodes()[0].metadata == {"day": "2024-05-01", "path": "a/b", "n": 3, "pair": [1, 2]}
    assert live.count({"day": {"gte": "2024-01-01"}}) == 1
    with pytest.raises(DataError, match=r"node 'y'.*score"):
        store.add([TextNode(text="A text.", id_="y", metadata={"score": float("nan")})])


def test_metadata_that_the_index_updates_is_the_nodes(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    live.update({"lang": "de"}, {"title": None, "state": "read"})
    assert store.get_nodes(["n4"])[0].metadata == {"lang": "de", "day": "2024-05-01", "state": "read"}


def test_passages_of_other_origin_are_nodes_too(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    live.add([{"id": "plain", "title": "Head", "text": "Body.", "metadata": {"lang": "fr"}}])
    assert store.get_nodes(["plain"]) == [TextNode(id_="plain", text="Head\nBody.", metadata={"lang": "fr"})]


def test_a_node_replaces_the_one_of_its_id(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    store.add([TextNode(id_="n1", text="Another text.")])
    assert (len(live), store.get_nodes(["n1"])[0].text) == (4, "Another text.")
    store.add([TextNode(id_="n1", text="A third.")], on_existing="skip")
    assert store.get_nodes(["n1"])[0].text == "Another text."
    with pytest.raises(UsageError, match="add has no argument 'batch'"):
        store.add([], batch=3)


def test_nodes_of_which_some_bring_vectors_are_one_write(
    store: UltraRAGVectorStore, live: LiveIndex, embed_model: UltraRAGEmbedding
) -> None:
    """They come in their order, the last of one id counts, and "fail" adds all or none."""
    brought = TextNode(id_="brought", text="Brought.", embedding=embed_model.get_text_embedding("Brought."))
    with pytest.raises(ExistsError):
        store.add([brought, TextNode(id_="n1", text="There already.")], on_existing="fail")
    assert len(live) == 4
    store.add([TextNode(id_="brought", text="Earlier."), brought, TextNode(id_="after", text="After.")])
    assert [node.node_id for node in store.get_nodes()] == ["n1", "n2", "n3", "n4", "brought", "after"]
    assert store.get_nodes(["brought"])[0].text == "Brought."
    store.add([TextNode(id_="twice", text="First."), brought.model_copy(update={"id_": "twice"})], on_existing="skip")
    assert store.get_nodes(["twice"])[0].text == "First."


@pytest.mark.parametrize("document", [None, "", ["d1"]])
def test_delete_takes_the_id_of_a_document(store: UltraRAGVectorStore, live: LiveIndex, document: Any) -> None:
    """No id is not every passage that is no node."""
    live.add([{"id": "plain", "text": "Added without LlamaIndex."}])
    with pytest.raises(UsageError, match="ref_doc_id is"):
        store.delete(document)
    with pytest.raises(UsageError, match="ref_doc_id is"):
        asyncio.run(store.adelete(document))
    assert len(live) == 5


def test_delete_takes_the_nodes_of_a_document(store: UltraRAGVectorStore) -> None:
    store.delete("d1")
    assert [node.node_id for node in store.get_nodes()] == ["n3", "n4"]
    store.delete("nothing of this name")
    store.add([Document(id_="alone", text="A document that was not split.")])
    store.delete("alone")
    assert len(store.get_nodes()) == 2


def test_delete_nodes_by_ids_by_filters_and_by_both(store: UltraRAGVectorStore) -> None:
    store.delete_nodes(["n1", "n4", "nobody"], OPERA)
    assert [node.node_id for node in store.get_nodes()] == ["n1", "n2", "n3"]
    store.delete_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="year", value=2019, operator="==")]))
    store.delete_nodes(["n3"])
    assert [node.node_id for node in store.get_nodes()] == ["n1"]
    with pytest.raises(UsageError, match="clear deletes everything"):
        store.delete_nodes()


def test_get_nodes_and_clear(store: UltraRAGVectorStore) -> None:
    assert [node.node_id for node in store.get_nodes()] == ["n1", "n2", "n3", "n4"]
    assert [node.node_id for node in store.get_nodes(["n4", "nobody", "n1"])] == ["n4", "n1"]
    assert [node.node_id for node in store.get_nodes(filters=OPERA)] == ["n4"]
    assert store.get_nodes([]) == []
    store.clear()
    assert store.get_nodes() == []
    assert store.query(asked("anything")).ids == []


def test_default_is_dense(store: UltraRAGVectorStore, live: LiveIndex) -> None:
    text = nodes()[2].get_content(metadata_mode=MetadataMode.EMBED)
    found = store.query(asked(text))
    hits = live.search(text, 2, heads=["dense"])
    assert (found.ids, found.similarities) == ([hit.id for hit in hits], [hit.score for hit in hits])
    assert found.ids[0] == "n3"
    assert (found.nodes or [])[0] == nodes()[2]


@pytest.mark.parametrize("mode", ["text_search", "sparse"])
def test_words_are_searched_by_bm25(store: UltraRAGVectorStore, live: LiveIndex, mode: str) -> None:
    found = store.query(asked("library for similarity", mode=VectorStoreQueryMode(mode)))
    assert found.ids == ["n2"]
    assert found.similarities == [live.search("library for similarity", heads=["bm25"])[0].score]


def test_sparse_is_the_models_lexical_head_where_it_is_stored(tmp_path: Path, tiny: Any) -> None:
    with LiveIndex.create(tmp_path / "m3", tiny, backend="numpy", bm25=False) as whole:
        store = UltraRAGVectorStore(whole)
        store.add(nodes())
        found = store.query(asked("vector database", mode=VectorStoreQueryMode.SPARSE))
        assert found.similarities == [hit.score for hit in whole.search("vector database", 2, heads=["sparse"])]
        hybrid = store.query(asked("vector database", mode=VectorStoreQueryMode.HYBRID))
        assert hybrid.ids == [h.id for h in whole.search("vector database", 2, weights={"dense": 0.5, "sparse": 0.5})]
        with pytest.raises(UsageError, match="the index has no head 'bm25'"):
            store.query(asked("vector database", mode=VectorStoreQueryMode.TEXT_SEARCH))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0])
def test_hybrid_weighs_vectors_by_alpha(
    store: UltraRAGVectorStore, live: LiveIndex, embed_model: UltraRAGEmbedding, alpha: float | None, given: bool
) -> None:
    vector = embed_model.get_query_embedding("opera at eight") if given else None
    found = store.query(asked("opera at eight", mode=VectorStoreQueryMode.HYBRID, alpha=alpha, query_embedding=vector))
    share = 0.5 if alpha is None else alpha
    hits = live.search("opera at eight", 2, weights={"dense": share, "bm25": 1 - share})
    assert found.ids == [hit.id for hit in hits]
    assert found.similarities == pytest.approx([hit.score for hit in hits])


def test_hybrid_has_its_own_number_of_nodes(store: UltraRAGVectorStore) -> None:
    mode = VectorStoreQueryMode.HYBRID
    assert len(store.query(asked("opera", mode=mode, hybrid_top_k=3, sparse_top_k=10)).ids or []) == 3
    for wrong, said in ((2, "alpha is 2"), ("a", "alpha is 'a'; it must be from 0"), (float("nan"), "alpha is nan")):
        with pytest.raises(UsageError, match=said):
            store.query(asked("opera", mode=mode, alpha=wrong))


def test_semantic_hybrid_reranks(live: LiveIndex, cross_encoder: Any) -> None:
    store = UltraRAGVectorStore(live, reranker=cross_encoder)
    store.add(nodes())
    found = store.query(asked("opera", mode=VectorStoreQueryMode.SEMANTIC_HYBRID, similarity_top_k=4))
    texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in found.nodes or []]
    scores = cross_encoder.score([("opera", text) for text in texts])
    assert found.similarities == pytest.approx(sorted(scores, reverse=True))
    with pytest.raises(UsageError, match="give UltraRAGVectorStore a reranker"):
        UltraRAGVectorStore(live).query(asked("opera", mode=VectorStoreQueryMode.SEMANTIC_HYBRID))


def test_mmr_of_threshold_1_is_the_dense_order_and_of_0_is_not(store: UltraRAGVectorStore) -> None:
    store.add([TextNode(id_="twin", text=nodes()[0].get_content(metadata_mode=MetadataMode.EMBED))])
    text, mode = nodes()[0].get_content(metadata_mode=MetadataMode.EMBED), VectorStoreQueryMode.MMR
    assert store.query(asked(text, mode=mode), mmr_threshold=1.0).ids == store.query(asked(text)).ids
    assert {*(store.query(asked(text)).ids or [])} == {"n1", "twin"}
    diverse = store.query(asked(text, mode=mode, mmr_threshold=0.1)).ids or []
    assert len(diverse) == 2
    assert {*diverse} != {"n1", "twin"}
    assert store.query(asked(text, mode=mode), mmr_threshold=0.1, mmr_prefetch_k=2).ids is not None


@pytest.mark.parametrize("mode", ["svm", "logistic_regression", "linear_regression"])
def test_a_mode_that_is_not_served_is_refused_in_words(store: UltraRAGVectorStore, mode: str) -> None:
    with pytest.raises(UsageError, match=f"'{mode}' is not served.*semantic_hybrid, mmr"):
        store.query(asked("opera", mode=VectorStoreQueryMode(mode)))


@pytest.mark.parametrize("mode", ["default", "sparse", "hybrid", "text_search", "mmr"])
def test_node_ids_doc_ids_and_filters_narrow_every_mode(store: UltraRAGVectorStore, mode: str) -> None:
    text = "the opera begins with a library for die oper"

    def found(**fields: Any) -> set[str]:
        return {*(store.query(asked(text, mode=VectorStoreQueryMode(mode), similarity_top_k=9, **fields)).ids or [])}

    every = found()
    assert len(every) >= 3
    assert found(node_ids=["n2", "n3", "nobody"]) == {"n2", "n3"}
    assert found(node_ids=[], doc_ids=[]) == every
    assert found(doc_ids=["d1", "d3"]) == every - {"n3"}
    assert found(filters=OPERA) == {"n4"}
    assert found(filters=OPERA, doc_ids=["d1"]) == set()
    assert found(node_ids=["n2", "n4"], filters=OPERA) == {"n4"}


def test_options_of_the_search_go_through(store: UltraRAGVectorStore) -> None:
    assert store.query(asked("opera"), min_scores={"dense": 2.0}).ids == []
    with pytest.raises(UsageError, match="search has no argument 'candidate'"):
        store.query(asked("opera"), candidate=3)
    with pytest.raises(UsageError, match="output_fields"):
        store.query(asked("opera", output_fields=["text"]))
    with pytest.raises(UsageError, match="give query_str"):
        store.query(asked(mode=VectorStoreQueryMode.TEXT_SEARCH))


def test_a_vector_of_the_own_model_is_not_made_again(
    live: LiveIndex, embed_model: UltraRAGEmbedding, encoded: list[str]
) -> None:
    store, given = UltraRAGVectorStore(live), embed_model(nodes())
    assert len(encoded) == len(HELD)
    store.add(given)
    assert len(encoded) == len(HELD)
    assert live.vectors(["n3"]).dense[0].tolist() == given[2].embedding
    vector = embed_model.get_query_embedding("opera")
    assert (
        store.query(asked("opera", query_embedding=vector)).ids == store.query(asked(None, query_embedding=vector)).ids
    )
    assert len(encoded) == len(HELD) + 1


def test_a_vector_of_another_text_is_made_anew(live: LiveIndex, embed_model: UltraRAGEmbedding) -> None:
    store, node = UltraRAGVectorStore(live), nodes()[0]
    node.embedding = embed_model.get_text_embedding(node.text)  # without its metadata
    store.add([node])
    wanted = embed_model.get_text_embedding(node.get_content(metadata_mode=MetadataMode.EMBED))
    assert live.vectors(["n1"]).dense[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_vectors_that_lost_their_origin_are_compared(
    live: LiveIndex, embed_model: UltraRAGEmbedding, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultrarag.doors.llamaindex import made

    given = json.loads(json.dumps([node.embedding for node in embed_model(nodes())]))
    monkeypatch.setattr(made.made, "_held", made.Made()._held)  # as in another process
    store, kept = UltraRAGVectorStore(live), nodes()
    for node, vector in zip(kept, given, strict=True):
        node.embedding = vector
    store.add(kept)
    assert len(live) == 4
    query = given[1]
    assert store.query(asked(kept[1].get_content(metadata_mode=MetadataMode.EMBED), query_embedding=query)).ids
    with pytest.raises(FingerprintError, match="nothing tells which model made the query's vector"):
        store.query(asked(None, query_embedding=query))
    with pytest.raises(FingerprintError, match="not what the index's model makes of 'opera'"):
        store.query(asked("opera", query_embedding=query))


def test_another_models_vectors_are_refused_in_words(
    live: LiveIndex, other: Any, embed_model: UltraRAGEmbedding
) -> None:
    store, node, width = UltraRAGVectorStore(live), nodes()[0], len(embed_model.get_text_embedding("x"))
    cases = [
        ([0.5] * 1536, f"1536 wide, and the index's model makes {width}.*embed_model=UltraRAGEmbedding"),
        ([0.5] * width, "node 'n1' is not what the index's model makes of its text"),
        (UltraRAGEmbedding(encoder=other)([node])[0].embedding, f"made by the encoder {other.fingerprint[:12]}"),
    ]
    for vector, words in cases:
        node.embedding = vector
        with pytest.raises(FingerprintError, match=words):
            store.add([node])
        assert len(live) == 0
        with pytest.raises(FingerprintError, match=r"model|encoder"):
            store.query(asked("opera", query_embedding=vector))


def test_vectors_made_before_a_swap_are_made_anew(
    live: LiveIndex, embed_model: UltraRAGEmbedding, swapped: Any
) -> None:
    store, given = UltraRAGVectorStore(live), embed_model(nodes())
    plain = embed_model.get_query_embedding("opera")
    mean = embed_model.get_agg_embedding_from_queries(["opera", "an evening"])
    swapped()
    store.add(given)
    assert live.vectors(["n1"]).dense[0].tolist() != given[0].embedding
    assert store.query(asked("opera", query_embedding=plain)).ids == store.query(asked("opera")).ids
    new = embed_model.get_agg_embedding_from_queries(["opera", "an evening"])
    both = [store.query(asked("opera", query_embedding=vector)).similarities for vector in (mean, new)]
    assert both[0] == pytest.approx(both[1], abs=1e-5)


def test_an_index_with_several_heads_encodes_all_of_them(tmp_path: Path, tiny: Any) -> None:
    with LiveIndex.create(tmp_path / "m3", tiny, backend="numpy") as whole:
        store = UltraRAGVectorStore(whole)
        store.add(store.embed_model(nodes()))
        assert whole.vectors(["n1"]).heads == ("dense", "sparse", "colbert")


@pytest.mark.parametrize("head", ["sparse", "colbert"])
def test_an_index_that_stores_no_dense_vectors(tmp_path: Path, tiny: Any, head: str) -> None:
    """Its model may have them: what counts is what the index has."""
    with LiveIndex.create(tmp_path / "kb", tiny, heads=[head], backend="numpy") as live:
        store = UltraRAGVectorStore(live)
        store.add(nodes())
        assert UltraRAGRetriever(live, 1).retrieve("opera eight")[0].node.node_id in {"n1", "n2", "n3", "n4"}
        with pytest.raises(UsageError, match=f"is dense, and the index has {head}"):
            store.add(nodes(embedding=[0.1] * 8))
        with pytest.raises(UsageError, match=f"is dense, and the index has {head}"):
            store.query(asked("opera", query_embedding=[0.1] * 8))


def test_async_twins(store: UltraRAGVectorStore) -> None:
    async def use() -> None:
        assert await store.async_add([TextNode(id_="n5", text="A fifth.")]) == ["n5"]
        assert (await store.aquery(asked("opera"))).ids == store.query(asked("opera")).ids
        assert await store.aget_nodes(filters=OPERA) == store.get_nodes(filters=OPERA)
        await store.adelete("d1")
        await store.adelete_nodes(["n5"])
        assert [node.node_id for node in await store.aget_nodes()] == ["n3", "n4"]
        await store.aclear()
        assert await store.aget_nodes() == []

    asyncio.run(use())


def test_it_is_made_again_from_what_it_says_of_itself(tmp_path: Path, tiny: Any) -> None:
    LiveIndex.create(tmp_path / "kb", tiny, heads=["dense"], backend="numpy").close()
    store = UltraRAGVectorStore(tmp_path / "kb")
    store.add(nodes())
    again = UltraRAGVectorStore.from_dict(json.loads(json.dumps(store.to_dict())))
    assert again.get_nodes() == store.get_nodes()
    assert UltraRAGVectorStore.from_json(again.to_json()).query(asked("opera")).ids
    again.close()
    assert store.get_nodes(["n1"])
    with pytest.raises(UsageError, match="give a LiveIndex, or the folder of one"):
        UltraRAGVectorStore()
    with pytest.raises(ValueError, match="collection_name"):
        UltraRAGVectorStore(tmp_path / "kb", collection_name="x")
    store.close()
