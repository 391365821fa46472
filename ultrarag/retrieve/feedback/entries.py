"""One search as the feedback log remembers it, what may happen to its hits, and what no log can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ultrarag.errors import UsageError

#: About a hit: these name a passage.
OF_A_PASSAGE = ("click", "cite", "relevant", "not_relevant", "unsure")
#: About the answer that was made of the hits: these name none.
OF_AN_ANSWER = ("answer_up", "answer_down")
ACTIONS = (*OF_A_PASSAGE, *OF_AN_ANSWER)
#: What happens to a hit that was shown; a label may also be given to a passage that was found elsewhere.
SHOWN = ("click", "cite")


@dataclass(frozen=True)
class LoggedQuery:
    """One search as it was remembered."""

    query_id: str
    #: seconds since 1970
    time: float
    #: of the normalised text: the same for all ways to write it (case, width, spaces)
    key: int
    #: empty where texts are only hashed
    text: str
    #: of the encoder that answered, and its generation
    fingerprint: str
    generation: int
    #: of the search: k, weights, filter, ...
    options: dict[str, Any]
    #: (passage id, score), best first
    hits: list[tuple[str, float]]
    #: keyed hash, "" where nobody was named
    client: str
    #: (action, passage id or "", client, seconds since 1970), in the order in which they came
    events: list[tuple[str, str, str, float]] = field(default_factory=list)

    def rank(self, passage_id: str) -> int | None:
        """Where a passage stood, from 1; None where it was not among the hits."""
        return next((rank for rank, (id, _) in enumerate(self.hits, 1) if id == passage_id), None)


def check_time(name: str, value: Any) -> None:
    """Refuse what SQLite would compare as a text: every number is smaller than that."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value)):
        raise UsageError(f"{name} is {value!r}; give a number of seconds since 1970, such as datetime.timestamp()")


def check_id(what: str, value: Any) -> None:
    """Refuse an id that is no text; of events and passages there may be none."""
    if value is None and what != "query":
        return
    if not isinstance(value, str):
        raise UsageError(f"the id of the {what} is {type(value).__name__}, not a string")
    if not _is_text(value):
        raise UsageError(f"the id of the {what} holds a lone surrogate, which is not text")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def hits_json(hits: Iterable[tuple[str, float]]) -> str:
    """Hits as they are kept."""
    return json.dumps([[id, round(float(score), 6)] for id, score in hits], ensure_ascii=False)


def logged(row: Sequence[Any]) -> LoggedQuery:
    """The search in a row: query_id, time, key, text, fingerprint, generation, options, hits, client."""
    hits = [(id, score) for id, score in json.loads(row[7])]
    id, at, key, text, fingerprint, generation = row[:6]
    return LoggedQuery(id, at, key, text, fingerprint, generation, json.loads(row[6]), hits, row[8])
