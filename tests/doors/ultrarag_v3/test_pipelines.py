"""UltraRAG's own example pipelines, by its own build and run: deployed search, its openai backends, our MCP servers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.doors.ultrarag_v3 import world
from tests.service.running import Running
from ultrarag.retrieve import LiveIndex

OURS = {"retriever": "live_retriever", "reranker": "live_reranker"}
MOON = world.CORPUS[0]["contents"]
#: The texts that answer the ten questions of its data/sample_nq_10.jsonl.
ANSWERS = [world.CORPUS[n]["contents"] for n in (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)]


def writer(model: world.Model) -> dict[str, Any]:
    """Parameters of its prompt and generation servers, for the stand-in."""
    openai = {"base_url": model.url, "retries": 1}
    return {
        "prompt": {"template": "prompt/qa_rag_boxed.jinja"},
        "generation": {"backend": "openai", "backend_configs": {"openai": openai}},
    }


def firsts(found: Mapping[str, Any], name: str = "ret_psg") -> list[str]:
    return [texts[0] for texts in found[name]]


def test_zero_code(ultrarag: world.Ultrarag, service: Running) -> None:
    """Its retriever asks the service by retriever_deploy_search."""
    file = ultrarag.example("experiments/deploy_corpus_search")
    found = ultrarag.run(ultrarag.built(file, {"retriever": {"retriever_url": service.url}}))
    assert firsts(found) == ANSWERS


def test_our_server(ultrarag: world.Ultrarag) -> None:
    """And its errors, which reach whoever runs the pipeline in words."""
    file = ultrarag.example("experiments/corpus_search", OURS)
    assert firsts(ultrarag.run(ultrarag.built(file, {}))) == ANSWERS
    ultrarag.built(file, {"retriever": {"backend_configs": {"ultrarag": {"filter": {"year": {"over": 1}}}}}})
    assert "'year' has the unknown bound 'over'" in unwrapped(ultrarag.call("run", file, fails=True))


def unwrapped(said: str) -> str:
    """Its log, of which a terminal's lines are made one."""
    return " ".join(said.split())


@pytest.mark.long
def test_zero_code_with_an_answer(ultrarag: world.Ultrarag, service: Running, model: world.Model) -> None:
    file = ultrarag.example("experiments/rag_deploy")
    parameters = {"retriever": {"retriever_url": service.url}, **writer(model)}
    found = ultrarag.run(ultrarag.built(file, parameters))
    assert firsts(found) == ANSWERS
    assert found["eval_res"]["avg_coverem"] == 1.0, "the golden answer is in every one"


@pytest.mark.long
def test_its_openai_backends(ultrarag: world.Ultrarag, service: Running, tmp_path: Path) -> None:
    """It embeds its corpus by /v1/embeddings, searches with faiss, and reranks by /v1/rerank."""
    model = service.live.fingerprint
    embedding = {"model_name": model, "base_url": f"{service.url}/v1", "api_key": "any"}
    index = {"index_use_gpu": False, "index_path": str(tmp_path / "index.index")}
    parameters = {
        "retriever": {
            "backend": "openai",
            "backend_configs": {"openai": embedding},
            "index_backend_configs": {"faiss": index},
            "embedding_path": str(tmp_path / "embedding.npy"),
            "corpus_path": str(world.write_corpus(tmp_path / "corpus.jsonl")),
        },
        "reranker": {
            "backend": "openai",
            "backend_configs": {"openai": {**embedding, "base_url": f"{service.url}/v1/rerank"}},
            "top_k": 1,
        },
    }
    file = ultrarag.built(ultrarag.example("experiments/corpus_rerank", {"retriever": "retriever"}), parameters)
    found = ultrarag.run(file)
    assert firsts(found) == ANSWERS
    assert found["rerank_psg"] == [[text] for text in ANSWERS]
    parameters["retriever"]["backend_configs"]["openai"]["model_name"] = "0123456789abcdef"
    ultrarag.built(file, parameters)
    said = unwrapped(ultrarag.call("run", file, fails=True))
    assert "the request names the model 0123456789ab" in said


@pytest.fixture
def empty(tmp_path: Path, encoder) -> Iterator[Running]:
    running = Running(LiveIndex.create(tmp_path / "empty", encoder, backend="numpy"), weights={"dense": 1.0})
    yield running
    running.stop()


@pytest.mark.long
def test_our_servers_add_and_rerank(ultrarag: world.Ultrarag, empty: Running, tmp_path: Path) -> None:
    """From an empty index, and UltraRAG's own example corpus, which repeats ids."""
    parameters = {
        "retriever": {"backend_configs": {"ultrarag": {"url": empty.url}}},
        "reranker": {"backend_configs": {"ultrarag": {"url": empty.url}}, "top_k": 2},
    }
    file = ultrarag.example("experiments/corpus_rerank", OURS)
    found = ultrarag.run(ultrarag.built(file, parameters))
    lines = (ultrarag.folder / "data" / "corpus_example.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(empty.live) == len(lines) == 5
    assert sum("#2" in passage.id for passage in empty.live.passages()) == 2
    assert [len(texts) for texts in found["rerank_psg"]] == [2] * 10


@pytest.mark.long
def test_words(ultrarag: world.Ultrarag) -> None:
    found = ultrarag.run(ultrarag.built(ultrarag.example("experiments/bm25_search", OURS), {}))
    assert sum(first == answer for first, answer in zip(firsts(found), ANSWERS, strict=True)) >= 9


@pytest.mark.long
@pytest.mark.parametrize("name", ["demos/RAG", "experiments/vanilla_rag", "experiments/iterretgen"])
def test_answers(ultrarag: world.Ultrarag, model: world.Model, name: str) -> None:
    """Search, prompt, answer; with citations, with an evaluation, and again with the answer as the query."""
    file = ultrarag.example(name, {"retriever": "live_retriever"})
    found = ultrarag.run(ultrarag.built(file, writer(model)))
    assert all(answer in first for answer, first in zip(ANSWERS, firsts(found), strict=True))
    assert MOON in found["ans_ls"][0]
    if name != "demos/RAG":
        assert found["eval_res"]["avg_coverem"] == 1.0


@pytest.mark.long
@pytest.mark.parametrize("name", ["experiments/rag_loop", "experiments/rag_branch"])
def test_answers_that_search_again(ultrarag: world.Ultrarag, model: world.Model, name: str) -> None:
    """The model asks for more, in a loop and in a branch: the answer to that is among the passages then.

    One question: where some of several take a branch and others do not, UltraRAG 0.3.0.2 stops with "Router sub_list
    length > expected matches".
    """
    file = ultrarag.example(name, {"retriever": "live_retriever"})
    parameters = {"benchmark": {"benchmark": {"limit": 1}}, **writer(model)}
    found = ultrarag.run(ultrarag.built(file, parameters))
    assert all(world.SUB_ANSWER in prompt for prompt in found["prompt_ls"])
    assert MOON in found["ans_ls"][0]
