"""Filters: the index's language, and what other vector stores of LangChain call the same with a `$`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.retrieve import jsonable

LOGIC = ("$and", "$or", "$not")
BOUNDS = ("$gt", "$gte", "$lt", "$lte")
KNOWN = ("$eq", "$ne", "$in", "$nin", "$exists", *BOUNDS)


def translated(filter: Any) -> Any:
    """A filter in the index's language; dates and the like become what metadata keeps of them.

    Raises:
        UsageError: for an operator that it has no word for.

    Example:
        >>> translated({"$and": [{"lang": {"$in": ["en", "de"]}}, {"year": {"$gte": 2020, "$ne": 2023}}]})
        {'and': [{'lang': ['en', 'de']}, {'and': [{'not': {'year': 2023}}, {'year': {'gte': 2020}}]}]}
    """
    return _filter(jsonable(filter)) if isinstance(filter, Mapping) else filter


def _filter(filter: Any) -> Any:
    if not isinstance(filter, Mapping):
        return filter
    parts = [_condition(key, value) for key, value in filter.items()]
    names = [name for part in parts for name in part]
    if len(set(names)) == len(names):
        return {name: value for part in parts for name, value in part.items()}
    return {"and": parts}


def _condition(key: str, value: Any) -> dict[str, Any]:
    word = key.removeprefix("$") if key in LOGIC else key
    if word in ("and", "or") and isinstance(value, list):
        return {word: [_filter(part) for part in value]}
    if word == "not":
        return {word: _filter(value)}
    if key.startswith("$"):  # as a key of the metadata it would pass nothing, or, compared with None, everything
        raise UsageError(
            f"filter: {key!r} with {value!r}{did_you_mean(key, LOGIC)}; $and and $or join a list of filters, $not "
            f"takes a filter, and other operators stand under a key, such as {{'year': {{'$gte': 2020}}}}"
        )
    if not (isinstance(value, Mapping) and any(name.startswith("$") for name in value)):
        return {key: value}
    return _compared(key, value)


def _compared(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """What a key is compared with by operators, all of which must hold."""
    bounds = {name.removeprefix("$"): bound for name, bound in value.items() if name in BOUNDS}
    parts = [_operator(key, name, operand) for name, operand in value.items() if name not in BOUNDS]
    parts += [{key: bounds}] if bounds else []
    return parts[0] if len(parts) == 1 else {"and": parts}


def _operator(key: str, name: str, operand: Any) -> dict[str, Any]:
    if name in ("$eq", "$in"):
        return {key: operand}
    if name in ("$ne", "$nin"):
        return {"not": {key: operand}}
    if name == "$exists":
        return {"not": {key: None}} if operand else {key: None}
    raise UsageError(f"filter: '{key}' has the operator {name!r}{did_you_mean(name, KNOWN)}; known: {', '.join(KNOWN)}")
