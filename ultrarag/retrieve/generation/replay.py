"""What follows the write log: vectors, passages that could not be encoded, and BM25; each knows how far it has come."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from ultrarag.encode import Encode, encode_apart
from ultrarag.errors import UsageError
from ultrarag.retrieve.bm25 import BM25
from ultrarag.retrieve.engines import Backend
from ultrarag.retrieve.passages import Changes, Store
from ultrarag.types import Embeddings, Passage

logger = logging.getLogger("ultrarag")


class Notes(Protocol):
    """Where it is written down which passages have no vectors."""

    def all(self) -> Mapping[str, str]:
        """Id -> reason."""
        ...

    def note(self, failed: Mapping[str, str], settled: Sequence[str]) -> None:
        """Enter passages that failed, and strike out those that were encoded or deleted."""
        ...


class Unencoded:
    """Such passages of one generation, as the index's database lists them."""

    def __init__(self, store: Store, generation: int) -> None:
        self._store, self._generation = store, generation
        self._held = store.unencoded(generation)

    def all(self) -> Mapping[str, str]:
        """See `Notes.all`."""
        return self._held

    def note(self, failed: Mapping[str, str], settled: Sequence[str]) -> None:
        """See `Notes.note`; what is new is also logged as a warning."""
        gone = [id for id in settled if id in self._held]
        if not failed and not gone:
            return
        self._store.note_unencoded(self._generation, failed, gone)
        for id in sorted(failed.keys() - self._held.keys()):
            logger.warning(
                "passage %r has no vectors in generation %d: %s; only its words can be searched; `ultrarag index "
                "retry` encodes it again, delete removes it",
                id,
                self._generation,
                failed[id],
            )
        self._held = {id: reason for id, reason in self._held.items() if id not in gone} | dict(failed)


class Noted:
    """Such passages of a build, for its parent to enter in the database."""

    def __init__(self, held: dict[str, str]) -> None:
        """`held` is kept up to date."""
        self._held = held

    def all(self) -> Mapping[str, str]:
        """See `Notes.all`."""
        return self._held

    def note(self, failed: Mapping[str, str], settled: Sequence[str]) -> None:
        """See `Notes.note`."""
        for id in settled:
            self._held.pop(id, None)
        self._held.update(failed)


#: Entries of the log applied at a time.
CHUNK_CHANGES = 512
#: A flush may cost this share of the work since the last one.
FLUSH_SHARE = 0.1
#: Flushing is not considered for fewer entries than this.
FLUSH_FROM = 256


class Target(Protocol):
    """Something derived from the passages; applying a change twice is harmless."""

    def put(self, passages: Sequence[Passage]) -> None:
        """Insert or replace passages whose text may be new."""
        ...

    def put_metadata(self, passages: Sequence[Passage]) -> None:
        """Replace the metadata of passages whose text it has."""
        ...

    def delete(self, ids: Sequence[str]) -> None:
        """Forget passages."""
        ...

    def flush(self) -> None:
        """Make it durable."""
        ...


