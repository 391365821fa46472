"""Clients of other products, as they are installed, against the service."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from tests.service.running import Running

TEXTS = ["Milvus is a vector database.", "Ein Apfel ist rot.", "Qdrant stores vectors."]
QUERY = "which database holds vectors?"


@pytest.fixture
def openai(served: Running):
    from openai import OpenAI

    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openai_embeds(served: Running, openai, options) -> None:
    found = openai.embeddings.create(model=served.live.fingerprint, input=TEXTS, **options)
    rows = [row.embedding for row in found.data]
    if options.get("encoding_format") == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    wanted = served.live.encoder.encode(TEXTS).dense
    np.testing.assert_allclose(np.array(rows), wanted, atol=1e-5)
    assert found.model == served.live.fingerprint
    assert found.usage.prompt_tokens == sum(map(len, served.live.encoder.tokenize(TEXTS, "passage").ids))


def test_openai_lists_models_and_may_shorten_or_leave_out_a_name(served: Running, openai) -> None:
    assert served.live.fingerprint in [model.id for model in openai.models.list()]
    assert openai.models.retrieve("my-model").id == "my-model"
    for name in (served.live.fingerprint[:12], "default", "my-model"):
        assert openai.embeddings.create(model=name, input="x").data


def test_openai_is_refused_another_models_vectors(served: Running, openai) -> None:
    from openai import BadRequestError, ConflictError, NotFoundError

    with pytest.raises(ConflictError, match="the live one is"):
        openai.embeddings.create(model="0123456789abcdef", input="x")
    with pytest.raises(NotFoundError, match="there is no model 'text-embedding-3-small'"):
        openai.embeddings.create(model="text-embedding-3-small", input="x")
    with pytest.raises(BadRequestError, match="check_embedding_ctx_length"):
        openai.embeddings.create(model="default", input=[[1, 2, 3]])
    with pytest.raises(BadRequestError, match="vectors have 384"):
        openai.embeddings.create(model="default", input="x", dimensions=128)
    with pytest.raises(BadRequestError, match="input_type is 'image'"):
        openai.embeddings.create(model="default", input="x", extra_body={"input_type": "image"})


@pytest.fixture
def best(served: Running) -> list[int]:
    """The order of the texts by the encoder itself."""
    encoder = served.live.encoder
    return np.argsort(-encoder.similarity(encoder.encode([QUERY], "query"), encoder.encode(TEXTS))[0]).tolist()


def test_cohere_reranks_by_both_versions(served: Running, best) -> None:
    import cohere
    import httpx

    for kind in (cohere.Client, cohere.ClientV2):
        with httpx.Client() as http:
            rerank_by(kind("none", base_url=served.url, httpx_client=http), served, best)


def rerank_by(client, served: Running, best) -> None:
    from cohere.core import ApiError

    found = client.rerank(model=served.live.fingerprint, query=QUERY, documents=TEXTS, top_n=2)
    assert [result.index for result in found.results] == best[:2]
    assert found.results[0].relevance_score > found.results[1].relevance_score
    with pytest.raises(ApiError, match="the live one is") as refused:
        client.rerank(model="0123456789abcdef", query=QUERY, documents=TEXTS)
    assert refused.value.status_code == 409


def test_jina_and_vllm_shapes(served: Running, best) -> None:
    body = {"model": "default", "query": QUERY, "documents": [{"text": text} for text in TEXTS], "top_n": 1}
    for path in ("/v1/rerank", "/rerank"):
        found = served.post(path, body).json()
        assert found["results"][0]["index"] == best[0]
        assert found["results"][0]["document"] == {"text": TEXTS[best[0]]}
        assert found["usage"]["total_tokens"] > 0
    assert "document" not in served.post("/v2/rerank", body).json()["results"][0]


def test_hugging_face_against_teis_endpoints(served: Running, best, monkeypatch) -> None:
    from huggingface_hub import InferenceClient, close_session, constants

    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)  # loopback is no network
    with InferenceClient(model=f"{served.url}/embed") as embed:
        found = embed.feature_extraction(TEXTS)
        asked = embed.feature_extraction(QUERY, prompt_name="query", normalize=True)
    np.testing.assert_allclose(found, served.live.encoder.encode(TEXTS).dense, atol=1e-5)
    np.testing.assert_allclose(asked, served.live.encoder.encode([QUERY], "query").dense, atol=1e-5)
    with InferenceClient(model=f"{served.url}/similarity") as compare:
        scores = compare.sentence_similarity(QUERY, other_sentences=TEXTS)
    assert np.argsort([-score for score in scores]).tolist() == best
    close_session()


def test_teis_other_requests(served: Running, best) -> None:
    ranked = served.post("/rerank", {"query": QUERY, "texts": TEXTS, "return_text": True}).json()
    assert [entry["index"] for entry in ranked] == best
    assert ranked[0]["text"] == TEXTS[best[0]]
    info = served.get("/info").json()
    assert info["model_sha"] == served.live.fingerprint
    assert info["max_input_length"] == 256
    long = served.post("/embed", {"inputs": "word " * 1000, "truncate": False})
    assert (long.status_code, long.json()["error_type"]) == (413, "TooLarge")
    assert served.post("/embed", {"inputs": "word " * 1000}).status_code == 200
    assert served.post("/embed", {"inputs": "x", "normalize": False}).json()["error"].startswith("normalize=false")
    assert served.post("/rerank", {"query": QUERY}).json()["error_type"] == "UsageError"


def test_a_cross_encoder_reranks_where_there_is_one(index, tmp_path) -> None:
    class Reranker:
        """Longer texts are better."""

        fingerprint = "f" * 64

        def score(self, pairs, normalize, progress):
            logits = np.array([len(text) for _, text in pairs], np.float32)
            return 1 / (1 + np.exp(-logits)) if normalize else logits

        def tokenize_pairs(self, pairs):
            from ultrarag.types import Tokens

            return Tokens([[1, 2, 3] for _ in pairs])

    running = Running(index, Reranker())
    try:
        found = running.post("/rerank", {"query": "x", "texts": ["a", "bb"], "raw_scores": True}).json()
        assert found == [{"index": 1, "score": 2.0}, {"index": 0, "score": 1.0}]
        named = running.post("/v1/rerank", {"model": "f" * 12, "query": "x", "documents": ["a", "bb"]}).json()
        assert named["model"] == "f" * 64
        assert 0 < named["results"][0]["relevance_score"] < 1
        assert named["usage"]["total_tokens"] == 6
        assert "f" * 64 in [model["id"] for model in running.get("/v1/models").json()["data"]]
    finally:
        running.stop()


def test_ultrarag_pipelines_get_texts(served: Running) -> None:
    asked = {"query_list": ["what is milvus?", "deep ocean"], "top_k": 1, "query_instruction": ""}
    assert served.post("/search", asked).json() == {
        "ret_psg": [["Milvus\nMilvus is a vector database."], ["The ocean is deep and blue."]]
    }
    instructed = served.post("/search", {"query_list": ["it?"], "top_k": 1, "query_instruction": "Milvus: "}).json()
    assert instructed["ret_psg"][0][0].startswith("Milvus")
