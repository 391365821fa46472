"""Evaluation of searches and of runs: the numbers, per query, and how sure a difference is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation.metrics import metrics
from ultrarag.retrieve import differences, evaluate, evaluate_run
from ultrarag.types import Hit, Passage


class Fixed:
    """Answers every query with the same ids, best first, and remembers what it was asked."""

    def __init__(self, *ids: str, held: str = "abcx") -> None:
        self.ids, self.asked, self.options, self.held = ids, [], {}, {*ids, *held}

    def existing(self, ids: Sequence[str]) -> set[str]:
        return self.held.intersection(ids)

    def search_many(self, queries: Sequence[str], **options: Any) -> list[list[Hit]]:
        self.asked += list(queries)
        self.options = options
        hits = [Hit(id, 1 / rank, Passage(id, id)) for rank, id in enumerate(self.ids, 1)]
        return [hits[: options["k"]] for _ in queries]


def test_the_numbers_are_those_of_the_definitions() -> None:
    index = Fixed("a", "b", "c")
    found = evaluate(index, {"q1": "one", "q2": "two"}, {"q1": {"b": 1}, "q2": {"x": 1}}, ["nDCG@10", "MRR@3"])
    assert found.per_query["q1"] == {"nDCG@10": pytest.approx(1 / math.log2(3)), "MRR@3": 0.5}
    assert found.per_query["q2"] == {"nDCG@10": 0.0, "MRR@3": 0.0}
    assert found.metrics["MRR@3"] == 0.25
    assert found.of("MRR@3") == {"q1": 0.5, "q2": 0.0}
    assert list(found.run["q1"]) == ["a", "b", "c"]


def test_only_judged_queries_are_searched_as_deep_as_the_metrics_look() -> None:
    index = Fixed("a")
    evaluate(index, {"q1": "one", "q2": "two"}, {"q2": {"a": 1}}, ["nDCG@5", "Recall@20"], weights={"dense": 1})
    assert (index.asked, index.options) == (["two"], {"k": 20, "weights": {"dense": 1}})
    evaluate(index, {"q": "x"}, {"q": {"a": 1}}, ["nDCG@5"], k=3)
    assert index.options["k"] == 3


def test_one_metric_needs_no_list() -> None:
    found = evaluate(Fixed("a"), {"q": "x"}, {"q": {"a": 1}}, "MRR@3")
    assert found.metrics == {"MRR@3": 1.0}
    assert evaluate_run({"q": {"a": 1}}, {"q": {"a": 2.0}}, "nDCG@5").metrics == {"nDCG@5": 1.0}
    assert metrics({"q": {"a": 1}}, {"q": {"a": 2.0}}, "nDCG@5") == {"nDCG@5": 1.0}
    with pytest.raises(UsageError, match="unknown metric 'nDGC@10'; did you mean 'nDCG@10'"):
        evaluate(Fixed("a"), {"q": "x"}, {"q": {"a": 1}}, "nDGC@10")


def test_an_unknown_metric_is_refused_before_anything_is_searched() -> None:
    index = Fixed("a")
    with pytest.raises(UsageError, match="did you mean 'nDCG@10'"):
        evaluate(index, {"q": "x"}, {"q": {"a": 1}}, ["nDGC@10"])
    with pytest.raises(UsageError, match="2 judged queries have no text, 'q1'"):
        evaluate(index, {"q": "x"}, {"q1": {"a": 1}, "q2": {"a": 1}})
    with pytest.raises(UsageError, match="no qrels"):
        evaluate(index, {"q": "x"}, {})
    assert index.asked == []


@pytest.mark.parametrize("one", [1, 1.0, "1", "1.0", " 1 ", True, np.int64(1), np.float32(1), np.uint8(1)])
def test_what_means_an_integer_is_a_relevance(one: Any) -> None:
    for qrels in ({"q": {"b": one}}, {np.int64(3): {7: one}}):
        query_id, passage_id = ("q", "b") if "q" in qrels else ("3", "7")
        index = Fixed("a", passage_id)
        found = evaluate(index, {next(iter(qrels)): "text"}, qrels, ["MRR@10"])
        assert found.per_query == {query_id: {"MRR@10": 0.5}}
        run = {next(iter(qrels)): {"a": 2.0, next(iter(qrels[next(iter(qrels))])): 1.0}}
        assert evaluate_run(qrels, run, ["MRR@10"]).per_query == found.per_query


@pytest.mark.parametrize("ids", [["b", "c"], ("b", "c"), {"b", "c"}])
def test_a_list_names_the_relevant_passages(ids: Any) -> None:
    assert evaluate(Fixed("a", "b", "c"), {"q": "text"}, {"q": ids}, ["Recall@10"]).metrics == {"Recall@10": 1.0}


@pytest.mark.parametrize(
    ("qrels", "said"),
    [
        ({"q": {"b": 0.5}}, "passage 'b' for query 'q': 0.5 is not a whole number"),
        ({"q": {"b": "high"}}, "passage 'b' for query 'q': 'high'"),
        ({"q": {"b": None}}, "passage 'b' for query 'q': None"),
        ({"q": {"b": math.nan}}, "passage 'b' for query 'q': nan"),
        ({"q": {"b": [1]}}, r"passage 'b' for query 'q': \[1\]"),
        ({"q": "b"}, "query 'q' has 'b'; give .*or a list"),
        ({"q": 1}, "query 'q' has 1"),
        ({"q": [{"id": "b"}]}, "passage judged for query 'q' is {'id': 'b'}; an id is a string or an integer"),
        ({1.5: {"b": 1}}, "the id of a query is 1.5"),
        ([("q", "b", 1)], "qrels is list; it maps"),
    ],
)
def test_what_is_no_judgement_is_named(qrels: Any, said: str) -> None:
    index = Fixed("a")
    with pytest.raises(UsageError, match=said):
        evaluate(index, {"q": "x"}, qrels)
    with pytest.raises(UsageError, match=said):
        evaluate_run(qrels, {"q": {"a": 1.0}})
    assert index.asked == []


def test_qrels_about_other_passages_judge_nothing() -> None:
    index = Fixed("doc0#0", "doc1#0")
    for relevant in ({"doc0": 1}, {"doc0#1": 1, "DOC0#0": 1}, {0: 1}):
        with pytest.raises(DataError, match=rf"none of the {len(relevant)} relevant passages is in the index"):
            evaluate(index, {"q": "x"}, {"q": relevant})
    with pytest.raises(DataError, match="no passage is relevant to any of the 1 judged queries"):
        evaluate(index, {"q": "x"}, {"q": {"doc0#0": 0}})
    assert index.asked == []


def test_missing_passages_are_counted_in_result_and_log(caplog: pytest.LogCaptureFixture) -> None:
    qrels = {"q1": {"a": 1, "gone": 1}, "q2": {"gone": 1, "away": 2}}
    found = evaluate(Fixed("a", "b"), {"q1": "x", "q2": "y"}, qrels, ["MRR@10"])
    assert found.notes == (
        "2 of 3 relevant passages are not in the index, 'away' for one, and cannot be found; 1 of 2 queries have none "
        "left and count as 0",
    )
    assert found.notes[0] in caplog.text
    assert evaluate(Fixed("a"), {"q": "x"}, {"q": {"a": 1}}).notes == ()


def test_a_run_of_other_ids_is_noted() -> None:
    found = evaluate_run({"q": {"doc0": 1}}, {"q": {"doc0#0": 1.0}})
    assert "no passage that was found is judged at all" in found.notes[0]


def test_the_passage_that_is_the_query_can_be_left_out() -> None:
    queries, qrels = {"a": "text of a", "q": "y"}, {"a": {"b": 1}, "q": {"b": 1}}
    counted = evaluate(Fixed("a", "b", "c"), queries, qrels, ["MRR@2"])
    assert counted.per_query["a"] == {"MRR@2": 0.5}
    assert "1 of 2 queries found the passage that has their own id, and it counts as a wrong hit" in counted.notes[0]
    index = Fixed("a", "b", "c")
    found = evaluate(index, queries, qrels, ["MRR@2"], ignore_identical_ids=True)
    assert found.per_query == {"a": {"MRR@2": 1.0}, "q": {"MRR@2": 0.5}}
    assert (index.options["k"], list(found.run["a"]), list(found.run["q"])) == (3, ["b", "c"], ["a", "b"])
    assert "left out" in found.notes[0]
    again = evaluate_run(qrels, {q: {"a": 2.0, "b": 1.0} for q in qrels}, ["MRR@2"], ignore_identical_ids=True)
    assert again.per_query == found.per_query
    own = evaluate(Fixed("a", "b"), queries, {"a": {"a": 1}}, ["MRR@2"], ignore_identical_ids=True)
    assert (own.metrics, own.notes) == ({"MRR@2": 1.0}, ())


def test_a_run_counts_0_for_what_it_lacks() -> None:
    found = evaluate_run({"q1": {"a": 1}, "q2": {"a": 1}}, {"q1": {"a": 2.0, "b": 1.0}}, ["nDCG@10"])
    assert found.per_query == {"q1": {"nDCG@10": 1.0}, "q2": {"nDCG@10": 0.0}}
    assert found.metrics == {"nDCG@10": 0.5}
    with pytest.raises(UsageError, match="none of the judged queries; it has 'other'"):
        evaluate_run({"q1": {"a": 1}}, {"other": {"a": 1.0}})


def test_differences_say_how_sure_they_are() -> None:
    qrels = {f"q{n}": {"a": 1} for n in range(40)}
    good = evaluate_run(qrels, {query_id: {"a": 1.0} for query_id in qrels})
    bad = evaluate_run(qrels, {query_id: {"b": 2.0, "a": 1.0} for query_id in qrels})
    change = differences(bad, good)["MRR@10"]
    assert (change.difference, change.queries) == (0.5, 40)
    assert change.p_value < 0.001
    assert differences(good, good)["nDCG@10"].p_value == 1.0
