"""When to learn from feedback by itself: enough new rows, enough labels to judge by, at most once a day."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ultrarag.errors import UsageError
from ultrarag.retrieve.feedback.log import FeedbackLog
from ultrarag.retrieve.feedback.rows import TrainingRows

#: Seconds between two begins.
PERIODS = {"hourly": 3_600, "daily": 86_400, "weekly": 7 * 86_400}
_STATE = "schedule"


@dataclass(frozen=True)
class Readiness:
    """Whether a refresh may begin now."""

    ready: bool
    #: in words: what is missing, or what there is
    reason: str
    rows: TrainingRows | None = None


class Schedule:
    """Decides when a refresh from feedback begins; what it remembers lies in the feedback log.

    After a refused gate twice as many new rows are asked for, until a refresh is let through. It starts nothing by
    itself and swaps nothing: the gate of the refresh decides.
    """

    def __init__(
        self,
        log: FeedbackLog,
        rows: Callable[[], TrainingRows],
        every: str = "daily",
        new_rows: int = 200,
        below_first: int = 50,
        judged: int = 100,
    ) -> None:
        """Args:
        rows: makes the rows from the log.
        every: one of PERIODS.
        new_rows: fewest rows that came since the last refresh.
        below_first: fewest rows with a positive that did not stand first already.
        judged: fewest held-out queries with votes: with fewer a gate can hardly tell gain from chance.
        """
        if every not in PERIODS:
            raise UsageError(f"a schedule is one of {', '.join(PERIODS)}, not '{every}'")
        for name, value in (("new_rows", new_rows), ("below_first", below_first), ("judged", judged)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"schedule: {name} is {value!r}; give a whole number of at least 1")
        self.log, self.rows, self.every = log, rows, every
        self.new_rows, self.below_first, self.judged = new_rows, below_first, judged

    def state(self) -> dict[str, Any]:
        """When the last refresh began (seconds since 1970) and as which job, hashes of the rows learned from and tried,
        and what multiplies the threshold.
        """
        first: dict[str, Any] = {"begun": None, "job": None, "learned": [], "tried": [], "factor": 1}
        return {**first, **self.log.noted(_STATE, {})}

    def due(self, now: float | None = None) -> Readiness:
        """Say whether a refresh may begin, and what is missing if not."""
        now, state = time.time() if now is None else now, self.state()
        if state["begun"] is not None and (left := state["begun"] + PERIODS[self.every] - now) > 0:
            return Readiness(False, f"the last refresh began {self.every} ago or less; the next in {left / 3600:.1f} h")
        made = self.rows()
        # by name, not by number: old rows go while new ones come
        learned = set(state["learned"])
        new, needed = sum(id not in learned for id in self._hashes(made)), self.new_rows * state["factor"]
        below, judged = made.report["rows with a positive below rank 1"], len(made.qrels)
        missing = [
            f"{have} of {want} {what}"
            for have, want, what in (
                (new, needed, "new rows"),
                (below, self.below_first, "rows with a positive below rank 1"),
                (judged, self.judged, "held-out queries with votes"),
            )
            if have < want
        ]
        if missing:
            return Readiness(False, "too little to learn from yet: " + ", ".join(missing), made)
        return Readiness(True, f"{new} new rows, {judged} held-out queries with votes", made)

    def begun(self, rows: TrainingRows, now: float | None = None, job: str | None = None) -> None:
        """Remember that a refresh began with these rows, under a name of the caller's."""
        when = time.time() if now is None else now
        self.log.note(_STATE, {**self.state(), "begun": when, "tried": self._hashes(rows), "job": job})

    def ended(self, swapped: bool) -> None:
        """Remember how it ended: what was learned from is not new any more; a refusal doubles what is asked for."""
        state = self.state()
        if swapped:
            self.log.note(_STATE, {**state, "learned": state["tried"], "factor": 1})
        else:
            self.log.note(_STATE, {**state, "factor": state["factor"] * 2})

    def _hashes(self, made: TrainingRows) -> list[str]:
        """Of the rows' ids, which are made of the queries."""
        return [self.log.hashed(row["id"]) for row in made.rows]
