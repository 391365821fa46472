"""The metadata filter language, and the one definition of what a filter means that every engine shares.

A passage's metadata is flattened into *facts* (keys with numbers); a filter is parsed into a small tree over the
same keys. Engines store facts and evaluate trees, so that they cannot disagree about lists, nulls or types.

    {"lang": "en"}                                 equal
    {"lang": ["en", "zh"]}                         any of
    {"year": {"gte": 2020, "lt": 2024}}            range of numbers, or of ISO dates ("2024-05-01")
    {"source.name": "wiki", "lang": "en"}          nested key; several keys must all hold
    {"and": [...]}, {"or": [...]}, {"not": {...}}

Meaning: a missing key, null, an empty list and an empty object are the same thing, *absent*; every comparison with
an absent key is false, so its `not` is true; `{"lang": None}` asks for absence. A list matches when one of its items
does (a range: one item within both bounds), and keys reach through lists of objects. Types are never converted:
`1` equals `1.0` but neither `"1"` nor `true`; a range of numbers ignores strings.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from ultrarag.errors import DataError, UsageError, did_you_mean

LOGIC = ("and", "or", "not")
BOUNDS = ("gt", "gte", "lt", "lte")
#: Facts longer than this are replaced by their digest, so that a long text in the metadata costs an index 34 bytes.
LONGEST_FACT = 96
_SCALARS = (str, int, float)
#: A choice of more texts than these is not looked for beforehand.
MOST_TEXTS = 20

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2})?)?")
#: Made once: `json.dumps` with separators makes an encoder at each call.
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class HasFact:
    """True where at least one of the facts is present."""

    facts: tuple[str, ...]
    #: the key that they are about; "" where it is not known, for what is made by hand
    key: str = field(default="", compare=False)


@dataclass(frozen=True)
class InRange:
    """True where one number stored under `fact` lies within the bounds: at most one below and one above."""

    fact: str
    gt: float | None = None
    gte: float | None = None
    lt: float | None = None
    lte: float | None = None
    #: as `HasFact.key`
    key: str = field(default="", compare=False)

    def holds_one(self, value: float) -> bool:
        """Compare one value with every bound."""
        below = (self.gt is None or value > self.gt) and (self.gte is None or value >= self.gte)
        return below and (self.lt is None or value < self.lt) and (self.lte is None or value <= self.lte)

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Compare each value with every bound."""
        within = np.ones(len(values), bool)
        for bound, compare in zip(BOUNDS, (np.greater, np.greater_equal, np.less, np.less_equal), strict=True):
            if (limit := getattr(self, bound)) is not None:
                within &= compare(values, limit)
        return within


@dataclass(frozen=True)
class AllOf:
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class AnyOf:
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Not:
    node: Node


Node: TypeAlias = "HasFact | InRange | AllOf | AnyOf | Not"
#: What a user may pass: the filter as a mapping, or already parsed.
Filter: TypeAlias = "Mapping[str, Any] | Node | None"
#: Rows that hold a fact, and the number stored with each; a row may occur more than once.
Lookup: TypeAlias = "Callable[[str], tuple[np.ndarray, np.ndarray]]"


def parse(filter: Filter) -> Node | None:
    """Return the tree of a filter; None where everything matches.

    Raises:
        UsageError: naming the key that cannot be used, and why.
    """
    if filter is None or isinstance(filter, HasFact | InRange | AllOf | AnyOf | Not):
        return filter
    if not isinstance(filter, Mapping):
        raise UsageError(f"a filter is a mapping such as {{'lang': 'en'}}, not {_show(filter)}")
    nodes = tuple(_parse_entry(key, value) for key, value in filter.items())
    return None if not nodes else nodes[0] if len(nodes) == 1 else AllOf(nodes)


def _parse_entry(key: Any, value: Any) -> Node:
    if not isinstance(key, str) or not key:
        raise UsageError(f"filter: a key is a non-empty string, not {_show(key)}")
    if key in LOGIC:
        return _parse_logic(key, value)
    if isinstance(value, Mapping):
        return _parse_range(key, value)
    values = value if isinstance(value, list | tuple | set | frozenset) else [value]
    if not values:
        raise UsageError(f"filter: '{key}' lists no value, so nothing could match; name one, or leave it out")
    return _parse_values(key, list(values))


