"""Whose turn it is to be encoded, and how much of it: queries first, and passages by their share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Literal

#: Two lines of waiting texts: queries, which somebody waits for, and all else.
Lane = Literal["query", "passage"]
Clock = Callable[[], float]

#: The share of the time that each is sure of while both wait.
SHARES: dict[Lane, float] = {"query": 2 / 3, "passage": 1 / 3}
#: Tokens of a turn while somebody else waits, or seconds where more fit into them: what a query may have to wait for.
#: One passage, or eleven queries: of MiniLM on a CPU, eight queries together took the least time each, 5.5 ms.
TURN_TOKENS, TURN_SECONDS = 256, 0.03
#: Seconds after a meeting for which somebody else is expected.
CROWDED = 1.0
#: Seconds after queries were answered for which passages leave the model to the next ones, unless their share is due:
#: who asks one query after the other is back within a millisecond or two, and would wait for a whole turn.
LULL = 0.005


class Turns:
    """Start-time fair queueing (Goyal, Vin and Cheng, 1996) of two lanes; its owner lets one thread at a time in.

    Each lane has a tag, the time that it had over its share; the lower tag is next. A lane that comes back takes up the
    tag of the turn that is on: who did not ask has saved up one turn at most, so none is kept waiting for long.
    """

    def __init__(self, alone: int, clock: Clock = time.monotonic) -> None:
        """`alone`: tokens of a turn while nobody else is there."""
        self._alone, self._clock = alone, clock
        self._tags: dict[Lane, float] = {"query": 0.0, "passage": 0.0}
        #: the tag with which the turn began that is on, or was the last
        self._at = 0.0
        #: tokens a second, of each lane's last turn
        self._rates: dict[Lane, float] = {"query": 0.0, "passage": 0.0}
        #: since when passages have waited for queries that may come, None: they do not
        self._kept: float | None = None
        #: when the last query came, when one met somebody else, when the last were answered
        self._queried = self._met = self._answered = -CROWDED

    def arrive(self, lane: Lane, idle: bool, alone: bool) -> None:
        """Texts come to wait.

        Args:
            idle: none of their lane were there, waiting or being encoded.
            alone: nor any of the other.
        """
        if lane == "query":
            self._queried = self._clock()
        if not alone:
            self._met = self._clock()
        if idle:
            self._tags[lane] = max(self._tags[lane], self._at)

    def next(self, waiting: Collection[Lane]) -> tuple[Lane | None, float]:
        """The lane that is next, of those that wait; None, and for how many seconds to wait for queries."""
        if self._kept is not None:  # time that was kept for queries is theirs
            self._tags["query"] += (self._clock() - self._kept) / SHARES["query"]
            self._kept = None
        ahead = self._tags["passage"] - self._tags["query"]  # of what passages are sure of
        if "query" not in waiting and ahead > 0 and (left := self._answered + LULL - self._clock()) > 0:
            self._kept = self._clock()
            return None, left
        lane: Lane = "query" if "passage" not in waiting or ("query" in waiting and ahead >= 0) else "passage"
        self.begin(lane)
        return lane, 0.0

    def begin(self, lane: Lane) -> None:
        """A turn of this lane begins: what comes from now on takes up its tag."""
        self._at = self._tags[lane]

    def tokens(self, lane: Lane) -> int:
        """How many tokens a turn may have."""
        last = self._met if lane == "query" else max(self._met, self._queried)
        if self._clock() - last >= CROWDED:
            return self._alone
        return min(self._alone, max(TURN_TOKENS, int(TURN_SECONDS * self._rates[lane])))

    def ran(self, lane: Lane, seconds: float, tokens: int) -> None:
        """A turn is over."""
        self._tags[lane] += seconds / SHARES[lane]
        if seconds > 0:
            self._rates[lane] = tokens / seconds
        if lane == "query":
            self._answered = self._clock()
