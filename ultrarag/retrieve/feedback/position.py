"""Position bias: how fast examinations fall with the rank, estimated from what was shown at several ranks.

Nothing is shuffled for it. A passage that one query found at different ranks (after a swap, a write, or with other
weights) is equally relevant at each, so that its clicks differ by the rank alone (Agarwal and others, "Estimating
position bias without intrusive interventions", WSDM 2019). With P(click) = relevance / rank**eta and the clicks of each
(query, passage) fixed, relevance drops out: what is left is a likelihood of eta alone, concave, and its score is
unbiased whatever the relevances are.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ultrarag.retrieve.feedback.entries import LoggedQuery

#: What is taken until there is evidence.
ASSUMED = 1.0
#: Standard error at which an estimate is taken: with a larger one 1 is the better guess for most pages of hits.
SURE = 0.1
#: Where estimates lie: below 0 lower ranks would be looked at more, above 3 nothing but the first.
LOWEST, HIGHEST = 0.0, 3.0
#: Newton steps; five are enough from anywhere within the bounds.
STEPS = 50

#: (query's key, passage id)
Pair = tuple[int, str]


@dataclass(frozen=True)
class Position:
    """An estimate of eta."""

    #: what the rules use: the estimate where it is sure, else ASSUMED
    eta: float
    #: standard error; infinite where nothing was shown at two ranks
    error: float
    #: clicks on passages that one query found at several ranks
    clicks: int

    @property
    def known(self) -> bool:
        """Whether eta was estimated."""
        return self.error <= SURE


def estimate(queries: Iterable[LoggedQuery], clicked: Collection[Pair], most_per_client: int) -> Position:
    """Estimate eta.

    Args:
        queries: searches with their events; those without a pair of `clicked` are of no use.
        clicked: pairs that were ever clicked: only these tell anything.
        most_per_client: searches of one client that count for one query.
    """
    counts = [seen for seen in _counts(queries, set(clicked), most_per_client) if len(seen) > 1]
    eta, error = _fit([[(math.log(rank), *found) for rank, found in seen.items()] for seen in counts])
    clicks = sum(clicks for seen in counts for _, clicks in seen.values())
    return Position(eta if error <= SURE else ASSUMED, error, clicks)


def _counts(
    queries: Iterable[LoggedQuery], clicked: set[Pair], most_per_client: int
) -> Iterable[dict[int, tuple[int, int]]]:
    """Of each pair: rank -> how often it was shown there, and clicked."""
    found: dict[Pair, dict[int, tuple[int, int]]] = defaultdict(dict)
    of_client: Counter[tuple[int, str]] = Counter()
    for query in queries:
        of_client[query.key, query.client] += 1
        if query.client and of_client[query.key, query.client] > most_per_client:
            continue
        here = {passage for action, passage, *_ in query.events if action == "click"}
        for rank, (passage, _) in enumerate(query.hits, 1):
            if (pair := (query.key, passage)) in clicked:
                shown, clicks = found[pair].get(rank, (0, 0))
                found[pair][rank] = shown + 1, clicks + (passage in here)
    return found.values()


def _fit(pairs: list[list[tuple[float, int, int]]]) -> tuple[float, float]:
    """(eta, standard error), of (log rank, shown, clicked) of each pair: Newton's steps on the log-likelihood."""
    eta = ASSUMED
    for _ in range(STEPS):
        slope = information = 0.0
        for seen in pairs:
            weights = [shown * math.exp(-eta * at) for at, shown, _ in seen]
            whole, clicks = sum(weights), sum(clicked for *_, clicked in seen)
            mean = sum(weight * at for weight, (at, *_) in zip(weights, seen, strict=True)) / whole
            square = sum(weight * at * at for weight, (at, *_) in zip(weights, seen, strict=True)) / whole
            slope += clicks * mean - sum(clicked * at for at, _, clicked in seen)
            information += clicks * (square - mean * mean)
        if information <= 1e-9:
            return ASSUMED, math.inf
        step = slope / information
        eta = min(HIGHEST, max(LOWEST, eta + step))
        if abs(step) < 1e-6:
            break
    return eta, 1 / math.sqrt(information)