def _parse_logic(key: str, value: Any) -> Node:
    if key == "not":
        return Not(_parse_operand(key, value))
    if not isinstance(value, list | tuple) or not value:
        raise UsageError(f"filter: '{key}' needs a list of one or more filters, not {_show(value)}")
    nodes = tuple(_parse_operand(key, item) for item in value)
    return AllOf(nodes) if key == "and" else AnyOf(nodes)


def _parse_operand(key: str, value: Any) -> Node:
    node = parse(value)
    if node is None:
        raise UsageError(f"filter: '{key}' holds an empty filter; give it a condition such as {{'lang': 'en'}}")
    return node


def _parse_values(key: str, values: list[Any]) -> Node:
    present = [value for value in values if value is not None]
    for value in present:
        if not isinstance(value, str | int | float) or not _finite(value):
            raise UsageError(f"filter: '{key}' can equal strings, numbers, true, false and null, not {_show(value)}")
    nodes: list[Node] = []
    if present:
        nodes.append(HasFact(tuple(_equals(key, value) for value in present), key))
    if len(present) < len(values):
        nodes.append(Not(HasFact((_exists(key),), key)))
    return nodes[0] if len(nodes) == 1 else AnyOf(tuple(nodes))


def _parse_range(key: str, bounds: Mapping[str, Any]) -> Node:
    for name in bounds:
        if name not in BOUNDS:
            raise UsageError(
                f"filter: '{key}' has the unknown bound {_show(name)}{did_you_mean(str(name), BOUNDS)}; "
                f"known: {', '.join(BOUNDS)} (a nested key is written with a dot: '{key}.{name}')"
            )
    if not bounds:
        raise UsageError(f"filter: '{key}' has no bound; known: {', '.join(BOUNDS)}")
    if all(_is_number(value) for value in bounds.values()):
        return InRange(_number(key), **_tightest({name: float(value) for name, value in bounds.items()}), key=key)
    dates: dict[str, float] = {}
    for name, value in bounds.items():
        if (seconds := _timestamp(value)) is not None:
            dates[name] = seconds
        else:
            raise UsageError(
                f"filter: '{key}': bound '{name}' is {_show(value)}; the bounds of a range are all numbers, "
                f"or all ISO dates such as '2024-05-01'"
            )
    return InRange(_date(key), **_tightest(dates), key=key)


def _tightest(bounds: dict[str, float]) -> dict[str, float]:
    """Keep one bound a side: given both `lt` and `lte`, Qdrant 0.9's index looks at one of them only."""
    if "gt" in bounds and "gte" in bounds:
        bounds.pop("gte" if bounds["gt"] >= bounds["gte"] else "gt")
    if "lt" in bounds and "lte" in bounds:
        bounds.pop("lte" if bounds["lt"] <= bounds["lte"] else "lt")
    return bounds


