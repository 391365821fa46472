"""Filters: LlamaIndex's MetadataFilters in the language of the index, every operator of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from ultrarag.doors.llamaindex.nodes import DOCUMENT, TYPE
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex

Condition = dict[str, Any]

#: Holds for nothing.
NEVER: Condition = {"and": [{TYPE: None}, {"not": {TYPE: None}}]}
_BOUNDS = {
    FilterOperator.GT: "gt",
    FilterOperator.GTE: "gte",
    FilterOperator.LT: "lt",
    FilterOperator.LTE: "lte",
}
_MATCHES: dict[FilterOperator, Callable[[str, str], bool]] = {
    FilterOperator.TEXT_MATCH: lambda text, part: part in text,
    FilterOperator.TEXT_MATCH_INSENSITIVE: lambda text, part: part.casefold() in text.casefold(),
}


def translated(live: LiveIndex, filters: Any, documents: list[str] | None = None) -> Any:
    """The index's filter for these conditions, and for nodes of these documents; None where there is none.

    Conditions are MetadataFilters, or a filter in the index's own language (`ultrarag.retrieve.search.filters`).

    Comparisons mean what they mean to the index: a list matches where one of its items does, and so a missing key
    passes `!=` and `nin` alone. `text_match` looks through the metadata of all passages for the values meant.

    Raises:
        UsageError: for a value that its operator cannot be asked with; names the key. For another kind of filter.
    """
    if isinstance(filters, MetadataFilters):
        parts = [_all(live, filters)] if filters.filters else []
    elif filters is None or isinstance(filters, Mapping):
        parts = [dict(filters)] if filters else []
    else:
        raise UsageError(
            f"filters is {type(filters).__name__}; it must be MetadataFilters, or such as {{'lang': 'en'}}"
        )
    if documents:
        parts.append({DOCUMENT: documents})
    return None if not parts else parts[0] if len(parts) == 1 else {"and": parts}


def _all(live: LiveIndex, filters: MetadataFilters) -> Condition:
    parts = [_all(live, f) if isinstance(f, MetadataFilters) else _one(live, f) for f in filters.filters]
    if not parts:
        raise UsageError("a MetadataFilters within another one has no filters: give it one, or leave it out")
    if filters.condition == FilterCondition.OR:
        return {"or": parts}
    return {"not": {"or": parts}} if filters.condition == FilterCondition.NOT else {"and": parts}


def _one(live: LiveIndex, asked: MetadataFilter) -> Condition:
    key, value, operator = asked.key, asked.value, asked.operator
    if operator in _MATCHES:
        return _any_of(key, _values(live, asked))
    if operator in _BOUNDS:
        return {key: {_BOUNDS[operator]: value}}
    if operator in (FilterOperator.EQ, FilterOperator.NE, FilterOperator.CONTAINS):
        equal = _any_of(key, [_single(asked)])
        return {"not": equal} if operator == FilterOperator.NE else equal
    if operator == FilterOperator.IS_EMPTY:
        return {key: [None, ""]}
    values = value if isinstance(value, list) else [value]
    if operator == FilterOperator.ALL:
        return {"and": [{"not": {key: None}}, *(_any_of(key, [item]) for item in values)]}
    any_of = _any_of(key, values)
    return {"not": any_of} if operator == FilterOperator.NIN else any_of


def _single(asked: MetadataFilter) -> Any:
    if isinstance(asked.value, list):
        raise UsageError(
            f"filter: '{asked.key}' {asked.operator.value} takes one value, not {asked.value!r}: use in, any or all"
        )
    return asked.value


def _any_of(key: str, values: list[Any]) -> Condition:
    """One of the values; 1 and 0 are also true and false, which a MetadataFilter cannot name."""
    truths = [bool(value) for value in values if not isinstance(value, str | bool) and value in (0, 1)]
    return {key: [*values, *truths]} if values else NEVER


def _values(live: LiveIndex, asked: MetadataFilter) -> list[str]:
    """The texts under a key of any passage that match."""
    if not isinstance(asked.value, str):
        raise UsageError(f"filter: '{asked.key}' {asked.operator.value} takes a text, not {asked.value!r}")
    match, part = _MATCHES[asked.operator], asked.value
    texts = {text for passage in live.passages() for text in _texts(passage.metadata, asked.key)}
    return sorted(text for text in texts if match(text, part))


def _texts(metadata: Any, key: str) -> Iterator[str]:
    """The texts under a key, which may lead into objects by its dots."""
    if isinstance(metadata, list):
        for item in metadata:
            yield from _texts(item, key)
    elif isinstance(metadata, str):
        if not key:
            yield metadata
    elif isinstance(metadata, dict) and key:
        for name, value in metadata.items():
            if key == name or key.startswith(f"{name}."):
                yield from _texts(value, key[len(name) + 1 :])
