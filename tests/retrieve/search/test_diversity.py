"""Maximal marginal relevance, beside its definition written out."""

from __future__ import annotations

import numpy as np
import pytest

from ultrarag.retrieve.search.diversity import most_diverse


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def as_defined(query: np.ndarray, vectors: np.ndarray, k: int, weight: float) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < k:
        left = [place for place in range(len(vectors)) if place not in chosen]
        chosen.append(max(left, key=lambda place: value(query, vectors, chosen, place, weight)))
    return chosen


def value(query: np.ndarray, vectors: np.ndarray, chosen: list[int], place: int, weight: float) -> float:
    relevance = cosine(query, vectors[place])
    if not chosen:
        return relevance
    return weight * relevance - (1 - weight) * max(cosine(vectors[place], vectors[other]) for other in chosen)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_each_is_the_best_beside_those_before_it(weight: float) -> None:
    random = np.random.default_rng(7)
    query, vectors = random.normal(size=8), 3 * random.normal(size=(20, 8))  # of any length
    assert most_diverse(query, vectors, 6, weight) == as_defined(query, vectors, 6, weight)


def test_few_and_none() -> None:
    query, vectors = np.array([1.0, 0.0]), np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert sorted(most_diverse(query, vectors, 9, 0.5)) == [0, 1, 2]
    assert most_diverse(query, vectors, 1, 0.0) == [1]
    assert most_diverse(query, vectors[:0], 3, 0.5) == []
    assert most_diverse(query, np.array([[2.0, 0.0]] * 3), 2, 1.0) == [0, 1]  # of equals the first
