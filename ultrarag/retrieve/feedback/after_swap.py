"""After a swap: whether people do less with the hits of the new generation than they did with those of the old one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ultrarag.retrieve.feedback.labels import Rules, wilson
from ultrarag.retrieve.feedback.log import FeedbackLog

#: Seconds for which a swap is watched, and of the old generation's searches before it that are compared with.
WATCHED, COMPARED = 86_400.0, 7 * 86_400.0
#: Standard deviations of each interval: of the four measures together 95 of 100 contain what is true.
Z = 2.5


@dataclass(frozen=True)
class Change:
    """One measure before and after: how often something happened, of how many; more is better."""

    what: str
    old: tuple[int, int]
    new: tuple[int, int]

    @property
    def interval(self) -> tuple[float, float]:
        """Of the new share less the old one; (-1, 1) where one of the two has not been seen.

        Newcombe's hybrid score interval of two independent proportions (Statistics in Medicine 17, 1998, method 10).
        """
        if not (self.old[1] and self.new[1]):
            return -1.0, 1.0
        (old, old_low, old_high), (new, new_low, new_high) = (
            (count / of, *wilson(count, of, Z)) for count, of in (self.old, self.new)
        )
        low = new - old - math.hypot(new - new_low, old_high - old)
        return low, new - old + math.hypot(new_high - new, old - old_low)

    @property
    def worse(self) -> bool:
        """Whether the new share is significantly smaller."""
        return self.interval[1] < 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"what": self.what, "old": self.old, "new": self.new, "interval": self.interval, "worse": self.worse}


@dataclass(frozen=True)
class Watch:
    """The live generation beside the one before it, within a day of the swap."""

    live: int
    previous: int
    #: when it went live, and until when it is watched: seconds since 1970
    since: float
    until: float
    changes: tuple[Change, ...]

    @property
    def worse(self) -> list[str]:
        """The measures of which the live generation's is significantly worse."""
        return [change.what for change in self.changes if change.worse]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        names = ("live", "previous", "since", "until", "worse")
        return {name: getattr(self, name) for name in names} | {"changes": [each.to_dict() for each in self.changes]}


def watch(log: FeedbackLog | None, live: int, previous: int, since: float, now: float) -> Watch | None:
    """Compare a generation with the one before it.

    Args:
        log: None: nothing was remembered, so that nothing changed.
        since: when it went live.

    Returns:
        None where that is more than a day ago.
    """
    if not since <= now < since + WATCHED:
        return None
    new: Mapping[str, tuple[int, int]] = {}
    old: Mapping[str, tuple[int, int]] = {}
    if log is not None:
        most = Rules().most_per_client
        new = log.outcomes(live, since, math.inf, most)
        old = log.outcomes(previous, since - COMPARED, since, most)
    return Watch(live, previous, since, since + WATCHED, tuple(Change(what, old[what], new[what]) for what in new))
