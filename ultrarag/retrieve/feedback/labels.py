"""From events to labels: what votes, citations and clicks say about a query and a passage, and what they do not.

Clicks are biased by the order in which hits stand and are noisy: a passage counts as relevant, or as not, where the
Wilson interval of its clicks over its examinations says so, and as nothing otherwise. A hit at rank r is examined in
1 / r**eta of the searches that showed it (the position-based model of Joachims and others, WSDM 2017). That nobody
clicked is never taken as a vote.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Real

from ultrarag.errors import UsageError
from ultrarag.retrieve.feedback.entries import LoggedQuery
from ultrarag.retrieve.feedback.position import ASSUMED

#: Where a label comes from, the strongest first.
SOURCES = ("vote", "citation", "clicks")


@dataclass(frozen=True)
class Rules:
    """The thresholds of the rules; each is a proposal that the simulation in `benchmarks/feedback.py` was run with."""

    #: how fast examinations fall with the rank; None: estimated from the log, 1 until that tells it
    eta: float | None = None
    #: share of examinations that end in a click, above which a passage is relevant, and below which it is not
    click_rate: float = 0.3
    #: standard deviations of the interval: 1.96 is 95 %
    z: float = 1.96
    #: fewest clicks for relevant, fewest examinations for not relevant
    clicks: int = 2
    examinations: float = 2.0
    #: searches of one client that count for one query: nobody decides alone by asking again and again
    most_per_client: int = 3
    #: share of the queries that are held out for ever, by a hash of the query
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "eta" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
                raise UsageError(f"rules: {each.name} is {value!r}; give a number of at least 0")
        for name in ("click_rate", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"rules: {name} is {getattr(self, name)}; give a share between 0 and 1")


@dataclass
class Label:
    """What is known of one passage for one query."""

    relevant: bool
    #: one of SOURCES
    source: str
    #: best rank at which it was shown; None where it never was
    rank: int | None


@dataclass(slots=True)
class Evidence:
    """What was seen of one passage for one query.

    Most passages were only shown: there are ten of these for each search, so that an empty one must be small.
    """

    #: client -> its last vote: True relevant, False not; voters without a name are told apart by their search
    votes: dict[str, bool] | None = None
    #: number of searches whose answer cited it and was not voted down
    cited: int = 0
    #: of them those whose answer was voted up
    confirmed: int = 0
    #: number of searches in which it was clicked, and how often it was examined
    clicked: int = 0
    examined: float = 0.0
    rank: int | None = None


@dataclass
class Asked:
    """All searches for one query, however it was written."""

    key: int
    #: as it was last written
    text: str = ""
    searches: int = 0
    passages: dict[str, Evidence] = field(default_factory=lambda: defaultdict(Evidence))
    #: answers that were voted down, and up
    down: int = 0
    up: int = 0


def gathered(queries: Iterable[LoggedQuery], rules: Rules) -> dict[int, Asked]:
    """Bring the searches of each query together; the oldest come first."""
    found: dict[int, Asked] = {}
    counted: dict[tuple[int, str], int] = defaultdict(int)
    for query in queries:
        asked = found.setdefault(query.key, Asked(query.key))
        asked.text = query.text or asked.text
        asked.searches += 1
        _votes(asked, query)
        if query.client:
            counted[query.key, query.client] += 1
            if counted[query.key, query.client] > rules.most_per_client:
                continue
        _signals(asked, query, rules)
    return found


def _votes(asked: Asked, query: LoggedQuery) -> None:
    for action, passage, client, _ in query.events:
        if action in ("relevant", "not_relevant", "unsure"):
            evidence = asked.passages[passage]
            evidence.votes = votes = {} if evidence.votes is None else evidence.votes
            voter = client or f"search {query.query_id}"
            votes.pop(voter, None)
            if action != "unsure":  # takes a vote back
                votes[voter] = action == "relevant"


def _signals(asked: Asked, query: LoggedQuery, rules: Rules) -> None:
    of_answer = {action for action, *_ in query.events}
    asked.down += "answer_down" in of_answer
    asked.up += "answer_up" in of_answer
    for rank, (passage, _) in enumerate(query.hits, 1):
        evidence = asked.passages[passage]
        evidence.examined += rank ** -(ASSUMED if rules.eta is None else rules.eta)
        evidence.rank = min(rank, evidence.rank or rank)
    for action, passage in {(action, passage) for action, passage, *_ in query.events}:  # twice counts once
        if action == "click":
            asked.passages[passage].clicked += 1
        elif action == "cite" and "answer_down" not in of_answer:
            asked.passages[passage].cited += 1
            asked.passages[passage].confirmed += "answer_up" in of_answer


def label(evidence: Evidence, rules: Rules) -> Label | None:
    """What the evidence says, the strongest source first; None where it says nothing, or people disagree."""
    if evidence.votes:
        votes = set(evidence.votes.values())
        return Label(votes.pop(), "vote", evidence.rank) if len(votes) == 1 else None
    if evidence.cited and (evidence.confirmed or evidence.clicked):
        return Label(True, "citation", evidence.rank)
    clicks = evidence.clicked
    low, high = wilson(clicks, evidence.examined, rules.z)
    if clicks >= rules.clicks and low > rules.click_rate:
        return Label(True, "clicks", evidence.rank)
    if evidence.examined >= rules.examinations and high < rules.click_rate and not evidence.cited:
        return Label(False, "clicks", evidence.rank)
    return None


def wilson(clicks: float, examinations: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of clicks / examinations (E. B. Wilson, 1927); (0, 1) without examinations.

    Examinations are expected ones, so that there may be fewer of them than clicks: the rate is 1 then.
    """
    if examinations <= 0:
        return 0.0, 1.0
    rate, spread = min(clicks / examinations, 1.0), z * z / examinations
    middle = rate + spread / 2
    width = z * math.sqrt(rate * (1 - rate) / examinations + spread / (4 * examinations))
    return max(0.0, (middle - width) / (1 + spread)), min(1.0, (middle + width) / (1 + spread))


def unverified(asked: Asked, rules: Rules) -> list[str]:
    """Passages that are cited for a query without a second signal, and so have no label: a reranker may be asked."""
    return [
        id
        for id, evidence in asked.passages.items()
        if evidence.cited and not evidence.votes and label(evidence, rules) is None
    ]


def is_held_out(key: int, rules: Rules) -> bool:
    """Whether a query is held out for ever: by its key, so that it is on the same side everywhere and always."""
    return key % 10_000 < round(rules.held_out * 10_000)
