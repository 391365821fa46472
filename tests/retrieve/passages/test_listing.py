"""Which passages a filter means, of those that hold the texts that it asks for."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.passages import listing
from ultrarag.retrieve.search import matches, needed_texts, parse
from ultrarag.retrieve.search.filters import MOST_TEXTS

TOLD: list[dict[str, Any]] = [
    {"doc": "a", "n": 1},
    {"doc": "a\"b\\c\u2028ß 'x'", "n": 2},
    {"doc": ["b", "a"], "more": {"name": "deep"}},
    {"other": "a"},
    {"doc": "x" * 200},
    {"doc": 1},
    {"doc": ""},
    {},
]
FILTERS: list[dict[str, Any]] = [
    {"doc": "a"},
    {"doc": "a\"b\\c\u2028ß 'x'"},
    {"doc": ["b", "nobody"]},
    {"doc": ["a", 1]},
    {"doc": ["a", None]},
    {"doc": ""},
    {"doc": None},
    {"doc": 1},
    {"doc": "x" * 200},
    {"more.name": "deep"},
    {"doc": "a", "n": {"gte": 1}},
    {"not": {"doc": "a"}},
    {"or": [{"doc": "a"}, {"n": 2}]},
    {"and": [{"doc": "a"}, {"doc": "b"}]},
    {"doc": [f"d{n}" for n in range(MOST_TEXTS + 1)]},
]


@pytest.fixture
def held(live: LiveIndex) -> LiveIndex:
    live.add([{"id": str(row), "text": f"text {row}", "metadata": told} for row, told in enumerate(TOLD)])
    return live


def test_a_filter_means_what_it_means_to_one_passage(held: LiveIndex) -> None:
    for one in FILTERS:
        wanted = [str(row) for row, told in enumerate(TOLD) if matches(parse(one), told)]
        assert [passage.id for passage in held.passages(one)] == wanted, one
        assert [passage.id for passage in held.passages(one, limit=9)] == wanted, one
        assert held.count(one) == len(wanted), one


def test_metadata_without_the_text_is_not_read(held: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(listing, "matches", lambda node, told: read.append(told) or matches(node, told))
    assert held.count({"doc": "b"}) == held.delete(filter={"doc": "b", "more.name": "deep"}) == 1
    assert read == [TOLD[2], TOLD[2]]


def test_texts_that_a_filter_needs() -> None:
    for first, second in product(({"doc": "a"}, {"doc": ["b", "c"]}), ({"n": 1}, {"n": {"gte": 1}}, {"n": None})):
        (choice,) = needed_texts(parse({**first, **second}))
        assert set(choice) == {*first["doc"]}
    assert needed_texts(None) == needed_texts(parse({"not": {"doc": "a"}})) == []
