"""A generation in service: an encoder and the vectors it made, used by many threads, closed after the last left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from ultrarag.encoder import Cuts, LateEncoder, LateShared
from ultrarag.errors import FingerprintError, IndexStateError
from ultrarag.retrieve.engines import Backend
from ultrarag.retrieve.generation.catalog import Generation
from ultrarag.retrieve.generation.replay import Unencoded
from ultrarag.types import Embeddings, Passage, text_of

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder, Lane, SharedEncoder

Clock = Callable[[], float]


class VectorSet:
    """Vectors that are open, and the passages that have none: of one generation, or of several that share them.

    Who leaves as the last one closes them.
    """

    def __init__(self, backend: Backend, unencoded: Unencoded) -> None:
        self.backend = backend
        #: passages that have no vectors, for the encoder cannot encode them
        self.unencoded = unencoded
        self._mutex, self._users = threading.Lock(), 0
        self._closed = False

    def join(self) -> bool:
        """Become a user; False where the last one has left. Waits while they are being closed."""
        with self._mutex:
            if not self._closed:
                self._users += 1
            return not self._closed

    @property
    def closed(self) -> bool:
        """Whether nobody can join any more."""
        return self._closed

    def leave(self) -> None:
        """End what `join` began."""
        with self._mutex:
            self._users -= 1
        self.close_unused()

    def close_unused(self) -> None:
        """Close them where nobody uses them; again where that failed."""
        with self._mutex:
            self._closed |= self._users == 0
            if self._closed:  # whoever opens them again needs them closed
                self.backend.close()


class Serving:
    """The pair (encoder, vectors) of one generation; a search holds on to the pair it began with."""

    def __init__(
        self,
        generation: Generation,
        encoder: Encoder,
        vectors: VectorSet,
        clock: Clock = time.monotonic,
        precisions: Mapping[Lane, str] | None = None,
    ) -> None:
        """Use vectors that were joined; `retire` leaves them.

        Args:
            precisions: of queries and passages, where they are not the encoder's.
        """
        held = vectors.backend.schema.fingerprint
        if encoder.passage_fingerprint != held:
            raise FingerprintError(
                f"generation {generation.id} holds vectors of the encoder {held[:12]}, not of "
                f"{encoder.passage_fingerprint[:12]}; open it with the encoder that built it, or build a new generation"
            )
        self.generation, self.encoder, self.vectors = generation, encoder, vectors
        self._left = False
        # one forward at a time: two would share the same cores, and both be slower
        self._shared = _shared(encoder, clock, precisions)
        #: of the passages; told when the write, or whatever encoded them, is done
        self.cuts = Cuts()
        #: passages that were encoded elsewhere: the row of each content in the vectors, and these
        self._given: tuple[Mapping[str, int], Embeddings] = {}, Embeddings()
        self._idle = threading.Condition()
        self._users, self._retiring = 0, False

    @property
    def fingerprint(self) -> str:
        """Of the encoder, both sides of it: of the queries that may be compared with the vectors."""
        return self.generation.fingerprint

    @property
    def backend(self) -> Backend:
        """The engine with the vectors."""
        return self.vectors.backend

    @property
    def unencoded(self) -> Unencoded:
        """Passages that have no vectors, for the encoder cannot encode them."""
        return self.vectors.unencoded

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that are stored."""
        return self.generation.heads

    def enter(self) -> bool:
        """Begin to use the pair; False when it is being retired, and a newer one is there."""
        with self._idle:
            if self._retiring:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        """End what `enter` began."""
        with self._idle:
            self._users -= 1
            self._idle.notify_all()

    def retire(self) -> None:
        """Let nobody in any more, wait for those inside, and close the vectors unless others share them."""
        with self._idle:
            self._retiring = True
            self._idle.wait_for(lambda: self._users == 0)
            left, self._left = self._left, True
        self._shared.close()
        if left:  # closing failed before
            self.vectors.close_unused()
        else:
            self.vectors.leave()

    def encode_queries(self, texts: Sequence[str], heads: Sequence[str]) -> Embeddings:
        """Encode queries with the given heads, together with those of other threads."""
        return self._checked(self._shared.encode(texts, "query", heads=tuple(heads)))

    def encode_passages(self, texts: Sequence[str | Passage]) -> Embeddings:
        """Encode passages with all heads stored, a few at a time, so that queries come in between."""
        held, vectors = self._given
        rows = np.array([held.get(text_of(text), -1) for text in texts])
        missing = [text for text, row in zip(texts, rows.tolist(), strict=True) if row < 0]
        if not missing and len(texts):
            return vectors[rows]
        fresh = self._checked(self._shared.encode(missing, "passage", heads=self.heads, cuts=self.cuts))
        if len(missing) == len(texts):
            return fresh
        order = np.argsort(rows < 0, kind="stable")
        return Embeddings.cat([vectors[rows[rows >= 0]], fresh])[np.argsort(order)]

    @contextmanager
    def giving(self, rows: Mapping[str, int], vectors: Embeddings) -> Iterator[None]:
        """Take the vectors of passages as they are, instead of encoding them, for a block.

        They are what this encoder gives, by the word of whoever has them: one thread at a time writes.

        Args:
            rows: the row of each content in `vectors`.
        """
        self._given = rows, vectors
        try:
            yield
        finally:
            self._given = {}, Embeddings()

    def _checked(self, embeddings: Embeddings) -> Embeddings:
        if not embeddings.heads:
            raise IndexStateError(f"generation {self.generation.id}: its encoder gave no vectors")
        return embeddings


def _shared(encoder: Encoder, clock: Clock, precisions: Mapping[Lane, str] | None) -> SharedEncoder | LateShared:
    """What joins the texts of threads."""
    if isinstance(encoder, LateEncoder):
        return LateShared(encoder, clock, precisions)
    from ultrarag.encoder import SharedEncoder

    return SharedEncoder(encoder, clock, precisions)
