"""The moving parts of an open index, and the rules by which threads use them.

Writes take turns under one lock: the store first (that acknowledges them), then the vectors and the words. Searches
take no lock that a write holds: they enter the live pair and leave it.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ultrarag.encode import passages_of
from ultrarag.errors import IndexStateError, UltraragError, UsageError
from ultrarag.io import (
    UNWRITABLE,
    OwnerLock,
    named_conditions,
    only,
    remove_left_over,
    remove_stale_stages,
    resource_error,
)
from ultrarag.retrieve.bm25 import BM25
from ultrarag.retrieve.engines import remove
from ultrarag.retrieve.generation import (
    REPAIR,
    Catalog,
    Follower,
    Generation,
    IndexLayout,
    Serving,
    consent,
    encoded_of,
    open_serving,
    open_words,
)
from ultrarag.retrieve.passages import URI, Store
from ultrarag.retrieve.search import Searcher
from ultrarag.retrieve.shared import LeaseError, Link, Watcher
from ultrarag.types import Embeddings, Passage

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

logger = logging.getLogger("ultrarag")

_Result = TypeVar("_Result")
#: The named value with the output folder of a refresh that was begun: what it left when it was killed is removed.
REFRESHING = "refreshing"
#: Vectors that were given and may be lost in a kill: the log has texts, which are encoded then, minutes for 100,000.
MOST_GIVEN = 4096


class Bridging(Protocol):
    """What stands over the live generation's vectors."""

    serving: Serving
    folder: Path

    def close(self) -> None:
        """End it after the searches that are inside."""


class Running(Protocol):
    """A refresh that runs."""

    def describe(self) -> dict[str, Any]:
        """How far it is, as plain JSON values."""
        ...

    def cancel(self) -> bool:
        """Ask for its end; False where it is too late."""
        ...


