"""Embedding model: queries, texts, batches, async, swaps, and what LlamaIndex does with it"""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import MockEmbedding, Settings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.storage.kvstore import SimpleKVStore

from tests.doors.llamaindex.conftest import nodes
from ultrarag.doors.llamaindex import UltraRAGEmbedding, UltraRAGRetriever, UltraRAGVectorStore
from ultrarag.errors import IndexStateError, UsageError
from ultrarag.retrieve import LiveIndex

TEXTS = [f"text number {number} of several" for number in range(7)]


def test_vectors_are_those_of_the_encoder(embed_model: UltraRAGEmbedding, tiny: Any) -> None:
    assert isinstance(embed_model, BaseEmbedding)
    wanted = tiny.encode(TEXTS, "passage", heads=["dense"]).dense
    assert embed_model.get_text_embedding_batch(TEXTS) == [pytest.approx(list(row), abs=1e-6) for row in wanted]
    assert embed_model.get_text_embedding_batch([]) == []
    query = tiny.encode(["opera"], "query", heads=["dense"]).dense[0]
    assert embed_model.get_query_embedding("opera") == pytest.approx(list(query), abs=1e-6)
    assert embed_model.get_text_embedding(TEXTS[0]) == pytest.approx(list(wanted[0]), abs=1e-6)


def test_queries_have_the_instruction_of_queries(tiny_m3: str) -> None:
    from ultrarag import Encoder

    told = UltraRAGEmbedding(encoder=Encoder.load(tiny_m3, "bgem3", device="cpu", query_instruction="Find: "))
    assert told.get_query_embedding("opera") != told.get_text_embedding("opera")
    assert told.get_query_embedding("opera") == pytest.approx(told.get_text_embedding("Find: opera"), abs=1e-6)


def test_batches_are_of_the_size_asked_for(live: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = UltraRAGEmbedding._get_text_embeddings
    monkeypatch.setattr(
        UltraRAGEmbedding, "_get_text_embeddings", lambda self, texts: sizes.append(len(texts)) or real(self, texts)
    )
    UltraRAGEmbedding(live, embed_batch_size=3).get_text_embedding_batch(TEXTS)
    assert sizes == [3, 3, 1]


def test_async_gives_the_same(live: LiveIndex, tiny: Any) -> None:
    async def use(model: UltraRAGEmbedding) -> None:
        assert await model.aget_query_embedding("opera") == model.get_query_embedding("opera")
        assert await model.aget_text_embedding(TEXTS[0]) == pytest.approx(model.get_text_embedding(TEXTS[0]), abs=1e-6)
        many, again = await model.aget_text_embedding_batch(TEXTS), model.get_text_embedding_batch(TEXTS)
        assert many == [pytest.approx(row, abs=1e-6) for row in again]
        agg = await model.aget_agg_embedding_from_queries(["opera", "evening"])
        assert agg == pytest.approx(model.get_agg_embedding_from_queries(["opera", "evening"]), abs=1e-6)

    for model in (UltraRAGEmbedding(live, embed_batch_size=2), UltraRAGEmbedding(encoder=tiny)):
        asyncio.run(use(model))


def test_the_mean_of_several_queries_is_what_llamaindex_makes(embed_model: UltraRAGEmbedding) -> None:
    queries = ["opera", "an evening", "a third"]
    base = BaseEmbedding.get_agg_embedding_from_queries(embed_model, queries)
    assert embed_model.get_agg_embedding_from_queries(queries) == pytest.approx(base, abs=1e-6)
    first = embed_model.get_agg_embedding_from_queries(queries, agg_fn=lambda vectors: vectors[0])
    assert first == pytest.approx(embed_model.get_query_embedding("opera"), abs=1e-6)


def test_it_follows_a_swap_and_no_cache_outlives_it(embed_model: UltraRAGEmbedding, other: Any, swapped: Any) -> None:
    before, key = embed_model.get_text_embedding("opera"), get_transformation_hash(nodes(), embed_model)
    swapped()
    assert embed_model.fingerprint == other.fingerprint == embed_model.to_payload()["fingerprint"]
    after = embed_model.get_text_embedding("opera")
    assert after != before
    assert after == pytest.approx(UltraRAGEmbedding(encoder=other).get_text_embedding("opera"), abs=1e-6)
    assert get_transformation_hash(nodes(), embed_model) != key
    with pytest.raises(UsageError, match="embeddings_cache"):
        UltraRAGEmbedding(encoder=other, embeddings_cache=SimpleKVStore())


def test_it_is_made_again_from_what_it_says_of_itself(live: LiveIndex, checkpoint: Path) -> None:
    over_one = UltraRAGEmbedding(encoder=checkpoint, embed_batch_size=3)
    for again in (
        UltraRAGEmbedding.from_dict(json.loads(json.dumps(over_one.to_dict()))),
        pickle.loads(pickle.dumps(over_one)),
    ):
        assert (again.fingerprint, again.embed_batch_size) == (over_one.fingerprint, 3)
    told = UltraRAGEmbedding(live).to_dict()
    assert (told["path"], told["fingerprint"]) == (str(live.path), live.fingerprint)
    live.close()
    again = UltraRAGEmbedding.from_dict(told)
    assert again.get_query_embedding("opera")
    again.close()


def test_over_an_open_index_it_stays_in_its_process(embed_model: UltraRAGEmbedding) -> None:
    with pytest.raises(UsageError, match="without num_workers"):
        pickle.dumps(embed_model)
    with pytest.raises(IndexStateError, match="cannot be pickled or copied"):
        copy.deepcopy(embed_model)
    assert embed_model.model_copy().get_query_embedding("opera") == embed_model.get_query_embedding("opera")


def test_it_may_be_the_setting(embed_model: UltraRAGEmbedding) -> None:
    Settings.embed_model = embed_model
    try:
        assert Settings.embed_model is embed_model
    finally:
        Settings.embed_model = MockEmbedding(embed_dim=1)


def test_it_is_made_over_one_thing(live: LiveIndex, tiny: Any) -> None:
    for given in ({}, {"source": live, "encoder": tiny}):
        with pytest.raises(UsageError, match="name one"):
            UltraRAGEmbedding(**given)
    with pytest.raises(UsageError, match="not Encoder"):
        UltraRAGEmbedding(tiny)
    with pytest.raises(IndexStateError, match=r"for a model alone: UltraRAGEmbedding\(encoder='no/such'\)"):
        UltraRAGEmbedding("no/such")
    with pytest.raises(ValueError, match="batch_size"):
        UltraRAGEmbedding(live, batch_size=3)


def test_all_parts_share_an_index_by_its_folder(tmp_path: Path, tiny: Any) -> None:
    LiveIndex.create(tmp_path / "kb", tiny, heads=["dense"], backend="numpy").close()
    store, model = UltraRAGVectorStore(tmp_path / "kb"), UltraRAGEmbedding(tmp_path / "kb")
    store.add(model(nodes()))
    retriever = UltraRAGRetriever(str(tmp_path / "kb"))
    store.close()
    model.close()
    assert retriever.retrieve("opera")
    retriever.close()
    LiveIndex.open(tmp_path / "kb").close()
