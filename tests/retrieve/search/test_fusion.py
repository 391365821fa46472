"""Fusion of heads, by hand-computed numbers."""

from __future__ import annotations

import math

import pytest

from ultrarag.errors import UsageError
from ultrarag.retrieve.search.fusion import fuse

LISTS = {"dense": [("a", 0.9), ("b", 0.5), ("c", 0.1)], "bm25": [("c", 12.0), ("d", 4.0)]}


def pairs(hits: list) -> list[tuple[str, float]]:
    return [(hit.id, pytest.approx(hit.score)) for hit in hits]


def test_minmax_counts_what_a_list_lacks_as_zero() -> None:
    hits = fuse(LISTS, 10, {"dense": 1, "bm25": 0.5})
    assert pairs(hits) == [("a", 1.0), ("b", 0.5), ("c", 0.5), ("d", 0.0)]
    assert hits[2].scores == {"dense": 0.1, "bm25": 12.0}
    assert hits[3].scores == {"bm25": 4.0}


def test_minmax_of_equal_scores_is_one() -> None:
    assert pairs(fuse({"dense": [("a", 3.0), ("b", 3.0)]}, 5)) == [("a", 1.0), ("b", 1.0)]


def test_raw_completes_what_a_list_lacks() -> None:
    asked = {}

    def complete(head: str, ids: list[str]) -> list[float]:
        asked[head] = ids
        return {"dense": [0.0], "bm25": [1.0, math.nan]}[head]

    hits = fuse(LISTS, 10, {"dense": 10, "bm25": 1}, "raw", complete)
    assert asked == {"dense": ["d"], "bm25": ["a", "b"]}
    assert pairs(hits) == [("c", 13.0), ("a", 10.0), ("d", 4.0)], "'b' is gone"
    with pytest.raises(UsageError, match="'dense' has no score for 'd'"):
        fuse(LISTS, 10, {"dense": 1, "bm25": 1}, "raw")


def test_raw_does_not_ask_for_heads_that_do_not_count() -> None:
    assert pairs(fuse(LISTS, 1, {"dense": 2, "bm25": 0}, "raw")) == [("a", 1.8)]


def test_rrf() -> None:
    hits = fuse(LISTS, 2, method="rrf")
    assert pairs(hits) == [("c", 1 / 63 + 1 / 61), ("a", 1 / 61)]
    shuffled = {head: scored[::-1] for head, scored in LISTS.items()}
    assert fuse(shuffled, 2, method="rrf") == hits
    assert fuse(LISTS, 1, {"dense": 1, "bm25": 0}, "rrf")[0].id == "a"


def test_ties_come_in_the_order_of_ids() -> None:
    lists = {"dense": [("b", 1.0), ("a", 0.0)], "sparse": [("a", 1.0), ("b", 0.0)]}
    for method in ("minmax", "raw", "rrf"):
        assert [hit.id for hit in fuse(lists, 2, {"dense": 1, "sparse": 1}, method)] == ["a", "b"]


def test_nothing_found_is_no_error() -> None:
    assert fuse({"dense": [], "bm25": []}, 5, {"dense": 1, "bm25": 1}) == []
    assert pairs(fuse({"dense": [], "bm25": [("a", 2.0)]}, 5, {"dense": 1, "bm25": 1})) == [("a", 1.0)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "2 heads .* need explicit weights, such as {'dense': 1, 'bm25': 1}"),
        ({"dens": 1, "bm25": 1}, "no head 'dens'; did you mean 'dense'"),
        ({"dense": 1}, "none for 'bm25'"),
        ({"dense": -1, "bm25": 1}, "'dense' is -1"),
        ({"dense": math.nan, "bm25": 1}, "'dense' is nan"),
        ({"dense": 0, "bm25": 0}, "all are 0"),
    ],
)
def test_weights_must_make_sense(weights: dict | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fuse(LISTS, 5, weights)


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match="did you mean 'minmax'"):
        fuse(LISTS, 5, {"dense": 1, "bm25": 1}, "minmx")  # type: ignore[arg-type]
