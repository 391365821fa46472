"""Held-out data: what is searched, how deep, and in which order of equal scores."""

from __future__ import annotations

import numpy as np
import pytest

from ultrarag import Encoder
from ultrarag.errors import DataError
from ultrarag.finetune.evaluate import Evaluator, read_rerank_evaluator

WORDS = [f"word {number}" for number in range(15)]


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
