"""Judgements (qrels) as users give them: checked, and compared with the passages that a search can find."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Integral
from typing import Any

from ultrarag.errors import DataError, UsageError

#: query id -> passage id -> relevance; 0 and below is not relevant
Qrels = Mapping[str, Mapping[str, int]]


def relevance(value: Any) -> int:
    """Return a relevance as an integer: 1, "1", 1.0, "1.0" and numpy's numbers all mean 1.

    Raises:
        ValueError: it is no whole number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a whole number") from None
    if not number.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def checked_qrels(qrels: Any) -> dict[str, dict[str, int]]:
    """Return qrels with ids as strings and relevances as integers; a query may have a list of its relevant passages.

    Raises:
        UsageError: naming query and passage of what cannot be read so.
    """
    if not isinstance(qrels, Mapping):
        raise UsageError(f"qrels is {type(qrels).__name__}; it maps a query's id to {{passage id: relevance}}")
    return {_id_of(query_id, "a query"): _judged(query_id, judged) for query_id, judged in qrels.items()}


def checked_queries(queries: Any) -> dict[str, str]:
    """Return queries with ids as strings; UsageError names what is no id."""
    if not isinstance(queries, Mapping):
        raise UsageError(f"queries is {type(queries).__name__}; it maps a query's id to its text")
    return {_id_of(query_id, "a query"): text for query_id, text in queries.items()}


def _judged(query_id: Any, judged: Any) -> dict[str, int]:
    if isinstance(judged, list | tuple | set | frozenset):
        return {_id_of(passage_id, f"a passage judged for query '{query_id}'"): 1 for passage_id in judged}
    if not isinstance(judged, Mapping):
        raise UsageError(
            f"qrels: query '{query_id}' has {judged!r:.60}; give {{passage id: relevance}}, or a list of the ids of "
            "its relevant passages"
        )
    found = {}
    for passage_id, value in judged.items():
        id = _id_of(passage_id, f"a passage judged for query '{query_id}'")
        try:
            found[id] = relevance(value)
        except ValueError as error:
            raise UsageError(f"qrels: the relevance of passage '{id}' for query '{query_id}': {error}") from None
    return found


def _id_of(value: Any, whose: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    raise UsageError(f"qrels: the id of {whose} is {value!r:.60}; an id is a string or an integer")


def coverage(qrels: Qrels, existing: Callable[[list[str]], Collection[str]]) -> list[str]:
    """Say how many of the relevant passages are missing where it is searched; nothing where all are there.

    Args:
        existing: gives those of some ids that are there.

    Raises:
        DataError: no passage is relevant, or none of those that are is there: every model would measure 0.
    """
    relevant = {query_id: {id for id, grade in row.items() if grade > 0} for query_id, row in qrels.items()}
    wanted = sorted(set().union(*relevant.values()))
    if not wanted:
        raise DataError(f"no passage is relevant to any of the {len(qrels)} judged queries: nothing can be measured")
    held = set(existing(wanted))
    missing = [id for id in wanted if id not in held]
    if len(missing) == len(wanted):
        raise DataError(
            f"none of the {len(wanted)} relevant passages is in the index, '{wanted[0]}' for one, so every model would "
            "measure 0: add them, or give the qrels the ids of the index (such as 'doc#0' where documents were split)"
        )
    if not missing:
        return []
    lost = sum(bool(ids) and ids.isdisjoint(held) for ids in relevant.values())
    return [
        f"{len(missing)} of {len(wanted)} relevant passages are not in the index, '{missing[0]}' for one, and cannot "
        f"be found; {lost} of {len(qrels)} queries have none left and count as 0"
    ]
