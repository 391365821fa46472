"""door: metadata, local tasks, symmetric texts, and the command"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from ultrarag import Encoder
from ultrarag.cli import main
from ultrarag.doors.mteb import MtebEncoder, MtebReranker, MtebSearch, beir_task
from ultrarag.doors.mteb.search import told_apart
from ultrarag.errors import DataError, FingerprintError, UsageError
from ultrarag.evaluation import write_beir
from ultrarag.retrieve import LiveIndex
from ultrarag.types import Passage

TASK = SimpleNamespace(name="Mine", prompt={"query": "Find the answer:"})


def encoded(model: MtebEncoder, batch: dict[str, Any], prompt_type: PromptType | None) -> np.ndarray:
    return model.encode([batch], task_metadata=TASK, hf_split="test", hf_subset="default", prompt_type=prompt_type)


def test_the_metadata_is_what_is_known(encoder: Encoder, reranker: Encoder) -> None:
    meta = MtebEncoder(encoder, name="me/model").mteb_model_meta
    assert (meta.name, meta.revision, meta.embed_dim) == ("me/model", encoder.fingerprint, encoder.dim)
    assert meta.max_tokens == encoder.max_length("passage")
    assert meta.similarity_fn_name == ScoringFunction.COSINE
    assert meta.n_parameters == sum(weight.numel() for weight in encoder.model.parameters())
    assert (meta.license, meta.languages, meta.training_datasets, meta.release_date) == (None, None, None, None)
    assert MtebReranker(reranker).mteb_model_meta.is_cross_encoder
    hybrid = MtebSearch(encoder, weights={"dense": 1, "bm25": 0.5}).mteb_model_meta
    assert (hybrid.model_type, hybrid.revision) == (["hybrid"], encoder.fingerprint)
    other = MtebSearch(encoder, weights={"dense": 1, "bm25": 0.7}).mteb_model_meta
    assert hybrid.experiment_name != other.experiment_name  # so MTEB keeps their results apart


def test_results_in_another_precision_are_kept_apart(encoder: Encoder) -> None:
    other = copy.copy(encoder)
    other.precision = "int8:0123"
    metas = [MtebEncoder(held, task_prompts=prompts).mteb_model_meta for held in (encoder, other) for prompts in (0, 1)]
    assert [meta.experiment_kwargs for meta in metas] == [
        None,
        {"task_prompts": True},
        {"precision": "int8-0123"},
        {"precision": "int8-0123", "task_prompts": True},
    ]
    assert {meta.revision for meta in metas} == {encoder.fingerprint}


def test_a_revision_is_a_fingerprint(encoder: Encoder) -> None:
    MtebEncoder(encoder, encoder.fingerprint[:12])
    with pytest.raises(FingerprintError, match=r"has the fingerprint \w+, not 0123"):
        MtebEncoder(encoder, "0123")


def test_queries_documents_and_symmetric_texts_are_read_as_such(minilm: str) -> None:
    encoder = Encoder.load(minilm, "bge", device="cpu", query_instruction="query: ", passage_instruction="passage: ")
    model = MtebEncoder(encoder)
    assert model.mteb_model_meta.use_instructions
    for kind, prompt_type in (("query", PromptType.query), ("passage", PromptType.document), ("text", None)):
        ours = encoder.encode(["what is milvus?"], kind).dense
        np.testing.assert_array_equal(encoded(model, {"text": ["what is milvus?"]}, prompt_type), ours)
    document = {"text": ["Milvus It is a database."], "title": ["Milvus"], "body": ["It is a database."]}
    ours = encoder.encode(["Milvus\nIt is a database."], "passage").dense
    np.testing.assert_array_equal(encoded(model, document, PromptType.document), ours)
    asked = MtebEncoder(encoder, task_prompts=True)
    ours = encoder.encode(["what is milvus?"], "query", instruction="Find the answer:").dense
    np.testing.assert_array_equal(encoded(asked, {"text": ["what is milvus?"]}, PromptType.query), ours)


def test_two_sides_compare_symmetric_texts_as_passages(minilm: str) -> None:
    plain = Encoder.load(minilm, "bge", device="cpu")
    model = MtebEncoder(Encoder.of_sides(plain, Encoder.load(minilm, "bge", device="cpu", query_instruction="q: ")))
    ours = plain.encode(["a text"], "passage").dense
    np.testing.assert_allclose(encoded(model, {"text": ["a text"]}, None), ours, atol=1e-6)


def test_a_model_without_dense_vectors_is_sent_elsewhere(reranker: Encoder) -> None:
    with pytest.raises(UsageError, match="MtebReranker for a cross-encoder"):
        MtebEncoder(reranker)


def test_a_local_task_knows_its_files(folder: Path, tmp_path: Path) -> None:
    task = beir_task(folder)
    assert (task.metadata.name, task.metadata.type) == ("small", "Retrieval")
    again = beir_task(folder, name="Other", candidates={f"q{n}": ["p1"] for n in range(20)})
    assert (again.metadata.name, again.metadata.type) == ("Other", "Reranking")
    assert again.metadata.dataset["revision"] == task.metadata.dataset["revision"]
    with pytest.raises(UsageError, match="19 of 20 queries have no candidates, 'q1' for one"):
        beir_task(folder, candidates={"q0": ["p1"]})
    with pytest.raises(DataError, match="the splits there are: test"):
        beir_task(folder, "dev")
    with pytest.raises(UsageError, match="MTEB takes no such task"):
        beir_task(folder, languages=["English"])


def test_an_index_must_hold_the_corpus(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    with LiveIndex.create(tmp_path / "kb", encoder, backend="numpy") as live:
        live.add([{"id": "p1", "text": "Another text."}])
        with pytest.raises(UsageError, match=r"does not hold the task's corpus of 80 documents \('p0' of the corpus"):
            mteb.evaluate(MtebSearch(live, heads=["dense"]), beir_task(folder), cache=None)


def test_blank_documents_are_left_out_and_counted(encoder: Encoder, caplog: Any) -> None:
    from datasets import Dataset

    corpus = Dataset.from_list([{"id": "a", "text": "A text."}, {"id": "b", "text": " "}])
    model = MtebSearch(encoder, heads=["dense"], backend="numpy")
    model.index(corpus)
    assert "1 blank documents of 2 are left out" in caplog.text
    asked = Dataset.from_list([{"id": "q", "text": "text"}])
    task = beir_task_metadata()
    found = model.search(asked, task_metadata=task, top_k=10, top_ranked={"q": ["b", "a"]})
    assert list(found["q"]) == ["a"]
    assert list(model.search(asked, task_metadata=task, top_k=10)["q"]) == ["a"]


def beir_task_metadata() -> Any:
    from mteb.mocks.mock_tasks import MockRetrievalTask

    return MockRetrievalTask.metadata


def test_scores_that_float32_cannot_tell_apart_keep_their_order() -> None:
    import pytrec_eval

    scores = {"a": 0.7000000001, "b": 0.7, "c": 0.7, "d": 0.1}
    judge = pytrec_eval.RelevanceEvaluator({"q": {"a": 1}}, {"recip_rank"})
    assert judge.evaluate({"q": scores})["q"]["recip_rank"] < 1  # which is why
    apart = told_apart(scores)
    assert judge.evaluate({"q": apart})["q"]["recip_rank"] == 1
    assert apart["b"] == apart["c"] < apart["a"]
    assert apart == pytest.approx(scores)


@pytest.fixture
def command(folder: Path, tiny_m3: str, capsys: Any, monkeypatch: Any) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*words: str, model: str = tiny_m3) -> tuple[int, str, str]:
        status = main(["evaluate", model, "--device", "cpu", *words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command_evaluates_a_folder(command: Any, folder: Path, tmp_path: Path) -> None:
    words = ["--adapter", "bgem3", "--mteb", "--data", str(folder), "--output", str(tmp_path / "results"), "--json"]
    status, out, _ = command(*words)
    found = json.loads(out)
    (row,) = found["results"]
    assert (status, row["task"], row["metric"]) == (0, "small", "ndcg_at_10")
    assert row["main_score"] == row["scores"]["ndcg_at_10"]
    kept = list((tmp_path / "results").rglob("small.json"))
    assert [file.parent.name for file in kept] == [found["revision"]]
    status, out, _ = command(*words[:-1])
    assert f"{row['main_score']:.5f}" in out
    assert out.startswith("local/model ")


def test_the_command_searches_and_reranks(command: Any, folder: Path, reranker: Encoder, tmp_path: Path) -> None:
    reranker.save(tmp_path / "reranker")
    words = ["--adapter", "bgem3", "--mteb", "--data", str(folder), "--weights", "dense=1,bm25=0.5", "--json"]
    status, out, _ = command(*words, "--backend", "numpy", "--reranker", str(tmp_path / "reranker"), "--depth", "20")
    assert status == 0
    assert json.loads(out)["results"][0]["main_score"] > 0


def test_the_command_says_what_is_wrong(command: Any, folder: Path) -> None:
    assert command("--mteb")[0] == 2
    status, _, err = command("--mteb", "SciFactt")
    assert status == 2
    assert "Did you mean: 'SciFact'" in err
    status, out, err = command("--adapter", "bgem3", "--mteb", "SciFact", "--data", str(folder))
    assert status == 1
    assert "1 of 2 tasks failed: SciFact: " in err
    assert "small" in out


def test_the_example_of_the_page(encoder: Encoder, reranker: Encoder, tmp_path: Path, monkeypatch: Any) -> None:
    page = (Path(__file__).parents[3] / "docs" / "doors.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", page.partition("\n## MTEB\n")[2], flags=re.S)[0]
    passages = [Passage("p1", "A vector database."), Passage("p2", "An opera."), Passage("p3", "A search index.")]
    qrels = {"test": {"q1": {"p1": 1}, "q2": {"p3": 1}}}
    write_beir(tmp_path / "data" / "beir", passages, {"q1": "vectors", "q2": "search"}, qrels)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/doors.md", "exec"), {"encoder": encoder, "reranker": reranker})
