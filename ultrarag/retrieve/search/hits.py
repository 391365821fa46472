"""Hits: what a search found, and which generation answered."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from ultrarag.types import Hit


class Hits(list[Hit]):
    """The hits of one query, best first: a list that also says who answered.

    A generation that is swapped in meanwhile changes nothing here: the three values are those of the search itself.
    Slices and sums are plain lists.
    """

    #: number of the generation whose encoder encoded the query, and whose vectors were compared
    generation: int
    #: of that encoder
    fingerprint: str
    #: 32 hexadecimal digits, different for every query that was ever asked: what feedback refers to
    query_id: str

    def __init__(
        self, hits: Iterable[Hit] = (), *, generation: int, fingerprint: str, query_id: str | None = None
    ) -> None:
        super().__init__(hits)
        self.generation, self.fingerprint = generation, fingerprint
        self.query_id = uuid.uuid4().hex if query_id is None else query_id

    def with_hits(self, hits: Iterable[Hit]) -> Hits:
        """Other hits, such as these in another order, for the same query."""
        return Hits(hits, generation=self.generation, fingerprint=self.fingerprint, query_id=self.query_id)
