"""Evaluation of searches and of runs: the numbers, per query, and how sure a difference is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from ultrarag.errors import UsageError
from ultrarag.retrieve import differences, evaluate, evaluate_run
from ultrarag.types import Hit, Passage


class Fixed:
    """Answers every query with the same ids, best first, and remembers what it was asked."""

    def __init__(self, *ids: str) -> None:
        self.ids, self.asked, self.options = ids, [], {}

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


def test_an_unknown_metric_is_refused_before_anything_is_searched() -> None:
    index = Fixed("a")
    with pytest.raises(UsageError, match="did you mean 'nDCG@10'"):
        evaluate(index, {"q": "x"}, {"q": {"a": 1}}, ["nDGC@10"])
    with pytest.raises(UsageError, match="2 judged queries have no text, 'q1'"):
        evaluate(index, {"q": "x"}, {"q1": {"a": 1}, "q2": {"a": 1}})
    with pytest.raises(UsageError, match="no qrels"):
        evaluate(index, {"q": "x"}, {})
    assert index.asked == []


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
