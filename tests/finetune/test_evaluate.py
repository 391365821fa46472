"""Evaluation data of a fine-tune: what judges nothing is refused or noted."""

from __future__ import annotations

from typing import Any

import pytest

from ultrarag.errors import DataError
from ultrarag.evaluation.formats import write_beir
from ultrarag.evaluation.results import evaluate_run
from ultrarag.finetune.evaluate import METRICS, Evaluator, Measures, read_evaluator
from ultrarag.types import Passage

CORPUS = [Passage(id, f"the {id} text") for id in ("a", "b", "c")]


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
    sides = {"before": evaluate_run(qrels, before, METRICS), "after": evaluate_run(qrels, after, METRICS)}
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
