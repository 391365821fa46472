"""Haystack's filters in the language of the index, and errors that say what a filter lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from haystack.errors import FilterError

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.retrieve.search import parse

EXAMPLE = "{'field': 'meta.lang', 'operator': '==', 'value': 'en'}"
LOGIC = ("AND", "OR", "NOT")
BOUNDS = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
COMPARISONS = ("==", "!=", *BOUNDS, "in", "not in")
#: Fields of a Document that are not compared; every other name is one of `meta`, as Haystack takes it.
OTHER_FIELDS = ("content", "blob", "score", "embedding", "sparse_embedding", "meta")


@dataclass(frozen=True)
class Choice:
    """The documents that a filter chooses: by their metadata, and by their ids where it names some."""

    filter: dict[str, Any] | None = None
    ids: tuple[str, ...] | None = None

    def __bool__(self) -> bool:
        return self.filter is not None or self.ids is not None

    def options(self) -> dict[str, Any]:
        """As `LiveIndex.search` and `LiveIndex.passages` take it."""
        return {"filter": self.filter, "ids": None if self.ids is None else list(self.ids)}


def translate(filters: Mapping[str, Any] | None) -> Choice:
    """Return what a filter of Haystack chooses; None and {} choose everything.

    Raises:
        FilterError: it is malformed, or asks for what an index cannot compare; says what.
    """
    if filters is not None and not isinstance(filters, Mapping):
        raise FilterError(f"a filter is a dictionary such as {EXAMPLE}, not {type(filters).__name__}")
    if not filters:
        return Choice()
    ids: tuple[str, ...] | None = None
    rest = []
    for condition in _conjuncts(filters):
        if (named := _ids(condition)) is None:
            rest.append(_node(condition))
        else:
            ids = named if ids is None else tuple(id for id in ids if id in named)
    if not rest:
        return Choice(None, ids)
    node = rest[0] if len(rest) == 1 else {"and": rest}
    _parsed(node)
    return Choice(node, ids)


def _conjuncts(condition: Any) -> list[Any]:
    """The conditions that must all hold."""
    if isinstance(condition, Mapping) and condition.get("operator") == "AND" and "field" not in condition:
        return [inner for part in _conditions(condition) for inner in _conjuncts(part)]
    return [condition]


def _ids(condition: Any) -> tuple[str, ...] | None:
    """The ids that a condition names, where it is one on the document's id."""
    if not isinstance(condition, Mapping) or condition.get("field") != "id":
        return None
    operator, value = _comparison(condition)
    wanted = _listed("id", operator, value) if operator == "in" else [value]
    if operator not in ("==", "in") or not all(isinstance(id, str) for id in wanted):
        raise FilterError(
            f"the field 'id' can be compared by '==' with a string or by 'in' with a list, not {condition}"
        )
    return tuple(wanted)


def _node(condition: Any) -> dict[str, Any]:
    if not isinstance(condition, Mapping):
        raise FilterError(f"a condition of a filter is a dictionary such as {EXAMPLE}, not {condition!r}")
    if "field" not in condition:
        return _logic(condition)
    operator, value = _comparison(condition)
    key = _key(condition["field"])
    if operator in ("!=", "not in"):
        return {"not": _compared(key, "==" if operator == "!=" else "in", value)}
    return _compared(key, operator, value)


def _logic(condition: Mapping[str, Any]) -> dict[str, Any]:
    conditions = [_node(part) for part in _conditions(condition)]
    if condition["operator"] == "OR":
        return {"or": conditions}
    return {"and": conditions} if condition["operator"] == "AND" else {"not": {"and": conditions}}


def _conditions(condition: Mapping[str, Any]) -> list[Any]:
    """The conditions of a logical one, checked."""
    for name in ("operator", "conditions"):
        if name not in condition:
            raise FilterError(
                f"'{name}' is missing in {dict(condition)}: a filter compares, such as {EXAMPLE}, or joins conditions, "
                f"such as {{'operator': 'AND', 'conditions': [...]}}"
            )
    operator, conditions = condition["operator"], condition["conditions"]
    if operator not in LOGIC:
        raise FilterError(
            f"no logical operator {operator!r}{did_you_mean(str(operator).upper(), LOGIC)}; {_known(LOGIC)}"
        )
    if not isinstance(conditions, list) or not conditions:
        raise FilterError(f"'{operator}' needs a list of one or more conditions, not {conditions!r}")
    return conditions


def _comparison(condition: Mapping[str, Any]) -> tuple[str, Any]:
    """Operator and value of a comparison, checked."""
    for name in ("operator", "value"):
        if name not in condition:
            raise FilterError(f"'{name}' is missing in {dict(condition)}: a comparison is such as {EXAMPLE}")
    operator = condition["operator"]
    if operator not in COMPARISONS:
        raise FilterError(f"no comparison operator {operator!r}; {_known(COMPARISONS)}")
    return operator, condition["value"]


def _key(field: Any) -> str:
    """The key of the metadata that a field is."""
    if not isinstance(field, str) or not field:
        raise FilterError(f"'field' is {field!r}; it is a name such as 'meta.lang'")
    if field == "id":
        raise FilterError("the field 'id' can only be joined to other conditions by 'AND', not by 'OR' or 'NOT'")
    if field in OTHER_FIELDS:
        raise FilterError(f"the field '{field}' cannot be filtered by: an index compares 'id' and fields of meta")
    return field.removeprefix("meta.")


def _compared(key: str, operator: str, value: Any) -> dict[str, Any]:
    if operator == "in":
        values = _listed(key, operator, value)
        return {"or": [_equal(key, item) for item in values]} if values else _nothing(key)
    if operator == "==":
        return _equal(key, value)
    if value is None:
        return _nothing(key)
    return {key: {BOUNDS[operator]: _scalar(key, value)}}


def _listed(key: str, operator: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise FilterError(f"'{operator}' compares '{key}' with a list, not with {type(value).__name__}")
    return value


def _equal(key: str, value: Any) -> dict[str, Any]:
    """Equal; of dates and times, those that are the same moment, however they are written."""
    value = _scalar(key, value)
    moment = {key: {"gte": value, "lte": value}}
    if isinstance(value, str) and _is_range(moment):
        return moment
    return {key: value}


def _scalar(key: str, value: Any) -> Any:
    if isinstance(value, date):  # a datetime is one
        return value.isoformat()
    if value is None or isinstance(value, str | int | float):
        return value
    raise FilterError(f"'{key}' is compared with strings, numbers, dates, true, false or None, not with {value!r}")


def _nothing(key: str) -> dict[str, Any]:
    """What no document passes: an order of nothing, as Haystack has it."""
    return {"and": [{key: None}, {"not": {key: None}}]}


def _is_range(node: dict[str, Any]) -> bool:
    try:
        parse(node)
    except UsageError:
        return False
    return True


def _parsed(node: dict[str, Any]) -> None:
    try:
        parse(node)
    except UsageError as error:
        raise FilterError(str(error)) from error


def _known(names: tuple[str, ...]) -> str:
    return f"known: {', '.join(names)}"
