"""What ties a mirror to its shared index: whatever is committed here was accepted there first.

Every transaction on the store of a mirror sends what it changed to the server before it is committed, under the lease.
So a mirror is never ahead of the server; after an error that leaves in doubt what the server did, it first reads what
is there.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ultrarag.errors import IndexStateError, UltraragError
from ultrarag.io import progress_bar
from ultrarag.retrieve.engines import COLLECTION_FILE, collection_of
from ultrarag.retrieve.generation import Catalog, Generation, IndexLayout
from ultrarag.retrieve.passages import URI, Store
from ultrarag.retrieve.shared.documents import CHUNK_ENTRIES, SharedRow, SharedState, open_documents, vector_collections
from ultrarag.retrieve.shared.lease import Lease, LeaseError
from ultrarag.retrieve.shared.mirror import (
    Checkpoints,
    apply_documents,
    apply_generations,
    changed_documents,
    fetch_generation,
    row_of,
)

#: Names in the store's table of values.
CHECKPOINTS, SYNCED = "shared_checkpoints", "shared_synced"
#: Seconds for which a write waits for another process to finish its own.
WAIT_SECONDS = 30.0
#: Seconds after the last write for which the lease is kept, so that the next one need not acquire it again.
IDLE_SECONDS = 2.0
#: Seconds between two polls of the shared state. A flip is followed after this, and the loading of the encoder.
POLL_SECONDS = 1.0

logger = logging.getLogger("ultrarag")


class Link:
    """The server's side of an index, as one process sees it; its methods may be called from any thread."""

    def __init__(self, layout: IndexLayout, store: Store, checkpoints: str | None = None) -> None:
        """Connect to the index that the store says it mirrors."""
        self.layout, self.store, self.uri = layout, store, store.get_meta(URI)
        self._lock = threading.RLock()
        self.passages = open_documents(self.uri, "passages")
        try:
            states = open_documents(self.uri, "states")
        except BaseException:
            self.passages.close()
            raise
        self._states, self.lease = states, Lease(states, layout.root)
        self._folder = checkpoints or store.get_meta(CHECKPOINTS)
        #: the state that the mirror is in step with
        self.state: SharedState | None = None
        #: operations that need the lease now, and whether an error left in doubt what the server did
        self.users, self.in_doubt = 0, False
        self._applying: int | None = None  # the thread whose transactions come from the server
        self._used = 0.0
        #: makes what the vectors hold durable, and known to the catalog
        self.flush_vectors: Callable[[], None] = lambda: None
        self._pushed = False
        store.database.before_commit, store.database.after_rollback = self._push, self._rolled_back

    def checkpoints(self, state: SharedState) -> Checkpoints:
        """The folder with the checkpoints: as this process was given it, else as the state says."""
        return Checkpoints(Path(self._folder or state.checkpoints))

    def sync(self) -> bool:
        """Bring the mirror in step with what was acknowledged; False where this process writes, and nothing is new."""
        with self._lock:
            if self.lease.held:
                return False
            state = self.lease.read()
            self._pull(state.committed)
            self._apply_state(state)
            return True

    def left_over(self) -> bool:
        """Whether nobody writes, and the last process that did has ended before passages and vectors were in step."""
        with self._lock:
            state = self.state
            if state is None or self.lease.held or (state.released and state.live.applied_seq >= state.committed):
                return False
            return self.lease.is_free(state)

    def acquire(self, patience: float | None = None) -> bool:
        """Hold the lease, in step with all that the server has; True where another process may have written before.

        Args:
            patience: seconds to wait for another process to finish; default: `WAIT_SECONDS`.
        """
        with self._lock:
            known = self._still_held()
            if not known:
                try:
                    state = self.lease.acquire(WAIT_SECONDS if patience is None else patience)
                finally:
                    self.in_doubt = self.in_doubt or self.lease.held  # until everything below is done
                self._pull(None)
                self._apply_state(state)
                if (last := self.store.last_seq()) != state.committed:
                    self.lease.write(lambda state: state.model_copy(update={"committed": last}))
                self.state, self.in_doubt = self.lease.state, False
            self.users += 1
            return not known

    def release(self) -> None:
        """End what `acquire` began; the lease is kept until a heartbeat finds that it was not used for a while."""
        with self._lock:
            self.users -= 1
            self._used = time.monotonic()

    def heartbeat(self) -> None:
        """Send a heartbeat while the lease is held, and release it when it was not used for a while."""
        with self._lock:
            if self.users or not self.lease.held or time.monotonic() - self._used < IDLE_SECONDS:
                self.lease.heartbeat()
            else:
                self._release_lease()

    def _still_held(self) -> bool:
        """Whether this process may go on writing, and knows all that the server has."""
        if not self.lease.held:
            return False
        try:
            if self.in_doubt:
                self.lease.recover()
            self.lease.check()
        except LeaseError:  # somebody took over, so what is begun now acquires the lease anew
            return False
        return not self.in_doubt

    def _settle_doubt(self) -> None:
        """Before the lease is released: what the server has beyond the last commit is committed, for all to see."""
        if self.in_doubt:
            self.acquire(0.0)
            self.release()

    def _release_lease(self) -> None:
        """Say how far the vectors are, and let another process have the lease."""
        self.flush_vectors()
        with self.store.database.reading() as db:
            rows = self._rows(Catalog.read(db))
        self.lease.write(lambda state: state.model_copy(update={"generations": rows}))
        self.lease.release()

    def close(self) -> None:
        """Release the lease, where the server can be reached, and the connections."""
        self.store.database.before_commit = self.store.database.after_rollback = None
        try:
            if self.lease.held:
                self._settle_doubt()
                self._release_lease()
        except IndexStateError:
            self.lease.abandon()
        finally:
            self.passages.close()
            self._states.close()

    def rows(self) -> dict[int, SharedRow]:
        """The generations of the state that the mirror is in step with."""
        return {row.id: row for row in self.state.generations} if self.state else {}

    def fetch_generation(self, generation: Generation) -> None:
        """Make sure that a generation that other processes built has its directory here."""
        row = self.rows().get(generation.id)
        if row is not None and row.collection and self.state is not None:
            fetch_generation(self.layout, row, self.uri, self.checkpoints(self.state))

    def prune_directories(self, live: int) -> None:
        """Remove the directories of generations that are no more; `prune_collections` drops their collections."""
        rows = self.rows().values()
        kept = {str(live), *(str(number) for row in rows for number in (row.id, row.owner))}
        for folder in self.layout.generations.iterdir():
            if folder.name.isdecimal() and folder.name not in kept:
                shutil.rmtree(folder)

    def publish_checkpoint(self, generation: Generation) -> None:
        """Put a generation's checkpoint where the other processes find it."""
        assert self.state is not None
        directory = self.layout.directory(generation.id)
        self.checkpoints(self.state).add(self.layout.checkpoint(directory), generation.fingerprint)

    def describe(self) -> dict[str, Any]:
        """For `status`."""
        state = self.state
        return {
            "uri": self.uri,
            "writing": self.lease.held,
            "epoch": state.epoch if state else 0,
            "holder": None if state is None or state.released else state.holder,
            "committed": state.committed if state else 0,
            "checkpoints": str(self.checkpoints(state).folder) if state else self._folder,
        }

    def _pull(self, until: int | None) -> None:
        """Take over passages up to a number; None: all there are, also those that nobody acknowledged."""
        synced = int(self.store.get_meta(SYNCED, "0"))
        end = self._highest() if until is None else until
        with progress_bar(end - synced, "mirror", "write", None if end - synced > 10_000 else False) as bar:
            while synced < end:
                step = min(synced + CHUNK_ENTRIES, end)
                with self._unpushed():
                    apply_documents(self.store.database, self.passages.between(synced, step), step)
                    self.store.set_meta(**{SYNCED: str(step)})
                bar.update(step - synced)
                synced = step

    def prune_collections(self) -> None:
        """Delete collections and checkpoints that no generation has; the lease is held."""
        names = {row.collection for row in self.rows().values()}
        for folder in self.layout.generations.iterdir():  # of a build, whose collection no row names yet
            if (self.layout.vectors(folder) / COLLECTION_FILE).exists():
                names.add(collection_of(self.layout.vectors(folder)))
        for collection in vector_collections(self.passages.collections(), self.passages.address.name):
            if collection.removesuffix("_tokens") not in names:
                self.lease.check()
                self.passages.drop(collection)
        assert self.state is not None
        self.checkpoints(self.state).prune({row.fingerprint for row in self.rows().values()})

    def _highest(self) -> int:
        """The last number that the server has: a writer that died may have written some beyond the last commit."""
        highest = self.lease.state.committed
        while found := self.passages.between(highest, highest + CHUNK_ENTRIES):
            highest = found[-1].seq
        return highest

    def _apply_state(self, state: SharedState) -> None:
        if self.state is None or state.generations != self.state.generations:
            with self._unpushed():
                apply_generations(self.store.database, state.generations, self.uri, state.last_generation)
        self.state = state

    @contextmanager
    def _unpushed(self) -> Iterator[None]:
        """Transactions that come from the server are not sent to it."""
        self._applying = threading.get_ident()
        try:
            yield
        finally:
            self._applying = None

    def _push(self, db: sqlite3.Connection) -> None:
        """Send what a transaction did; what is raised here undoes it."""
        if self._applying == threading.get_ident() or self.state is None:
            return
        self._pushed = False
        documents = changed_documents(db, self.state.committed)
        rows = self._rows(Catalog.read(db))
        if not documents and _without_progress(rows) == _without_progress(self.state.generations):
            return
        if self.in_doubt:
            raise IndexStateError(
                f"'{self.uri}': an earlier change failed half-way; try again, which first reads what the server has"
            )
        self._pushed = True
        self.lease.check()
        if documents:
            self.passages.put(documents)
        committed = documents[-1].seq if documents else self.state.committed
        last = max([self.state.last_generation, *(row.id for row in rows)])
        change = {"committed": committed, "generations": rows, "last_generation": last}
        self.lease.write(lambda state: state.model_copy(update=change))
        self.state = self.lease.state
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (SYNCED, str(committed)))

    def _rolled_back(self) -> None:
        """A transaction was undone here: what the server did of it is to be found out before the next."""
        self.in_doubt, self._pushed = self.in_doubt or self._pushed, False

    def _rows(self, generations: list[Generation]) -> list[SharedRow]:
        """The generations as the state has them; retired ones are not kept."""
        known = self.rows()
        return [row_of(self.layout, g, known.get(g.id)) for g in generations if g.state != "retired"]


