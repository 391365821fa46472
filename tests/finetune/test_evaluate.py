"""Held-out data: what is searched, how deep, in which order of equal scores; what judges nothing is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ultrarag import Encoder
from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation import evaluate_run, write_beir
from ultrarag.finetune.evaluate import Evaluator, Measures, read_evaluator, read_rerank_evaluator
from ultrarag.finetune.flags import from_keywords
from ultrarag.types import Passage

WORDS = [f"word {number}" for number in range(15)]
CORPUS = [Passage(id, f"the {id} text") for id in ("a", "b", "c")]


@pytest.mark.parametrize("heads", [("dense",), ("sparse",)])
def test_a_metric_is_measured_as_deep_as_it_reaches(tiny_m3, heads):
    evaluator = Evaluator({str(n): word for n, word in enumerate(WORDS)}, {"q": "bread"}, {"q": {"3": 1, "8": 1}})
    found = evaluator.evaluate(Encoder.load(tiny_m3, "bgem3"), heads, ["Recall@15", "nDCG@10"])
    assert found.metrics["Recall@15"] == 1.0
    assert len(found.run["q"]) == 15


def test_what_a_reader_sees_of_two_evaluations(tiny_m3):
    evaluator = Evaluator({"a": "bread", "b": "steam"}, {"q": "oven", "not judged": "x"}, {"q": {"b": 1}})
    found = evaluator.evaluate(Encoder.load(tiny_m3, "bgem3"), ("dense",))
    assert set(found.metrics) == {"nDCG@10", "Recall@10", "MRR@10"}
    measured = evaluator.measured(found, found)
    assert (measured.metric, measured.where) == ("nDCG@10", "1 queries on the 2 passages of the evaluation data")
    assert measured.queries == {"q": "oven"}


class Constant:
    """Scores every pair alike."""

    def score(self, pairs, **limits):
        self.pairs = list(pairs)
        return np.zeros(len(self.pairs))


def test_candidates_are_a_querys_own_and_equal_scores_count_against_it():
    rows = [
        {"query": "a", "pos": ["p"], "neg": ["n", "p"]},
        {"query": "b", "pos": ["p"]},
        {"query": "a", "pos": ["p2"], "neg": ["p2", "n2", "n"]},
    ]
    evaluator, encoder = read_rerank_evaluator(rows), Constant()
    found = evaluator.evaluate(encoder, ("scores",))
    assert encoder.pairs == [("a", text) for text in ("p", "p2", "n", "n2")]
    assert found.metrics["MRR@10"] == pytest.approx(1 / 3)
    assert evaluator.where == "1 queries, each with its own candidates"
    with pytest.raises(DataError, match="no query with 'neg'"):
        read_rerank_evaluator(rows[1:2])


def test_data_without_a_relevant_passage_is_refused(tmp_path):
    write_beir(tmp_path, CORPUS, {"q": "x"}, {"test": {"q": {"a": 0, "b": -1}}})
    with pytest.raises(DataError, match="has no query with a relevant passage"):
        read_evaluator(str(tmp_path), None, None)
    with pytest.raises(DataError, match=r"'pos\[0\]' is empty"):
        read_evaluator([{"query": "q", "pos": ["\u200b"]}], None, None)


def test_blank_passages_of_a_folder_are_not_searched(tmp_path, caplog):
    write_beir(tmp_path, [*CORPUS, Passage("void", " \u200b")], {"q": "x"}, {"test": {"q": {"a": 1, "void": 1}}})
    found = read_evaluator(str(tmp_path), None, None)
    assert (list(found.corpus), found.qrels) == (["a", "b", "c"], {"q": {"a": 1}})
    assert "1 of 4 passages" in caplog.text


def notes(before: dict[str, Any], after: dict[str, Any], qrels: dict[str, Any]) -> list[str]:
    """What a run says of these two runs."""
    evaluator = Evaluator({"a": "x"}, dict.fromkeys(qrels, "q"), qrels)
    sides = {"before": evaluate_run(qrels, before), "after": evaluate_run(qrels, after)}
    said: list[str] = []
    Measures(evaluator, None, sides).warn(0.1, said.append)
    return said


def test_what_judges_neither_model_is_noted():
    assert notes({"q": {"b": 1.0}}, {"q": {"b": 1.0, "c": 0.5}}, {"q": {"a": 1, "b": 0}}) == [
        "evaluation data: nDCG@10 is 0 before and after, which judges neither model: is it about these passages?"
    ]
    assert notes({"q": {"a": 1.0}}, {"q": {"a": 1.0}}, {"q": {"a": 1}}) == []


def test_a_query_that_is_a_passage_is_noted_and_can_be_ignored(m3_encoder):
    assert (
        "the passage that has their own id" in notes({"a": {"a": 1.0}}, {"a": {"a": 2.0, "b": 1.0}}, {"a": {"b": 1}})[0]
    )
    evaluator = Evaluator({p.id: p.text for p in CORPUS}, {"a": "the a text"}, {"a": {"b": 1}})
    assert "a" in evaluator.evaluate(m3_encoder, ("dense",)).run["a"]
    evaluator.ignore_identical_ids = True
    assert sorted(evaluator.evaluate(m3_encoder, ("dense",)).run["a"]) == ["b", "c"]


def test_a_fine_tune_can_ignore_passages_that_are_the_query(m3_encoder, tiny_m3, tmp_path):
    write_beir(tmp_path / "beir", CORPUS, {"a": "the a text"}, {"test": {"a": {"b": 1}}})
    given = {"eval_data": str(tmp_path / "beir"), "guard_data": str(tmp_path / "beir"), "ignore_identical_ids": True}
    rows = [{"query": "a", "pos": ["b"], "neg": ["c"]}]
    arguments = from_keywords(tiny_m3, rows, tmp_path / "out", "bgem3", **given)
    measures = Measures.of(arguments, pairs=False)
    measures.take("before", m3_encoder, ("dense",))
    assert {stage: "a" in found.run["a"] for stage, found in measures.found.items()} == {
        "before": False,
        "guard_before": False,
    }
    with pytest.raises(UsageError, match="ignore_identical_ids is for embedders"):
        Measures.of(arguments, pairs=True)
