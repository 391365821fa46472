"""Disagreements of generations: hits that one of two generations finds for what people asked, and the other does not.

Who judges these says which of the two is right, where the judgement matters most.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ultrarag.retrieve import Hits
from ultrarag.retrieve.feedback import LoggedQuery
from ultrarag.service.console.compare import generations
from ultrarag.service.console.search import usual_weights
from ultrarag.service.state import Service

#: Queries that are compared, those asked last, and hits of each.
MOST_QUERIES, TOP = 50, 5


@dataclass(frozen=True)
class Found:
    """A hit that only one generation has among its first."""

    query: LoggedQuery
    passage_id: str
    generation: int
    #: the place there, from 1
    rank: int
    other: int


def disagreements(service: Service, queries: Iterable[LoggedQuery]) -> list[Found]:
    """Hits that nobody has judged, of the queries of which the live and another generation's differ most.

    The other one is the newest that is ready, else the previous; none are found where there is none.
    """
    ids = [entry["id"] for entry in sorted(generations(service), key=lambda entry: entry["state"] != "live")]
    judged, asked = _judged(queries)
    if len(ids) < 2 or not asked:
        return []
    how: dict[str, Any] = {"k": TOP, "weights": usual_weights(service)}
    texts = [query.text for query in asked]
    with service.live.searcher(ids[0]) as live, service.live.searcher(ids[1]) as other:
        pairs = zip(asked, live.search_many(texts, **how), other.search_many(texts, **how), strict=True)
        found = [_apart(query, one, two, judged) for query, one, two in pairs]
    return [hit for hits in sorted(found, key=len, reverse=True) for hit in hits]


def _judged(queries: Iterable[LoggedQuery]) -> tuple[set[tuple[int, str]], list[LoggedQuery]]:
    """(query, passage) pairs with votes; and the last search of each of the queries that were asked last."""
    judged: set[tuple[int, str]] = set()
    last: dict[int, LoggedQuery] = {}
    for query in queries:
        judged |= {
            (query.key, passage) for action, passage, *_ in query.events if action in ("relevant", "not_relevant")
        }
        if query.text:
            last.pop(query.key, None)  # the newest stand last
            last[query.key] = query
    return judged, list(last.values())[-MOST_QUERIES:]


def _apart(query: LoggedQuery, one: Hits, two: Hits, judged: set[tuple[int, str]]) -> list[Found]:
    """What is found on one side alone, the best places first."""
    sides = ((one, two), (two, one))
    found = [
        Found(query, hit.id, here.generation, rank, there.generation)
        for here, there in sides
        for rank, hit in enumerate(here, 1)
        if hit.id not in {other.id for other in there} and (query.key, hit.id) not in judged
    ]
    return sorted(found, key=lambda hit: hit.rank)