def _without_progress(rows: list[SharedRow]) -> list[SharedRow]:
    """Without what each heartbeat may change: how far the vectors have come."""
    return [row.model_copy(update={"applied_seq": 0}) for row in rows]


class Followed(Protocol):
    """The index of this process: `ultrarag.retrieve.core.Core`, which imports this file."""

    def settle(self) -> None:
        """Finish what was begun and not finished, by this process or another; LeaseError where another one writes."""
        ...

    def keep_up(self) -> None:
        """Apply what the mirror learned."""
        ...


class Watcher:
    """The thread that keeps a process in step with a shared index: its mirror, its words, and its live pair."""

    def __init__(self, core: Followed, link: Link) -> None:
        self._core, self._link = core, link
        #: what went wrong at the last poll; "" if nothing
        self.error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ultrarag-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the poll that it is at."""
        self._stop.set()
        self._thread.join()

    def poll(self) -> None:
        """Follow what other processes wrote and swapped; while this one writes, show that it is alive."""
        self._settle()
        if self._link.lease.held:
            self._link.heartbeat()
        elif self._link.sync():
            self._core.keep_up()

    def _settle(self) -> None:
        """Without this a write that was cut off would wait, half done, for the next write of somebody."""
        if (self._link.in_doubt and not self._link.users) or self._link.left_over():
            with suppress(LeaseError):  # another process writes, or was quicker to settle it
                self._core.settle()

    def _run(self) -> None:
        while not self._stop.wait(min(POLL_SECONDS, self._link.lease.seconds / 9)):
            try:
                self.poll()
            except (UltraragError, OSError, RuntimeError) as error:
                if str(error) != self.error:
                    logger.warning("the shared index cannot be followed, searches answer from what is known: %s", error)
                self.error = str(error)
            else:
                self.error = ""