class GenerationVectors:
    """The vectors of one generation as a target."""

    def __init__(
        self,
        backend: Backend,
        encode: Encode,
        unencoded: Notes,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """`check` is called before each write, and may refuse it."""
        self._backend, self._encode, self._unencoded, self._check = backend, encode, unencoded, check

    def put(self, passages: Sequence[Passage]) -> None:
        """Encode and store; a passage that cannot be encoded is noted, and what was stored of it before is deleted."""
        found = encode_apart(passages, self._encode)
        if found.embeddings is not None:
            self._store(found.passages, found.embeddings)
        if found.failed:
            self._check()
            self._backend.delete(list(found.failed))
        self._unencoded.note(found.failed, [passage.id for passage in found.passages])

    def put_metadata(self, passages: Sequence[Passage]) -> None:
        """Store the same vectors with new metadata; encode only where they are missing."""
        passages = [passage for passage in passages if passage.id not in self._unencoded.all()]
        if not passages:
            return
        try:
            held = self._backend.vectors([passage.id for passage in passages])
        except UsageError:
            self.put(passages)
        else:
            self._store(passages, held)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete the vectors."""
        if ids:
            self._check()
            self._backend.delete(ids)
            self._unencoded.note({}, ids)

    def flush(self) -> None:
        """Flush the engine."""
        self._backend.flush()

    def _store(self, passages: Sequence[Passage], embeddings: Embeddings) -> None:
        ids = [passage.id for passage in passages]
        self._check()  # now: encoding may have taken long
        self._backend.upsert(ids, embeddings, [passage.metadata for passage in passages])


class Words:
    """BM25 as a target; it takes new metadata by indexing the text again, which costs no encoder."""

    def __init__(self, bm25: BM25) -> None:
        self._bm25 = bm25

    def put(self, passages: Sequence[Passage]) -> None:
        """Index the words."""
        if passages:
            ids, texts = [passage.id for passage in passages], [passage.content for passage in passages]
            self._bm25.upsert(ids, texts, [passage.metadata for passage in passages])

    put_metadata = put

    def delete(self, ids: Sequence[str]) -> None:
        """Delete the words."""
        if ids:
            self._bm25.delete(ids)

    def flush(self) -> None:
        """Flush the file."""
        self._bm25.flush()


class Follower:
    """A target that is brought up to date from the log, and remembers durably how far it is.

    Its owner lets one thread at a time write; searches of the target go on meanwhile.
    """

    def __init__(self, store: Store, target: Target, applied: int, save: Callable[[int], None]) -> None:
        self._store, self._target, self._save = store, target, save
        #: the last entry of the log that the target holds, and that it holds durably
        self.applied = self.flushed = applied
        self._spent = self._flush_cost = 0.0

    def catch_up(self, until: int | None = None) -> None:
        """Apply what the log has more, up to entry `until` at least (else to its end).

        After an error everything since the last flush is applied again next time.
        """
        try:
            while (until is None or self.applied < until) and (
                changes := self._store.changes(self.applied, CHUNK_CHANGES)
            ):
                started = time.perf_counter()
                self._apply(changes)
                self._spent += time.perf_counter() - started
                self.applied = changes.seq
                if self._flush_pays():
                    self.flush()
        except BaseException:
            self.applied = self.flushed
            raise

    def refill(self, held: Iterable[str] = ()) -> None:
        """Put every passage into the target anew, and remove what else it holds, by the ids `held`."""
        seq, row = self._store.last_seq(), 0
        wanted = {passage.id for passage in self._store.passages()}
        self._target.delete([id for id in held if id not in wanted])
        while chunk := self._store.scan(row, CHUNK_CHANGES, seq):
            self._target.put([passage for _, passage in chunk])
            row = chunk[-1][0]
        self._target.flush()
        self._save(seq)
        self.applied = self.flushed = seq

    def go_on_from(self, other: Follower) -> None:
        """Be where another follower of the same target is, which follows no more."""
        self.applied, self.flushed = other.applied, other.flushed

    def again(self, ids: Sequence[str]) -> None:
        """Put passages into the target once more, durably."""
        self._target.put(list(self._store.get(ids).values()))
        self._target.flush()

    def flush(self) -> None:
        """Make what was applied durable, then say so."""
        if self.applied == self.flushed:
            return
        started = time.perf_counter()
        self._target.flush()
        self._save(self.applied)
        self.flushed = self.applied
        self._flush_cost, self._spent = time.perf_counter() - started, 0.0

    @property
    def pending(self) -> int:
        """Entries of the log that the target holds, and not durably."""
        return self.applied - self.flushed

    def _apply(self, changes: Changes) -> None:
        self._target.delete(changes.deleted)
        self._target.put_metadata(changes.metadata)
        self._target.put(changes.content)

    def _flush_pays(self) -> bool:
        """The numpy engine writes everything on each flush: the larger it is, the less often."""
        return self.pending >= FLUSH_FROM and self._flush_cost <= FLUSH_SHARE * self._spent
