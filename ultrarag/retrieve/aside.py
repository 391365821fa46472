"""Searching one generation beside the live one: to compare two of them, query by query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation import Generation, Serving
from ultrarag.retrieve.search import Hits, Searcher
from ultrarag.types import Embeddings

#: States of a generation that has all its vectors.
WHOLE = ("live", "ready", "previous")


class GenerationSearcher:
    """One generation of a LiveIndex, open for searches whatever is live; any thread may use it, and the last closes it.

    It had all writes when it was opened (`LiveIndex.searcher` says when not). Passages that are deleted later are not
    found any more; what is added or changed later is found by its words alone, or as it was, until another is opened.
    """

    def __init__(self, core: Core, serving: Serving) -> None:
        """Use `LiveIndex.searcher`."""
        self._core, self._serving = core, serving

    def __enter__(self) -> GenerationSearcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let searches finish, and close what only this one had open; twice is harmless."""
        self._core.close_aside(self._serving)

    @property
    def generation(self) -> int:
        """Number of the generation."""
        return self._serving.generation.id

    @property
    def fingerprint(self) -> str:
        """Of its encoder."""
        return self._serving.fingerprint

    def search(self, query: str, k: int = 10, **options: Any) -> Hits:
        """As `LiveIndex.search`, in this generation.

        Raises:
            IndexStateError: it was discarded, or a later swap retired it; or this searcher was closed.
        """
        return self.search_many([query], k=k, **options)[0]

    def search_many(self, queries: Sequence[str], k: int = 10, **options: Any) -> list[Hits]:
        """As `LiveIndex.search_many`, in this generation."""
        if isinstance(queries, str):
            raise UsageError("search_many takes several queries; use search for one")
        with self._searching() as searcher:
            return searcher.search_many(list(queries), k=k, **options)

    def search_embeddings(self, embeddings: Embeddings, fingerprint: str, k: int = 10, **options: Any) -> list[Hits]:
        """As `LiveIndex.search_embeddings`, in this generation."""
        with self._searching() as searcher:
            return searcher.search_embeddings(embeddings, fingerprint, k=k, **options)

    def score(self, query: str, ids: Sequence[str], **options: Any) -> Hits:
        """As `LiveIndex.score`, in this generation."""
        with self._searching() as searcher:
            return searcher.score(query, ids, **options)

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are passages, for `evaluate`."""
        return self._core.store.existing(list(ids))

    @contextmanager
    def _searching(self) -> Iterator[Searcher]:
        _ = self._core.live  # says that the index was closed
        if not self._serving.enter():
            raise IndexStateError(f"the searcher of generation {self.generation} was closed; open it again")
        try:
            _check(self._core, self.generation)
            yield Searcher(self._serving, self._core.store, self._core.bm25)
        finally:
            self._serving.leave()


def open_searcher(core: Core, id: int) -> GenerationSearcher:
    """Open a generation; see `LiveIndex.searcher`."""
    _ = core.live
    return GenerationSearcher(core, core.open_aside(_check(core, id)))


def _check(core: Core, id: int) -> Generation:
    """The generation, which must have all its vectors, and be kept."""
    found = core.catalog.get(id)
    if found.state not in WHOLE:
        advice = (
            "it can be searched when it is ready" if found.state == "building" else "it was removed, so build it again"
        )
        raise IndexStateError(f"generation {id} is {found.state}: {advice}")
    return found
