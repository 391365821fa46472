"""Filters for Qdrant, over the facts that `ultrarag.retrieve.filters` takes from metadata.

A point's payload holds its facts and not the metadata itself: one list of strings under one keyword index for all
that is tested for equality, whatever keys a corpus has, and one number field per key that has an order. So the
index needed by a filter exists before the graph is built, without which filtered recall falls to 0.3.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import qdrant_edge as qdrant

from ultrarag.retrieve.filters import AllOf, AnyOf, HasFact, InRange, Node, Not, facts

#: Payload field of the facts without a number.
FACTS = "facts"
#: Payload field under which each ordered key has its numbers.
NUMBERS = "numbers"


def to_payload(id: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of a passage: its id, as JSON for ids that are not valid Unicode, and its facts."""
    held: list[str] = []
    numbers: dict[str, list[float]] = {}
    for fact, value in facts(metadata):
        if fact[0] in "#@":
            numbers.setdefault(_field(fact), []).append(value)
        else:
            held.append(fact)
    return {"id": json.dumps(id), FACTS: held, NUMBERS: numbers}


def to_filter(node: Node) -> qdrant.Filter:
    """Translate a filter's tree."""
    if isinstance(node, Not):
        return qdrant.Filter(must_not=[to_filter(node.node)])
    if isinstance(node, AllOf):
        return qdrant.Filter(must=[to_filter(child) for child in node.nodes])
    if isinstance(node, AnyOf):
        return qdrant.Filter(should=[to_filter(child) for child in node.nodes])
    if isinstance(node, HasFact):
        return qdrant.Filter(must=[qdrant.FieldCondition(FACTS, match=qdrant.MatchAny(list(node.facts)))])
    return qdrant.Filter(must=[qdrant.FieldCondition(f"{NUMBERS}.{_field(node.fact)}", range=_range(node))])


def _range(node: InRange) -> qdrant.RangeFloat:
    return qdrant.RangeFloat(gt=node.gt, gte=node.gte, lt=node.lt, lte=node.lte)


def _field(fact: str) -> str:
    """A field name without the characters that mean something in a JSON path."""
    return "n" + hashlib.blake2b(fact.encode(), digest_size=8).hexdigest()
