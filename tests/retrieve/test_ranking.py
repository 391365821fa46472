"""Equal scores: in the order of their ids, whatever an engine makes of them."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from ultrarag.retrieve import ranking
from ultrarag.retrieve.ranking import ranked, through_ties, top


def engine(scores: dict[str, float], asked: list[int]):
    """A search that cuts through ties at random, though in the same way for the same number of hits."""

    def search(hits: int) -> list[tuple[str, float]]:
        asked.append(hits)
        ids = random.Random(hits).sample(sorted(scores), len(scores))
        best = sorted(ids, key=lambda id: -scores[id])[:hits]
        return ranked(best, [scores[id] for id in best], hits)

    return search


def test_the_k_best_are_the_first_of_all() -> None:
    rng = random.Random(0)
    for _ in range(20):
        scores = {f"p{i}": float(rng.randrange(4)) for i in range(rng.randrange(1, 60))}
        everything = ranked(scores, scores.values(), 100)
        for k in range(1, 70):
            assert through_ties(engine(scores, []), k) == everything[:k]


def test_without_a_tie_one_hit_more_is_asked_for() -> None:
    asked: list[int] = []
    through_ties(engine({f"p{i}": float(i) for i in range(50)}, asked), 10)
    assert asked == [11]


def test_a_tie_without_end_is_cut_in_the_same_place_for_every_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MOST_TIED", 64)
    asked: list[int] = []
    search = engine({f"p{i:03}": 1.0 for i in range(200)}, asked)
    found = [through_ties(search, k) for k in range(1, 64)]
    assert max(asked) == 64
    for shorter, longer in itertools.pairwise(found):
        assert longer[:-1] == shorter


def test_scores_that_float32_cannot_tell_apart_are_equal() -> None:
    assert ranked(["b", "a"], [1.0 + 1e-12, 1.0], 1) == [("a", 1.0)]
    assert sorted(top(np.array([0.5, 1.0, 1.0 + 1e-12]), 1)) == [1, 2]
