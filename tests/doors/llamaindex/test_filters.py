"""Metadata filters: each operator as llama-index-core's own filter function has it, and where it has none"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from tests.doors.llamaindex.conftest import nodes
from ultrarag.doors.llamaindex import UltraRAGRetriever, UltraRAGVectorStore
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex

ORDER = (FilterOperator.GT, FilterOperator.GTE, FilterOperator.LT, FilterOperator.LTE)
ONE, ONE_OF = (FilterOperator.EQ, FilterOperator.NE), (FilterOperator.IN, FilterOperator.NIN)
TEXTS = (FilterOperator.TEXT_MATCH, FilterOperator.TEXT_MATCH_INSENSITIVE)
OF_LISTS = (FilterOperator.ANY, FilterOperator.ALL)
#: operators, keys and values for which the reference has a meaning that is not an accident of Python
CASES = [
    *product(ONE, ("lang", "title", "missing"), ("en", "EN", "Vectors")),
    *product((*ONE, *ORDER), ("year", "missing"), (2019, 2019.0, 2019.5, 2024)),
    *product(ONE, ("draft",), (1, 0)),
    *product(ORDER, ("day",), ("2019-05-01", "2024-01-01")),
    *product(ONE_OF, ("lang", "missing"), (["en"], ["de", "fr"], ["en", "de"], [])),
    *product(ONE_OF, ("year",), ([2024, 2019], [2018], [])),
    *product((FilterOperator.CONTAINS,), ("tags", "missing"), ("ann", "a", "db")),
    *product(OF_LISTS, ("tags", "missing"), (["ann"], ["ann", "db"], ["x", "db"], ["x"])),
    *product((FilterOperator.IS_EMPTY,), ("tags", "title", "missing", "lang"), (None,)),
    *product(TEXTS, ("title", "missing", "lang"), ("Oper", "oper", "e", "", "Abend in der Oper.")),
]


def passing(store: UltraRAGVectorStore, *filters: Any, condition: Any = FilterCondition.AND) -> list[str]:
    found = store.get_nodes(filters=MetadataFilters(filters=list(filters), condition=condition))
    return [node.node_id for node in found]


def reference(*filters: Any, condition: Any = FilterCondition.AND) -> list[str]:
    held = {node.node_id: node.metadata for node in nodes()}
    passes = build_metadata_filter_fn(held.__getitem__, MetadataFilters(filters=list(filters), condition=condition))
    return [id for id in held if passes(id)]


def test_every_operator_is_compared() -> None:
    assert {operator for operator, *_ in CASES} == set(FilterOperator)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Any:
    with LiveIndex.create(tmp_path_factory.mktemp("kb") / "kb", tiny, heads=["dense"]) as live:
        store = UltraRAGVectorStore(live)
        store.add(nodes())
        yield store


def test_operators_mean_what_they_mean_to_the_reference(kept: UltraRAGVectorStore) -> None:
    for operator, key, value in CASES:
        one = MetadataFilter(key=key, value=value, operator=operator)
        assert passing(kept, one) == reference(one), one


@pytest.mark.parametrize("condition", [None, *FilterCondition])
def test_conditions_mean_what_they_mean_to_the_reference(kept: UltraRAGVectorStore, condition: Any) -> None:
    cases = [MetadataFilter(key=key, value=value, operator=operator) for operator, key, value in CASES[::7]]
    for first, second in product(cases, cases):
        assert passing(kept, first, second, condition=condition) == reference(first, second, condition=condition)


def test_filters_within_filters(kept: UltraRAGVectorStore) -> None:
    german = MetadataFilter(key="lang", value="de")
    early = MetadataFilter(key="year", value=2019.5, operator="<")
    either = MetadataFilters(filters=[german, early], condition="or")
    assert passing(kept, either, MetadataFilter(key="title", value="o", operator="text_match")) == []
    assert passing(kept, either) == ["n2", "n4"]
    assert passing(kept, MetadataFilters(filters=[either], condition="not")) == ["n1", "n3"]
    assert kept.get_nodes(filters=MetadataFilters(filters=[])) == kept.get_nodes()
    with pytest.raises(UsageError, match="has no filters"):
        passing(kept, MetadataFilters(filters=[]))


def test_a_list_matches_where_one_of_its_items_does(kept: UltraRAGVectorStore) -> None:
    assert passing(kept, MetadataFilter(key="tags", value="ann")) == ["n1", "n2"]
    assert passing(kept, MetadataFilter(key="tags", value="bd", operator="!=")) == ["n1", "n2", "n3", "n4"]
    assert passing(kept, MetadataFilter(key="tags", value="n", operator="text_match")) == ["n1", "n2"]


def test_keys_that_lead_into_objects(kept: UltraRAGVectorStore) -> None:
    live = kept.client
    live.add(
        [{"id": "deep", "text": "x", "metadata": {"source": {"name": "wiki", "parts": [{"n": "abc"}]}, "a.b": "cd"}}]
    )
    for key, part in (("source.name", "ik"), ("source.parts.n", "bc"), ("a.b", "c")):
        assert passing(kept, MetadataFilter(key=key, value=part, operator="text_match")) == ["deep"]
    live.delete("deep")


@pytest.mark.parametrize(
    ("operator", "value", "words"),
    [
        ("==", ["a", "b"], "'lang' == takes one value.*use in, any or all"),
        ("text_match", 3, "'lang' text_match takes a text, not 3"),
        (">", "en", "'lang': bound 'gt' is 'en'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(
    kept: UltraRAGVectorStore, operator: str, value: Any, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        passing(kept, MetadataFilter(key="lang", value=value, operator=operator))


def test_searches_and_the_retriever_filter_alike(kept: UltraRAGVectorStore) -> None:
    one = MetadataFilter(key="title", value="oper", operator="text_match_insensitive")
    for filters in (MetadataFilters(filters=[one]), {"title": "Abend in der Oper"}):
        found = UltraRAGRetriever(kept.client, 4, filters=filters).retrieve("opera")
        assert [item.node_id for item in found] == ["n4"]
        assert [node.node_id for node in kept.get_nodes(filters=filters)] == ["n4"]
        assert kept.query(VectorStoreQuery(query_str="opera", similarity_top_k=4, filters=filters)).ids == ["n4"]
    for wrong in ("oper", [one]):
        with pytest.raises(UsageError, match="it must be MetadataFilters"):
            kept.get_nodes(filters=wrong)
