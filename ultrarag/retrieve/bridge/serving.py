"""Serving on a bridge: the old generation's engine seen through a map, and a thread that encodes what searches met."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ultrarag.errors import IndexStateError
from ultrarag.maps import LinearMap
from ultrarag.retrieve.bridge.kept import KEPT, Fresh, Kept, fill
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.engines import Backend
from ultrarag.retrieve.generation import Generation, Serving, VectorSet
from ultrarag.retrieve.passages import Store
from ultrarag.retrieve.ranking import Scored, ranked
from ultrarag.retrieve.search import Filter
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

logger = logging.getLogger("ultrarag")

#: Candidates of a search that are scored anew.
CANDIDATES = 50
#: Passages waiting to be encoded at most, and how many are encoded at a time.
WAITING, CHUNK_TEXTS = 2000, 16
#: Seconds without a search after which they are encoded, and after which they are encoded all the same: a search waits
#: for the passages that are just being encoded.
LULL, PATIENCE = 0.05, 1.0


class BridgedVectors:
    """The old generation's engine, seen through a map by the new encoder's queries; writes go to the old one."""

    def __init__(self, old: VectorSet, item: LinearMap, kept: Kept, store: Store, fingerprint: str) -> None:
        """Use vectors that were joined; `close` leaves them."""
        self._old, self._map, self._kept, self._store = old, item, kept, store
        self._fresh = Fresh(kept)
        self.directory = old.backend.directory
        self.schema = replace(old.backend.schema, fingerprint=fingerprint)
        #: told the ids of candidates without a new vector
        self.missed: Callable[[Sequence[str]], object] = lambda ids: None

    def search_dense(self, vector: np.ndarray, k: int, filter: Filter = None, exact: bool = False) -> list[Scored]:
        """The k best of the candidates that the transposed map finds, and of those that have new vectors."""
        query, _ = self._map.transposed(vector)
        depth = min(max(k, CANDIDATES), max(1, self._old.backend.count()))
        found = self._old.backend.search_dense(query, depth, filter, exact)
        ids = [id for id, _ in found]
        if filter is None:  # the old vectors alone know what a filter lets through
            ids = list(dict.fromkeys([*ids, *self._fresh.search(vector, CANDIDATES)]))
        scores = self.score_dense(vector, ids)
        held = np.flatnonzero(~np.isnan(scores))
        return ranked([ids[place] for place in held], scores[held], k)

    def score_dense(self, vector: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Inner products with given passages, (len(ids),); NaN for an id that is not stored."""
        scores = np.full(len(ids), np.nan, np.float32)
        if not len(ids):
            return scores
        held = [place for place, score in enumerate(self._old.backend.score_dense(vector, ids)) if not np.isnan(score)]
        if held:
            scores[held] = self.dense([ids[place] for place in held]) @ vector
        return scores

    def dense(self, ids: Sequence[str]) -> np.ndarray:
        """New vectors where they are kept, else mapped ones, (len(ids), d)."""
        vectors = self._map.apply(self._old.backend.vectors(ids).dense)
        passages = self._store.get(ids)
        kept = self._kept.of(list(passages.values()))
        for place, id in enumerate(ids):
            if id in kept:
                vectors[place] = kept[id]
        self.missed([id for id in ids if id not in kept])
        return vectors

    def vectors(self, ids: Sequence[str]) -> Embeddings:
        """What passages are scored by."""
        return Embeddings(dense=self.dense(ids))

    def count(self) -> int:
        """Of the old generation."""
        return self._old.backend.count()

    def ids(self) -> Iterator[str]:
        """Of the old generation."""
        return self._old.backend.ids()

    def close(self) -> None:
        """Close what was kept, and leave the old vectors."""
        self._kept.close()
        self._old.leave()


class Filler:
    """A thread that encodes, with the new encoder, the passages that searches have met, the latest first."""

    def __init__(self, serving: Serving, store: Store, kept: Kept) -> None:
        self._serving, self._store, self._kept = serving, store, kept
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._changed = threading.Condition()
        self._stopped = False
        #: when the last search was
        self._searched = 0.0
        self._thread = threading.Thread(target=self._run, name="ultrarag-bridge", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def want(self, ids: Sequence[str]) -> None:
        """Encode these soon; the oldest wishes are forgotten when there are too many. Told at every search."""
        with self._changed:
            self._searched = time.monotonic()
            for id in ids:
                self._waiting[id] = None
                self._waiting.move_to_end(id)
            while len(self._waiting) > WAITING:
                self._waiting.popitem(last=False)
            self._changed.notify()

    def stop(self) -> None:
        """End after what is being encoded."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while (ids := self._next()) is not None:
            try:
                passages = list(self._store.get(ids).values())
                fill(self._kept, passages, self._serving.encode_passages)
            except Exception as error:  # the searches go on by mapped vectors
                logger.warning("the bridge encodes no further passages: %s", error)
                return

    def _next(self) -> list[str] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting)
            until = time.monotonic() + PATIENCE
            while not self._stopped and time.monotonic() < min(until, self._searched + LULL):
                self._changed.wait(LULL)
            if self._stopped:
                return None
            return [self._waiting.popitem()[0] for _ in range(min(CHUNK_TEXTS, len(self._waiting)))]


class Bridge:
    """The new encoder in service over the old generation's vectors."""

    def __init__(self, core: Core, generation: Generation, encoder: Encoder, item: LinearMap, folder: Path) -> None:
        old = core.live
        if not old.vectors.join():
            raise IndexStateError(f"generation {old.generation.id} was exchanged; begin again")
        self.over, self.folder = old.generation.id, folder
        try:
            self.kept = Kept(folder / KEPT)
            backend = BridgedVectors(old.vectors, item, self.kept, core.store, encoder.passage_fingerprint)
            vectors = VectorSet(_as_backend(backend), old.unencoded)
            vectors.join()
            entry = replace(generation, heads=("dense",), fingerprint=encoder.fingerprint)
            self.serving = Serving(entry, encoder, vectors)
        except BaseException:
            old.vectors.leave()
            raise
        self.backend = backend
        self.filler = Filler(self.serving, core.store, self.kept)

    @property
    def generation(self) -> int:
        """The generation whose encoder it is."""
        return self.serving.generation.id

    def open(self) -> None:
        """Encode in the background what searches meet."""
        self.backend.missed = self.filler.want
        self.filler.start()

    def close(self) -> None:
        """End it after the searches that are inside."""
        self.backend.missed = lambda ids: None
        self.filler.stop()
        self.serving.retire()


def _as_backend(bridged: BridgedVectors) -> Backend:
    """What a search needs of an engine is there; what a writer needs is not."""
    return bridged  # type: ignore[return-value]
