"""A generation in service: an encoder and the vectors it made, used by many threads, closed after the last left."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.encoder import Cuts
from ultrarag.errors import FingerprintError, IndexStateError
from ultrarag.retrieve.engines import Backend
from ultrarag.retrieve.generation.catalog import Generation
from ultrarag.retrieve.generation.replay import Unencoded
from ultrarag.types import Embeddings, Kind, Passage, text_of

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

#: Passages encoded at a time: more fill a device no better.
WINDOW = {"cpu": 8, "cuda": 256}
#: Seconds of encoding passages between two chances for a query to come in, while somebody searches: a large model gets
#: one at a time, a small one all of the above. Of 0.05 or 0.1 s nobody had anything (MiniLM, two busy cores): single
#: passages took two to four times as long as in a batch, and `add` slowed down by as much.
BESIDE_SEARCHES = 0.25
#: Seconds after the last query for which somebody is taken to search.
SEARCHED = 1.0
#: Queries encoded at a time.
QUERIES = 64

Clock = Callable[[], float]


class FairLock:
    """A lock that queries and passages share by time: where both wait, the kind that had it for less time is next.

    Within a kind it is given away in the order in which it was asked for. A thread that encodes passage after passage
    would win back a plain lock each time, and by turns it would have most of the time, for its turns are the longer.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._mutex = clock, threading.Lock()
        self._waiting: dict[Kind, deque[threading.Lock]] = {"query": deque(), "passage": deque()}
        self._spent: dict[Kind, float] = {"query": 0.0, "passage": 0.0}
        self._held: Kind | None = None
        self._since = 0.0
        self._queried = -SEARCHED

    @contextmanager
    def turn(self, kind: Kind) -> Iterator[None]:
        """Hold the lock for a block."""
        self._acquire(kind)
        try:
            yield
        finally:
            self._release()

    @property
    def searched(self) -> bool:
        """Whether a query came lately."""
        return self._clock() - self._queried < SEARCHED

    def _acquire(self, kind: Kind) -> None:
        with self._mutex:
            if kind == "query":
                self._queried = self._clock()
            if not self._waiting[kind] and self._held != kind:  # who did not ask has saved nothing up
                self._spent[kind] = max(self._spent.values())
            if self._held is None:
                self._give(kind)
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting[kind].append(gate)
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C while waiting: leave the queue, or pass on what was just given
            with self._mutex:
                if gate in self._waiting[kind]:
                    self._waiting[kind].remove(gate)
                    raise
            self._release()
            raise

    def _give(self, kind: Kind) -> None:
        self._held, self._since = kind, self._clock()

    def _release(self) -> None:
        with self._mutex:
            assert self._held is not None
            self._spent[self._held] += self._clock() - self._since
            self._held = None
            if waiting := [kind for kind, gates in self._waiting.items() if gates]:
                kind = min(waiting, key=lambda kind: self._spent[kind])
                self._give(kind)
                self._waiting[kind].popleft().release()


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
        self, generation: Generation, encoder: Encoder, vectors: VectorSet, clock: Clock = time.monotonic
    ) -> None:
        """Use vectors that were joined; `retire` leaves them."""
        held = vectors.backend.schema.fingerprint
        if encoder.passage_fingerprint != held:
            raise FingerprintError(
                f"generation {generation.id} holds vectors of the encoder {held[:12]}, not of "
                f"{encoder.passage_fingerprint[:12]}; open it with the encoder that built it, or build a new generation"
            )
        self.generation, self.encoder, self.vectors = generation, encoder, vectors
        self._left = False
        # one forward at a time: two would share the same cores, and both be slower
        self._clock, self._encoding = clock, FairLock(clock)
        #: seconds of the last passages, each
        self._passage_seconds = 0.0
        # by one thread: each that ever ran a model keeps 5 to 9 MB of buffers, and helpers of its own, until it ends
        self._forward = ThreadPoolExecutor(1, thread_name_prefix="ultrarag-encode")
        #: of the passages; told when the write, or whatever encoded them, is done
        self.cuts = Cuts()
        #: vectors of passages that were encoded elsewhere, by their contents
        self._given: Mapping[str, Embeddings] = {}
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
        self._forward.shutdown(wait=False)
        if left:  # closing failed before
            self.vectors.close_unused()
        else:
            self.vectors.leave()

    def encode_queries(self, texts: Sequence[str], heads: Sequence[str]) -> Embeddings:
        """Encode queries with the given heads."""
        cuts = Cuts()
        found = self._encode(texts, "query", heads, lambda: QUERIES, cuts)
        cuts.tell()
        return found

    def encode_passages(self, texts: Sequence[str | Passage]) -> Embeddings:
        """Encode passages with all heads stored, a few at a time, so that queries come in between."""
        given = self._given
        missing = [text for text in texts if text_of(text) not in given]
        if not given or len(missing) == len(texts):
            return self._encode(texts, "passage", self.heads, self._window, self.cuts)
        parts = [given[content] for text in texts if (content := text_of(text)) in given]
        if missing:
            parts.append(self._encode(missing, "passage", self.heads, self._window, self.cuts))
        order = np.argsort(np.array([text_of(text) not in given for text in texts]), kind="stable")
        return Embeddings.cat(parts)[np.argsort(order)]

    @contextmanager
    def giving(self, vectors: Mapping[str, Embeddings]) -> Iterator[None]:
        """Take the vectors of passages with these contents as they are, instead of encoding them, for a block.

        They are what this encoder gives, by the word of whoever has them: one thread at a time writes.
        """
        self._given = vectors
        try:
            yield
        finally:
            self._given = {}

    def _window(self) -> int:
        """How many passages to encode before a query may come in."""
        most = WINDOW.get(self.encoder.device.type, WINDOW["cuda"])
        if not self._encoding.searched:
            return most
        return max(1, min(most, int(BESIDE_SEARCHES / self._passage_seconds))) if self._passage_seconds else 1

    def _encode(
        self,
        texts: Sequence[str | Passage],
        kind: Kind,
        heads: Sequence[str],
        window: Callable[[], int],
        cuts: Cuts,
    ) -> Embeddings:
        options: dict[str, Any] = {"heads": tuple(heads), "progress": False, "cuts": cuts}
        order = sorted(range(len(texts)), key=lambda row: len(text_of(texts[row])))  # little padding within a window
        parts, start = [], 0
        while start < len(texts):
            chunk = [texts[row] for row in order[start : start + window()]]
            start += len(chunk)
            with self._encoding.turn(kind):
                began = self._clock()
                parts.append(self._checked(self._forward.submit(self.encoder.encode, chunk, kind, **options).result()))
                if kind == "passage":
                    self._passage_seconds = (self._clock() - began) / len(chunk)
        place = [0] * len(order)
        for position, row in enumerate(order):
            place[row] = position
        return Embeddings.cat(parts)[place]

    def _checked(self, embeddings: Embeddings) -> Embeddings:
        if not embeddings.heads:
            raise IndexStateError(f"generation {self.generation.id}: its encoder gave no vectors")
        return embeddings
