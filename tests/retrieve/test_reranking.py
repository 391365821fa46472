"""Reranking: the order of a model that reads query and passage together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ultrarag.errors import DataError
from ultrarag.retrieve import rerank
from ultrarag.types import Hit, Passage


class Overlap:
    """A stand-in for a cross-encoder: the share of the query's words that the passage holds."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []
        self.options: dict[str, Any] = {}

    def score(self, pairs: list[tuple[str, str]], **options: Any) -> np.ndarray:
        self.pairs, self.options = pairs, options
        return np.array([len({*q.split()} & {*p.split()}) / len(q.split()) for q, p in pairs], np.float32)


def hit(id: str, text: str, score: float, title: str = "") -> Hit:
    return Hit(id, score, Passage(id, text, title), {"dense": score})


HITS = [hit("a", "a castle", 0.9), hit("b", "red apple", 0.8), hit("c", "a pie", 0.7, "red apple"), hit("d", "", 0.1)]


def test_the_rerankers_score_makes_the_order_and_the_former_is_kept() -> None:
    found = rerank(Overlap(), "red apple pie", HITS)  # type: ignore[arg-type]
    assert [item.id for item in found] == ["c", "b", "a", "d"]
    assert found[0].score == 1.0
    assert found[0].scores == {"dense": 0.7, "retrieval": 0.7}
    assert found[0].passage is HITS[2].passage
    assert [item.score for item in HITS] == [0.9, 0.8, 0.7, 0.1]


def test_it_reads_title_and_text_and_passes_options_on() -> None:
    encoder = Overlap()
    rerank(encoder, "red", HITS, batch_tokens=64)  # type: ignore[arg-type]
    assert encoder.pairs == [("red", "a castle"), ("red", "red apple"), ("red", "red apple\na pie"), ("red", "")]
    assert encoder.options == {"batch_tokens": 64}


def test_equal_scores_keep_the_order_of_the_search() -> None:
    assert [item.id for item in rerank(Overlap(), "nothing", HITS)] == ["a", "b", "c", "d"]  # type: ignore[arg-type]


def test_no_hits_ask_nothing() -> None:
    encoder = Overlap()
    assert rerank(encoder, "red", []) == []  # type: ignore[arg-type]
    assert encoder.options == {}
    assert encoder.pairs == []


def test_a_score_that_is_no_number_is_refused() -> None:
    class Broken(Overlap):
        def score(self, pairs: list[tuple[str, str]], **options: Any) -> np.ndarray:
            return np.array([1.0, float("nan"), 0.0, 0.0])

    with pytest.raises(DataError, match="passage 'b' is not a number"):
        rerank(Broken(), "red", HITS)  # type: ignore[arg-type]