class Core:
    """Store, BM25 and the live pair of an index that this process owns."""

    def __init__(
        self,
        root: Path,
        encoder: Encoder | None,
        device: str | None,
        repair: bool,
        checkpoints: str | None = None,
        reading: str = "",
        trusted: bool = False,
        late: bool = False,
    ) -> None:
        """Take the index, bring it up to date with its log, or leave everything as it was.

        Args:
            trusted: Python code that comes with the live encoder may be run here, from now on.
            reading: why nothing can be written: then the index is opened as it is, for searches alone.
            late: load the encoder when it is needed, if queries can be encoded without.
        """
        self.layout, self.device, self.reading = IndexLayout(root), device, reading
        self.writing = threading.RLock()
        #: held for a build, and for what replaces or removes generations: one at a time each
        self.building, self.flipping = threading.Lock(), threading.Lock()
        #: the refresh that runs
        self.running: Running | None = None
        #: the process of the build that runs
        self.builder: subprocess.Popen[str] | None = None
        self._lingering: list[Serving] = []
        #: held while a pair is opened
        self._opening = threading.Lock()
        #: pairs that are searched beside the live one; see `retrieve.aside`
        self._asides: list[Serving] = []
        with ExitStack() as undo:
            undo.enter_context(named_conditions(root))
            hint = "status and passages can be read meanwhile: ultrarag.retrieve.read_status"
            lock = OwnerLock(root, hint, read_only=bool(reading))
            undo.callback(lock.release)
            if not reading:
                remove_left_over(root, working=self.layout.is_building)
            self.store = Store.open(root, read_only=bool(reading))
            undo.callback(self.store.close)
            if not reading and (refreshed := self.store.get_meta(REFRESHING)):
                for folder in (Path(refreshed).parent, Path(refreshed)):
                    remove_stale_stages(folder)
            self.catalog = Catalog(self.store)
            self.link = self._linked(repair, checkpoints)
            if self.link is not None:
                undo.callback(self.link.close)
                self.link.sync()
                self.link.fetch_generation(self.catalog.live())
            if trusted and not reading:
                consent(self.layout, self.catalog.live())
            words = open_words(self.layout, self.store, bool(reading))
            self.bm25: BM25 | None = words[0] if words else None
            self.words: Follower | None = words[1] if words else None
            if self.bm25 is not None:
                undo.callback(self.bm25.close)
            live = self.catalog.live()
            serving, vectors = open_serving(
                self.layout, self.store, live, encoder, device, repair, self._check, bool(reading), late=late
            )
            undo.callback(serving.retire)
            self.device = str(serving.encoder.device)
            self._live: Serving | None = serving
            #: vectors that are open, or were, by the generation that made them: no engine is opened twice
            self._held = {live.vectors_of: serving.vectors}
            #: the encoder of a generation that is not built yet, over the live one's vectors; see `retrieve.bridge`
            self.bridge: Bridging | None = None
            self._ended: Bridging | None = None
            self.vectors: Follower = vectors
            if reading:
                self._tell_behind()
            elif self.link is None:  # else the vectors are the business of whoever writes
                self.catch_up()
                self._check_count(repair)
                self.flush()
            serving.cuts.tell()
            self._lock = lock
            self.watcher: Watcher | None = None
            if self.link is not None:
                self.link.flush_vectors = lambda: self.vectors.flush()  # those of whatever generation is live then
                self.watcher = Watcher(self, self.link)
            undo.pop_all()

    @classmethod
    def open(
        cls,
        root: Path,
        encoder: Encoder | None,
        device: str | None,
        repair: bool,
        checkpoints: str | None = None,
        trusted: bool = False,
        late: bool = False,
    ) -> Core:
        """Take the index; where nothing can be written, such as on a full disk, open it for reading and say so."""
        if not root.is_dir():
            raise IndexStateError(f"there is no index '{root}'; LiveIndex.create (ultrarag index create) makes one")
        try:
            return cls(root, encoder, device, repair, checkpoints, trusted=trusted, late=late)
        except IndexStateError as error:
            found = resource_error(error, root)
            if found is None or repair or found.errno not in UNWRITABLE:
                raise
            reason = str(found)
        core = cls(root, encoder, device, repair, checkpoints, reading=reason, late=late)
        logger.warning("%s; '%s' is opened for reading: it can be searched, and writes are refused", reason, root)
        return core

    def _tell_behind(self) -> None:
        """Say what of the log cannot be found, for nothing can be written."""
        behind = {"vectors": self.vectors.applied, **({"words": self.words.applied} if self.words else {})}
        for name, applied in behind.items():
            if (missing := self.store.last_seq() - applied) > 0:
                logger.warning(
                    "'%s': %d writes are not in the %s yet, and cannot be put there now: `get` and `passages` give "
                    "what was written, searches may not find it",
                    self.layout.root,
                    missing,
                    name,
                )

    def _check(self) -> None:
        """Before each write to the vectors; LeaseError where another process took over meanwhile."""
        if self.link is not None:
            self.link.lease.check()

    def _linked(self, repair: bool, checkpoints: str | None) -> Link | None:
        if not (uri := self.store.get_meta(URI)):
            return None
        if self.reading:
            raise IndexStateError(f"the mirror of the shared index '{uri}' must be written to be used: {self.reading}")
        if repair:
            raise UsageError(
                f"'{self.layout.root}' mirrors the shared index '{uri}', whose vectors no one process repairs: build "
                f"the same checkpoint again and swap, which encodes all passages into a new collection"
            )
        return Link(self.layout, self.store, checkpoints)

    def _check_count(self, repair: bool) -> None:
        """Find vectors that are missing, such as those of a repair that was cut off."""
        backend, unencoded = self.live.backend, self.live.unencoded
        if backend.count() != self.store.count() - len(unencoded.all()) and unencoded.all():
            unencoded.note({}, list(backend.ids()))  # stored by a retry that was killed before it struck them out
        wanted = self.store.count() - len(unencoded.all())
        if (held := backend.count()) == wanted:
            return
        if not repair:
            raise IndexStateError(f"'{backend.directory}' holds vectors of {held} passages out of {wanted}: {REPAIR}")
        self.vectors.refill(list(backend.ids()))

    @contextmanager
    def searching(self) -> Iterator[Searcher]:
        """Lend the live pair for a search; it stays whole until the search is done, whatever is swapped."""
        while True:
            serving = self.serving
            if serving.enter():
                break
        try:
            yield Searcher(serving, self.store, self.bm25)
        finally:
            serving.leave()

    @property
    def serving(self) -> Serving:
        """The pair that searches use: the live one, or that of a bridge over it."""
        bridge = self.bridge
        return self.live if bridge is None else bridge.serving

    @property
    def live(self) -> Serving:
        """The live pair."""
        serving = self._live
        if serving is None:
            raise IndexStateError(f"'{self.layout.root}' was closed; open it again")
        return serving

    def write(
        self, change: Callable[[], _Result], given: tuple[Mapping[str, int], Embeddings] | None = None
    ) -> _Result:
        """Make a durable change to the store, then bring vectors and words up to date with it.

        Args:
            given: the rows of contents in vectors, and these: they need not be encoded then.
        """
        with self.leading(), self.writing:
            _ = self.live
            result = change()
            try:
                with self.live.giving(*(given or ({}, Embeddings()))):
                    self.catch_up()
                if given is not None and self.vectors.pending >= MOST_GIVEN:
                    self.vectors.flush()
            except (UltraragError, OSError, RuntimeError, MemoryError) as error:
                raise IndexStateError(
                    f"the write is stored and will not be lost, but it cannot be searched yet: {error}; the next "
                    f"write, or opening the index again, takes it up"
                ) from error
        return result

    def settle(self) -> None:
        """Bring a shared index in step with all that its server has, where no other process is writing."""
        with self.leading(patience=0.0), self.writing:
            self.catch_up()

    @contextmanager
    def leading(self, patience: float | None = None) -> Iterator[None]:
        """Be the one process that writes to the index; of one that is not shared it is anyway.

        Args:
            patience: seconds to wait for another process to finish; default: that of the link.

        Raises:
            LeaseError: when another process is writing, and does not finish.
        """
        self.check_writable()
        with named_conditions(self.layout.root):
            if self.link is None:
                yield
                return
            with self.writing:
                _ = self.live
                if self.link.acquire(patience):
                    self.arrive()
            try:
                yield
            finally:
                self.link.release()

    def check_writable(self) -> None:
        """Raise IndexStateError where the index was opened for reading."""
        if self.reading:
            raise IndexStateError(
                f"'{self.layout.root}' is open for reading, for nothing could be written when it was opened "
                f"({self.reading}); open it again when that is settled"
            )

    def arrive(self) -> None:
        """Go on where the process that wrote before has stopped."""
        self.keep_up()
        live = self.catalog.live()
        self.vectors.applied = self.vectors.flushed = live.applied_seq

    def keep_up(self) -> None:
        """Apply what the mirror of a shared index learned: words, and another live generation."""
        if self.words is not None:
            with self.writing:
                self.words.catch_up()
        self._follow_live()
        if self.link is not None:
            for generation in self.catalog.in_state("ready"):  # so that little is left to do when it goes live
                self.link.fetch_generation(generation)
            self.link.prune_directories(self.live.generation.id)

    def _follow_live(self) -> None:
        live = self.catalog.live()
        if live.id == self.live.generation.id:
            return
        new, vectors = self.load(live)
        with self.writing:
            old, stale = self.live, self.catalog.live().id != live.id
            if not stale:
                self.replace(new, vectors)
        self.let_go(new if stale else old)

    def catch_up(self) -> None:
        """Apply the log to the words and the live vectors."""
        if self.words is not None:
            self.words.catch_up()
        self.vectors.catch_up()

    def flush(self) -> None:
        """Make words and live vectors durable."""
        if self.words is not None:
            self.words.flush()
        self.vectors.flush()

    def load(self, generation: Generation) -> tuple[Serving, Follower]:
        """Open a generation that is not live."""
        lingering, self._lingering = self._lingering, []
        for serving in lingering:
            self.let_go(serving)
        if self.link is not None:
            self.link.fetch_generation(generation)
        return self._open_beside(generation)

    def _open_beside(self, generation: Generation) -> tuple[Serving, Follower]:
        with self._opening:
            serving, follower = open_serving(
                self.layout,
                self.store,
                generation,
                device=self.device,
                check=self._check,
                read_only=bool(self.reading),
                beside=self.live,
                held=self._held.get(generation.vectors_of),
            )
            self._held = {id: vectors for id, vectors in self._held.items() if not vectors.closed}
            self._held[generation.vectors_of] = serving.vectors
        return serving, follower

    def open_aside(self, generation: Generation) -> Serving:
        """Open a generation to be searched beside the live one, with the writes so far where they can be applied now.

        They cannot while something is swapped, nor while another process writes to a shared index.
        """
        if self.link is not None:
            self.link.fetch_generation(generation)
        serving, follower = self._open_beside(generation)
        self._asides.append(serving)
        try:
            self._bring_up(serving, follower)
        except BaseException:
            self.close_aside(serving)
            raise
        return serving

    def _bring_up(self, serving: Serving, follower: Follower) -> None:
        if self.reading or not self.flipping.acquire(blocking=False):
            return
        try:
            if serving.vectors is not self.live.vectors:  # which have one follower already
                with suppress(LeaseError), self.leading(patience=0.0):
                    follower.catch_up(self.store.last_seq())
                    follower.flush()
        finally:
            self.flipping.release()
        serving.cuts.tell()

    def close_aside(self, serving: Serving) -> None:
        """End what `open_aside` began, after the searches that are inside; again is harmless."""
        if serving in self._asides:
            self._asides.remove(serving)
            self._retire(serving)

    def replace(self, new: Serving, vectors: Follower) -> None:
        """Let searches use another pair from now on; a bridge over the old one ends."""
        with self.writing:
            self._live, self.vectors = new, vectors
            if self.bridge is not None:  # closed by `let_go`, for which no writer waits
                self._ended, self.bridge = self.bridge, None

    def let_go(self, serving: Serving) -> None:
        """Close a pair that is not live; one that cannot write now is closed later: the log has what it lacks."""
        self._end_bridge()
        self._retire(serving)

    def _retire(self, serving: Serving) -> None:
        try:
            serving.retire()
        except (UltraragError, OSError) as error:
            logger.warning("generation %d cannot be closed yet: %s", serving.generation.id, error)
            self._lingering.append(serving)

    def _end_bridge(self) -> None:
        bridge, self._ended = self._ended, None
        if bridge is not None:
            bridge.close()
            shutil.rmtree(bridge.folder, ignore_errors=True)

    def stored(
        self, after: int, last: int, vectors_of: int, heads: Sequence[str], up_to_seq: int | None = None
    ) -> tuple[list[Passage], Embeddings | None]:
        """The passages of some rows that have vectors, and these: None without any.

        They are read while no write is under way, so that each vector is that of its text.

        Args:
            after, last: the rows after the first, up to the second.
            vectors_of: whose vectors are meant.
            heads: which of them.
            up_to_seq: leave out what was written after this entry of the log.

        Raises:
            IndexStateError: others are live now.
        """
        with self.writing:
            live = self.live
            if live.generation.vectors_of != vectors_of:
                raise IndexStateError(
                    f"generation {live.generation.id} went live while the vectors of generation {vectors_of} were "
                    f"read; begin again"
                )
            applied = self.vectors.applied
            found = passages_of(self.store, after, last, applied if up_to_seq is None else min(applied, up_to_seq))
            found = [passage for passage in found if passage.id not in live.unencoded.all()]
            held = live.backend.vectors([passage.id for passage in found]) if found else None
        return found, None if held is None else only(held, heads)

    def retry(self) -> dict[str, str]:
        """Encode the passages again that the live generation could not encode; return those that still fail."""
        with self.leading(), self.writing:
            self.catch_up()
            self.vectors.again(list(self.live.unencoded.all()))
            return dict(self.live.unencoded.all())

    def vacuum(self) -> None:
        """Remove the files of retired generations, and what the log and the databases no longer need."""
        with self.writing:
            self.flush()
            folders = list(self.layout.generations.iterdir())  # first: a build is in the catalog before it has a folder
            kept = [generation for generation in self.catalog.all() if generation.state != "retired"]
            names = {path.name for g in kept for path in (self.layout.final(g.id), self.layout.building(g.id))}
            for aside in list(self._asides):  # retired, maybe, and open all the same
                names |= {self.layout.final(id).name for id in (aside.generation.id, aside.generation.vectors_of)}
            shared = {self.layout.final(g.vectors_of).name for g in kept}  # maybe of a generation that is retired
            for folder in folders:
                if folder.name in shared - names:
                    shutil.rmtree(self.layout.checkpoint(folder), ignore_errors=True)
                elif folder.name not in names:
                    if self.link is None:
                        remove(self.layout.vectors(folder))
                    shutil.rmtree(folder)
            encoders = {g.fingerprint for g in kept}
            for generation in self.catalog.in_state("retired"):
                if generation.mapped_from is not None and generation.fingerprint not in encoders:
                    encoded_of(self.layout.root, generation).remove()  # given up before its builder took them
            needed = [g.base_seq if g.state == "building" and not g.shares else g.applied_seq for g in kept]
            self.store.forget(min([*needed, *([self.words.flushed] if self.words else [])]))
            if self.bm25 is not None:
                self.bm25.vacuum()
            if self.link is not None:
                self.link.prune_collections()

    def close(self) -> None:
        """Flush and close everything; searches in flight finish first; closing twice is harmless."""
        if self.watcher is not None:
            self.watcher.stop()
        with self.writing:
            if self._live is None:
                return
            self._end_bridge()
            bridge, self.bridge = self.bridge, None
            if bridge is not None:  # it is there again when the index is opened
                bridge.close()
            with named_conditions(self.layout.root), ExitStack() as parts:  # each is closed even when another cannot be
                parts.callback(self._lock.release)
                parts.callback(self.store.close)
                if self.link is not None:
                    parts.callback(self.link.close)
                if self.bm25 is not None:
                    parts.callback(self.bm25.close)
                serving, self._live = self._live, None
                for left in (*self._lingering, *self._asides):
                    parts.callback(left.retire)
                parts.callback(serving.retire)
                parts.callback(self.flush)