def facts(metadata: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Flatten metadata into (fact, number) pairs: 1 for what is there and equal, the value for what has an order.

    Raises:
        DataError: naming the key whose value is not JSON (a NaN, an object of a Python class).
    """
    found: dict[tuple[str, float], None] = {}  # a set that keeps its order
    for path, value in _leaves("", metadata):
        lasting = isinstance(value, str) and len(value) > LONGEST_FACT
        found.update(_facts_of(path, value) if lasting else _known_facts(path, value))
    return list(found)


def _facts_of(path: str, value: Any) -> dict[tuple[str, float], None]:
    """The facts of one leaf."""
    found = {(_exists(path), 1.0): None}
    if value is None:
        return found
    if not _finite(value):
        raise _no_json(path, value)
    found[_equals(path, value), 1.0] = None
    if _is_number(value):
        found[_number(path), float(value)] = None
    elif isinstance(value, str) and (seconds := _timestamp(value)) is not None:
        found[_date(path), seconds] = None
    return found


#: The same, for what many passages have: most of what a leaf costs. `typed`, for True is not 1.
_known_facts = lru_cache(maxsize=1 << 14, typed=True)(_facts_of)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, scalar) for every scalar, and (path, None) for every non-empty object on the way."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise DataError(f"metadata: key {_show(key)} under '{path}' is not a string")
            below = f"{path}.{key}" if path else key
            if isinstance(item, _SCALARS):
                yield below, item
                continue
            leaves = list(_leaves(below, item))
            yield from leaves
            if leaves and isinstance(item, Mapping | list | tuple):
                yield below, None
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(path, item)
    elif isinstance(value, _SCALARS):
        yield path, value
    elif value is not None:
        raise _no_json(path, value)


def _no_json(path: str, value: Any) -> DataError:
    return DataError(f"metadata: '{path}' is {_show(value)}; values are JSON: strings, finite numbers, lists, ...")


def matches(node: Node | None, metadata: Mapping[str, Any]) -> bool:
    """Tell whether one passage's metadata passes the filter."""
    if node is None:
        return True
    keys = _keys(node)
    held: dict[str, list[float]] = {}
    for fact, value in facts(metadata if "" in keys else _about(metadata, keys)):
        held.setdefault(fact, []).append(value)
    return _passes(node, held)


def _passes(node: Node, held: Mapping[str, list[float]]) -> bool:
    if isinstance(node, Not):
        return not _passes(node.node, held)
    if isinstance(node, AllOf):
        return all(_passes(child, held) for child in node.nodes)
    if isinstance(node, AnyOf):
        return any(_passes(child, held) for child in node.nodes)
    if isinstance(node, HasFact):
        return any(fact in held for fact in node.facts)
    return any(node.holds_one(value) for value in held.get(node.fact, ()))


def needed_texts(node: Node | None) -> list[tuple[str, ...]]:
    """Texts of which one must stand in the metadata of whatever passes, a choice for each condition that asks so.

    What says nothing here (ranges, numbers, `not`, alternatives, texts too long to be facts) asks for no text.
    """
    if isinstance(node, AllOf):
        return [choice for child in node.nodes for choice in needed_texts(child)]
    if not isinstance(node, HasFact) or len(node.facts) > MOST_TEXTS:
        return []
    values = [json.loads(fact[1:])[1] if fact.startswith("=[") else None for fact in node.facts]
    texts = tuple(value for value in values if isinstance(value, str))
    return [texts] if len(texts) == len(values) else []


@lru_cache(maxsize=64)
def _keys(node: Node) -> tuple[str, ...]:
    """The keys that a filter is about."""
    if isinstance(node, HasFact | InRange):
        return (node.key,)
    below = (node.node,) if isinstance(node, Not) else node.nodes
    return tuple(dict.fromkeys(key for child in below for key in _keys(child)))


def _about(metadata: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The part of the metadata that has facts about these keys: what leads to one, and what is below it."""
    return {
        name: value
        for name, value in metadata.items()
        if any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for key in keys)
    }


def mask(node: Node | None, lookup: Lookup, rows: int) -> np.ndarray:
    """Evaluate a filter over rows 0 .. rows-1 from inverted lists of their facts; (rows,) bool."""
    if node is None:
        return np.ones(rows, bool)
    if isinstance(node, Not):
        return ~mask(node.node, lookup, rows)
    if isinstance(node, AllOf):
        return np.logical_and.reduce([mask(child, lookup, rows) for child in node.nodes])
    if isinstance(node, AnyOf):
        return np.logical_or.reduce([mask(child, lookup, rows) for child in node.nodes])
    passing = np.zeros(rows, bool)
    if isinstance(node, InRange):
        found, values = lookup(node.fact)
        passing[found[node.holds(values)]] = True
    else:
        for fact in node.facts:
            passing[lookup(fact)[0]] = True
    return passing


def _equals(path: str, value: str | int | float) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _short("=", [path, value])


def _exists(path: str) -> str:
    return _short("?", path)


def _number(path: str) -> str:
    return _short("#", path)


def _date(path: str) -> str:
    return _short("@", path)


def _short(kind: str, content: Any) -> str:
    fact = kind + _ENCODE(content)  # ASCII: lone surrogates and NUL bytes are escaped
    if len(fact) <= LONGEST_FACT:
        return fact
    return kind + hashlib.blake2b(fact.encode(), digest_size=16).hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)


def _finite(value: Any) -> bool:
    """False for NaN, infinities, and integers that no double can hold."""
    try:
        return isinstance(value, str) or math.isfinite(value)
    except OverflowError:
        return False


def _timestamp(value: Any) -> float | None:
    """Seconds since 1970 of an ISO 8601 date or time (UTC unless it says otherwise); None for anything else."""
    if not isinstance(value, str) or not (found := _DATE.fullmatch(value)):
        return None
    if fraction := found[3]:  # Python 3.10 reads three or six digits only
        value = value.replace(fraction, fraction.ljust(7, "0"))
    try:
        time = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        return None
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH).total_seconds()


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
