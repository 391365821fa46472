"""MiningReport: what was found, what was refused and why, and how far negatives lie below positives."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ultrarag.io import table
from ultrarag.mining.choice import REASONS, Job

#: Bars of the margin histogram.
_BARS = 16
_LONGEST = 30


@dataclass
class Margins:
    """How many texts lie how far below their row's lowest positive; the ends of the scale hold what lies beyond."""

    low: float = 0.0
    width: float = 0.0
    #: of all candidates in the range that are not positives
    before: list[int] = field(default_factory=lambda: [0] * _BARS)
    #: of the negatives that were chosen
    after: list[int] = field(default_factory=lambda: [0] * _BARS)

    def add(self, before: Sequence[float], after: Sequence[float]) -> None:
        """Count margins; the first ones (those of a chunk of rows) set the scale."""
        if not self.width and before:
            low, high = np.quantile(before, [0.01, 0.99]).tolist()
            self.width = _nice((high - low) / (_BARS - 2) or 1.0)
            self.low = math.floor(low / self.width) * self.width
        for values, bars in ((before, self.before), (after, self.after)):
            for value in values:
                bars[min(_BARS - 1, max(0, math.floor((value - self.low) / self.width)))] += 1

    def lines(self) -> list[str]:
        """The histogram as text, from the first bar that holds something to the last."""
        used = [bar for bar in range(_BARS) if self.before[bar] or self.after[bar]]
        if not used:
            return []
        most = {"before": max(self.before), "after": max(self.after)}
        rows = [
            (
                f"{self.low + bar * self.width:+.3g} to {self.low + (bar + 1) * self.width:+.3g}",
                self.before[bar],
                self.after[bar],
                _bar(self.before[bar], most["before"]),
                _bar(self.after[bar], most["after"]),
            )
            for bar in range(used[0], used[-1] + 1)
        ]
        return table(("below the positive by", "before", "after", "", ""), rows).splitlines()


def _nice(width: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... in the decimal place of `width`."""
    place = 10.0 ** math.floor(math.log10(width))
    return next(step * place for step in (1, 2, 5, 10) if step * place >= width * (1 - 1e-9))


def _bar(value: int, most: int) -> str:
    return "#" * math.ceil(_LONGEST * value / most) if most else ""


@dataclass
class MiningReport:
    """Counts over all rows; `seconds` are those of encoding, searching and choosing."""

    rows: int = 0
    #: texts of the pool, and how many more there were that repeat one of them
    pool: int = 0
    repeated: int = 0
    #: candidates in the range by what became of them
    counts: Counter[str] = field(default_factory=Counter)
    #: rows with no negative, and with fewer than asked for
    without: int = 0
    short: int = 0
    margins: Margins = field(default_factory=Margins)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, jobs: Sequence[Job]) -> None:
        """Count the rows of a chunk."""
        before: list[float] = []
        after: list[float] = []
        for job in jobs:
            self.rows += 1
            self.counts.update(job.counts)
            self.without += not job.chosen
            self.short += job.lacking > 0
            top, found = job.positive_score, job.found
            before += (top - found.scores[~np.isin(found.numbers, job.forbidden)]).tolist()
            after += [top - job.score_of[number] for number in job.chosen if number in job.score_of]
        self.margins.add(before, after)

    @property
    def search_share(self) -> float:
        """The share of the time that went into searching."""
        total = sum(self.seconds.values())
        return self.seconds["search"] / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "rows": self.rows,
            "pool": self.pool,
            "repeated": self.repeated,
            "counts": dict(self.counts),
            "without": self.without,
            "short": self.short,
            "margins": dict(vars(self.margins)),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MiningReport:
        """Read what `to_dict` wrote."""
        counts, seconds = Counter(values["counts"]), defaultdict(float, values["seconds"])
        return cls(**{**values, "counts": counts, "seconds": seconds, "margins": Margins(**values["margins"])})

    def __str__(self) -> str:
        counts = self.counts
        head = (
            f"{counts['chosen'] + counts['filled']} negatives for {self.rows} rows, from a pool of {self.pool} texts"
            f" ({self.repeated} more were repeated); {self.short} rows have fewer than asked for, {self.without} none"
        )
        rows = [("chosen", counts["chosen"], "became a negative")]
        rows += [(name, counts[name], text) for name, text in REASONS.items() if counts[name]]
        if counts["filled"]:
            rows.append(("filled", counts["filled"], "random text of the pool, for rows with too few"))
        parts = [head, "", table(("candidates", "number", "what it means"), rows)]
        if lines := self.margins.lines():
            parts += ["", *lines]
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return "\n".join([*parts, "", f"time: {times}; searching is {100 * self.search_share:.1f} %"])
