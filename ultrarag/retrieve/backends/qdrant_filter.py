"""Filters for the embedded Qdrant engine, over the facts that `points` stores."""

from __future__ import annotations

import qdrant_edge as qdrant

from ultrarag.retrieve.backends.points import FACTS, NUMBERS, field
from ultrarag.retrieve.filters import AllOf, AnyOf, HasFact, InRange, Node, Not


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
    return qdrant.Filter(must=[qdrant.FieldCondition(f"{NUMBERS}.{field(node.fact)}", range=_range(node))])


def _range(node: InRange) -> qdrant.RangeFloat:
    return qdrant.RangeFloat(gt=node.gt, gte=node.gte, lt=node.lt, lte=node.lte)
