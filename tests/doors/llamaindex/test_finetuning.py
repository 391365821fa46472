"""Fine-tuning engine: LlamaIndex's questions refresh the index"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode

from tests.retrieve.refresh.refresh_worker import ARGUMENTS, IDS, QUERIES, TEXTS
from ultrarag.doors.llamaindex import UltraRAGFinetuneEngine, UltraRAGRetriever, UltraRAGVectorStore
from ultrarag.doors.llamaindex.finetuning import judged_by, training_rows
from ultrarag.errors import DataError, UsageError
from ultrarag.retrieve import LiveIndex

pytestmark = pytest.mark.usefixtures("quick_builds")

SETTINGS = {name: value for name, value in ARGUMENTS.items() if name != "unified_finetuning"}


@pytest.fixture
def live(tmp_path: Path, tiny_m3: str) -> Iterator[LiveIndex]:
    """Nodes of LlamaIndex's, over an encoder with a dense head alone."""
    from ultrarag import Encoder

    index = LiveIndex.create(tmp_path / "kb", Encoder.load(tiny_m3, "bge", device="cpu"), backend="numpy")
    UltraRAGVectorStore(index).add([TextNode(id_=IDS[text], text=text, metadata={"n": 1}) for text in TEXTS])
    yield index
    index.close()


def questions(**changes: Any) -> dict[str, Any]:
    """A data set as LlamaIndex makes it: a question about each text."""
    asked = {f"q{row}": f"what about {text}?" for row, text in enumerate(TEXTS)}
    relevant = {f"q{row}": [IDS[text]] for row, text in enumerate(TEXTS)}
    return {"queries": asked, "corpus": {IDS[text]: text for text in TEXTS}, "relevant_docs": relevant, **changes}


def test_a_finetune_swaps_what_every_part_answers_with(live: LiveIndex, tmp_path: Path) -> None:
    store = UltraRAGVectorStore(live)
    index = VectorStoreIndex.from_vector_store(store, embed_model=store.embed_model)
    before = UltraRAGRetriever(live, 1).retrieve(TEXTS[0])[0], index.as_retriever().retrieve(TEXTS[0])[0].score
    settings = {"cache_path": str(tmp_path / "cache"), "shared_eval_data": "warn", **SETTINGS}
    engine = UltraRAGFinetuneEngine(questions(), live, tmp_path / "out", val_dataset=questions(), **settings)
    with pytest.raises(UsageError, match="call finetune"):
        engine.get_finetuned_model()
    report = engine.finetune(effort="query", force=True)
    assert (report.outcome, report.old_generation, report.generation) == ("swapped", 1, 2)
    assert report.verdict is not None
    assert engine.get_finetuned_model().fingerprint == live.fingerprint == report.lineage["fingerprint"]
    after = UltraRAGRetriever(live, 1).retrieve(TEXTS[0])[0]
    assert (before[0].metadata["generation"], after.metadata["generation"]) == (1, 2)
    assert index.as_retriever().retrieve(TEXTS[0])[0].score != before[1]
    assert (tmp_path / "out" / "refresh.json").is_file()


def test_rows_are_of_the_texts_that_the_index_encodes(live: LiveIndex, tmp_path: Path) -> None:
    held = live.get(IDS[TEXTS[0]])
    assert held is not None
    assert held.text == f"n: 1\n\n{TEXTS[0]}"
    file = tmp_path / "qa_finetune_dataset.json"
    file.write_text(json.dumps({**questions(), "mode": "text"}), encoding="utf-8")
    for given in (questions(), SimpleNamespace(**questions(), mode="text"), file, str(file)):
        rows = training_rows(live, given)
        assert len(rows) == len(TEXTS)
        assert rows[0] == {"query": f"what about {TEXTS[0]}?", "pos": [held.text]}
    foreign = questions(corpus={"x": "Another text."}, relevant_docs={key: ["x"] for key in questions()["queries"]})
    assert training_rows(live, foreign)[0]["pos"] == ["Another text."]


def test_what_it_is_judged_by(live: LiveIndex) -> None:
    queries, qrels = judged_by(live, questions())["gate"]
    assert (queries["q0"], qrels["q0"]) == (f"what about {TEXTS[0]}?", {IDS[TEXTS[0]]: 1})
    foreign = questions(corpus={"x": "Another text."}, relevant_docs={key: ["x"] for key in questions()["queries"]})
    assert judged_by(live, foreign) == {"eval_data": training_rows(live, foreign)}
    assert judged_by(live, "beir/") == {"eval_data": "beir/"}


def test_other_training_data_is_what_a_refresh_takes(live: LiveIndex) -> None:
    rows = [{"query": query, "pos": [TEXTS[0]]} for query in QUERIES.values()]
    for given in ("feedback", "rows.jsonl", rows):
        assert training_rows(live, given) is given


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"relevant_docs": {}}, "'relevant_docs' is missing or empty"),
        ({"corpus": {"x": "y"}}, "question 'q0' names '.*', which its corpus does not have"),
        ({"relevant_docs": {"q1": ["x"]}}, "question 'q0' has no relevant_docs"),
        ({"mode": "image"}, "its mode is 'image'"),
    ],
)
def test_a_data_set_with_holes_is_refused_in_words(live: LiveIndex, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        UltraRAGFinetuneEngine(questions(**changes), live)


@pytest.mark.parametrize("held", [None, "", "{"])
def test_a_file_that_cannot_be_read_is_named(live: LiveIndex, tmp_path: Path, held: str | None) -> None:
    if held is not None:
        (tmp_path / "questions.json").write_text(held)
    with pytest.raises(DataError, match=r"questions\.json. cannot be read as JSON"):
        UltraRAGFinetuneEngine(tmp_path / "questions.json", live)
