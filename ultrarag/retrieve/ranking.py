"""What every engine and BM25 agree on: which ids and which k can be asked for, and the order of the k best.

Scores are float32. Equal ones come in the order of their ids, also where the k-th place cuts through them, so that the
k best are the first k of the k + 1 best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ultrarag.errors import DataError, UsageError

#: (passage id, score)
Scored = tuple[str, float]
#: Hits up to which a tie at the k-th place is followed.
MOST_TIED = 16_384
#: A graph has 16 edges at a node: of more equal vectors than that, each knows some others only (a beam of 256
#: met 224 of 300).
MOST_TIED_IN_GRAPH = 16


def check_ids(ids: Sequence[str]) -> None:
    """Raise DataError unless every id is a non-empty string."""
    for id in ids:
        if not isinstance(id, str) or not id:
            raise DataError(f"a passage's id is a non-empty string, not {id!r}")


def check_k(k: int) -> int:
    """Return k when it is a positive integer; raise UsageError otherwise."""
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise UsageError(f"k is {k!r}; it must be a positive integer")
    return int(k)


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the places of the k highest scores, (n,), and of all that tie with the k-th, in no order."""
    if len(scores) <= k:
        return np.arange(len(scores))
    rounded = scores.astype(np.float32)
    threshold = np.partition(rounded, len(rounded) - k)[len(rounded) - k]
    return np.flatnonzero(rounded >= threshold)


def ranked(ids: Iterable[str], scores: Iterable[float], k: int) -> list[Scored]:
    """Return the k best (id, score), ties in the order of their ids."""
    rounded = np.fromiter(scores, np.float32).tolist()
    return sorted(zip(ids, rounded, strict=True), key=lambda hit: (-hit[1], hit[0]))[:k]


def through_ties(
    search: Callable[[int], list[Scored]], k: int, exact: Callable[[int], list[Scored]] | None = None
) -> list[Scored]:
    """Return the k best hits of an engine that cuts through ties as it likes.

    One hit more than k is asked for; while the last hit ties with the k-th, twice as many. A tie that goes on at
    MOST_TIED hits is cut there, whatever k is: the k best are then still the first of the k + 1 best, but which
    passages of the tie they are is the engine's choice.

    Args:
        search: returns the best n hits, as `ranked` orders them; fewer where there are no more.
        exact: the same, and compares with all; for a `search` of a graph, which need not reach every passage, nor all
            those of a large tie.
    """
    asked, most = k + 1, max(MOST_TIED, 1 << k.bit_length())
    while True:
        hits = search(asked)
        few = len(hits) < asked
        if exact is not None and (few or _largest_tie(hits) > MOST_TIED_IN_GRAPH):
            return through_ties(exact, k)
        if few or hits[-1][1] < hits[k - 1][1] or asked == most:
            return hits[:k]
        asked = min(2 * asked, most)


def _largest_tie(hits: list[Scored]) -> int:
    """How many hits have the same score, wherever they stand: a graph may have missed others of theirs."""
    return max(Counter(score for _, score in hits).values(), default=0)


def beam(hits: int, least: int) -> int:
    """How many candidates a search of a graph keeps for so many hits: the same for a hit more, nearly always."""
    return max(least, 1 << (hits - 1).bit_length())
