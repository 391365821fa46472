"""Filters: what Haystack's own reading of them passes, and errors in words"""

from __future__ import annotations

import random
from datetime import date, datetime
from typing import Any

import pytest
from haystack import Document
from haystack.errors import FilterError
from haystack.utils.filters import document_matches_filter

from haystack_integrations.components.retrievers.ultrarag import UltraRAGRetriever
from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from haystack_integrations.document_stores.ultrarag.filters import translate
from ultrarag.retrieve.search import matches, parse

VALUES: dict[str, list[Any]] = {
    "n": [1, 2, 2.5, -3, None],
    "s": ["a", "b", "", None],
    "d": ["2024-05-01", "2024-05-01T00:00:00Z", "2019-01-01T10:00:00+02:00", "2019-01-01T08:00:00+00:00", None],
    "b": [True, False, None],
    "deep.er": ["x", "y", None],
}
EQUAL, ORDERED = ("==", "!=", "in", "not in"), (">", ">=", "<", "<=")


def documents(chance: random.Random, size: int) -> list[Document]:
    """Documents with some of the fields."""
    found = []
    for number in range(size):
        meta = {key: chance.choice(values) for key, values in VALUES.items() if chance.random() < 0.8}
        if "deep.er" in meta:
            meta["deep"] = {"er": meta.pop("deep.er")}
        found.append(Document(id=str(number), content=f"document {number}", meta=meta))
    return found


def condition(chance: random.Random, depth: int) -> dict[str, Any]:
    if depth and chance.random() < 0.5:
        inner = [condition(chance, depth - 1) for _ in range(chance.randint(1, 3))]
        return {"operator": chance.choice(("AND", "OR", "NOT")), "conditions": inner}
    key = chance.choice(list(VALUES))
    operator = chance.choice(EQUAL + ORDERED if key in ("n", "d") else EQUAL)
    value: Any = chance.choice(VALUES[key])
    if operator in ("in", "not in"):
        value = chance.sample(VALUES[key], chance.randint(0, 3))
    return {"field": f"meta.{key}", "operator": operator, "value": value}


@pytest.mark.parametrize("seed", range(20))
def test_a_filter_passes_what_haystack_passes(seed: int):
    chance = random.Random(seed)
    written = documents(chance, 20)
    for _ in range(40):
        asked = condition(chance, 2)
        choice = translate(asked)
        passed = [d.id for d in written if matches(parse(choice.filter), d.meta)]
        assert passed == [d.id for d in written if document_matches_filter(asked, d)], asked


@pytest.fixture
def dated(store: UltraRAGDocumentStore) -> UltraRAGDocumentStore:
    store.write_documents(
        [
            Document(id="old", content="An old text.", meta={"at": datetime(2019, 1, 1, 12), "tags": ["x", "y"]}),
            Document(id="new", content="A new text.", meta={"at": datetime(2024, 5, 1, 12), "tags": ["y"]}),
            Document(id="bare", content="A text."),
        ]
    )
    return store


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"field": "meta.at", "operator": ">", "value": date(2020, 1, 1)}, ["new"]),
        ({"field": "at", "operator": "==", "value": datetime(2024, 5, 1, 12)}, ["new"]),
        ({"field": "meta.tags", "operator": "==", "value": "x"}, ["old"]),
        ({"field": "meta.tags", "operator": "in", "value": ["x", "y"]}, ["old", "new"]),
        ({"field": "id", "operator": "in", "value": ["new", "nobody", "old"]}, ["new", "old"]),
        ({"field": "id", "operator": "==", "value": "bare"}, ["bare"]),
        ({"field": "id", "operator": "in", "value": []}, []),
    ],
)
def test_documents_are_found_by_it(dated: UltraRAGDocumentStore, asked: dict[str, Any], found: list[str]):
    assert [document.id for document in dated.filter_documents(asked)] == found
    assert dated.count_documents_by_filter(asked) == len(found)
    hits = UltraRAGRetriever(dated, heads=["bm25"]).run("text", filters=asked)["documents"]
    assert {hit.id for hit in hits} == set(found)


def test_ids_and_metadata_hold_both(dated: UltraRAGDocumentStore):
    named = {"field": "id", "operator": "in", "value": ["old", "bare"]}
    tagged = {"field": "meta.tags", "operator": "==", "value": "y"}
    both = {"operator": "AND", "conditions": [named, tagged]}
    assert [document.id for document in dated.filter_documents(both)] == ["old"]
    assert dated.delete_by_filter(both) == 1
    assert dated.count_documents() == 2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"lang": "en"}, "'operator' is missing in {'lang': 'en'}: a filter compares, such as {'field'"),
        ({"field": "meta.x", "operator": "=", "value": 1}, "no comparison operator '='; known: ==, !=, >"),
        ({"field": "meta.x", "value": 1}, "'operator' is missing"),
        ({"operator": "and", "conditions": []}, "no logical operator 'and'; did you mean 'AND'"),
        ({"operator": "AND", "conditions": []}, "'AND' needs a list of one or more conditions"),
        ({"operator": "OR", "conditions": ["x"]}, "a condition of a filter is a dictionary"),
        ({"field": "meta.x", "operator": ">", "value": "old"}, "'x': bound 'gt' is 'old'"),
        ({"field": "meta.x", "operator": ">", "value": True}, "'x': bound 'gt' is True"),
        ({"field": "meta.x", "operator": "==", "value": ["a"]}, "'x' is compared with strings, numbers"),
        ({"field": "meta.x", "operator": "in", "value": "abc"}, "'in' compares 'x' with a list, not with str"),
        ({"field": "content", "operator": "==", "value": "a"}, "the field 'content' cannot be filtered by"),
        ({"field": "", "operator": "==", "value": "a"}, "'field' is ''"),
        ({"field": "id", "operator": "!=", "value": "a"}, "the field 'id' can be compared by '=='"),
        ({"operator": "NOT", "conditions": [{"field": "id", "operator": "==", "value": "a"}]}, "not by 'OR' or 'NOT'"),
        (["x"], "a filter is a dictionary such as {'field': 'meta.lang'"),
    ],
)
def test_an_error_says_what_is_wrong(asked: Any, says: str):
    with pytest.raises(FilterError) as raised:
        translate(asked)
    assert says in str(raised.value)


def test_an_empty_filter_deletes_and_changes_nothing(dated: UltraRAGDocumentStore):
    for call in (lambda: dated.delete_by_filter({}), lambda: dated.update_by_filter({}, {"x": 1})):
        with pytest.raises(FilterError, match="an empty filter means all documents"):
            call()
    with pytest.raises(FilterError, match="no condition on 'id'"):
        dated.update_by_filter({"field": "id", "operator": "==", "value": "old"}, {"x": 1})
    assert dated.count_documents() == 3
