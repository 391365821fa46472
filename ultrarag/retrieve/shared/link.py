"""What ties a mirror to its shared index: whatever is committed here was accepted there first.

Every transaction on the store of a mirror sends what it changed to the server before it is committed, under the lease.
So a mirror is never ahead of the server; after an error that leaves open what the server did, the mirror first takes
over what is there.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultrarag.errors import IndexStateError
from ultrarag.io import progress_bar
from ultrarag.retrieve.engines import COLLECTION_FILE, collection_of
from ultrarag.retrieve.generation import Catalog, Generation, IndexLayout
from ultrarag.retrieve.passages import URI, Store
from ultrarag.retrieve.shared.documents import WINDOW, open_documents, vector_collections
from ultrarag.retrieve.shared.lease import Lease, LeaseError
from ultrarag.retrieve.shared.mirror import Checkpoints, adopt, adopt_generations, entries, place, row_of
from ultrarag.retrieve.shared.state import Row, State

#: Names in the store's table of values.
CHECKPOINTS, SYNCED = "shared_checkpoints", "shared_synced"
#: Seconds for which a write waits for another process to finish its own.
PATIENCE = 30.0
#: Seconds after the last write for which the lease is kept, so that the next one need not take it again.
LINGER = 2.0


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
        self.state: State | None = None
        #: operations that need the lease now, and whether an error left open what the server did
        self.users, self.unsure = 0, False
        self._adopting: int | None = None  # the thread whose transactions come from the server
        self._used = 0.0
        #: makes what the vectors hold durable, and known to the catalog
        self.settle: Callable[[], None] = lambda: None
        self._sent = False
        store.database.before_commit, store.database.after_rollback = self._send, self._undone

    def checkpoints(self, state: State) -> Checkpoints:
        """The folder with the checkpoints: as this process was told, else as the state says."""
        return Checkpoints(Path(self._folder or state.checkpoints))

    def follow(self) -> bool:
        """Bring the mirror in step with what was acknowledged; False where this process writes, and nothing is new."""
        with self._lock:
            if self.lease.held:
                return False
            state = self.lease.look()
            self._sync(state.committed)
            self._take_over(state)
            return True

    def take(self) -> bool:
        """Hold the lease, in step with all that the server has; True where another process may have written before."""
        with self._lock:
            known = self._still_held()
            if not known:
                try:
                    state = self.lease.take(PATIENCE)
                finally:
                    self.unsure = self.unsure or self.lease.held  # until everything below is done
                self._sync(None)
                self._take_over(state)
                if (last := self.store.last_seq()) != state.committed:
                    self.lease.write(lambda state: state.model_copy(update={"committed": last}))
                self.state, self.unsure = self.lease.state, False
            self.users += 1
            return not known

    def leave(self) -> None:
        """End what `take` began; the lease is kept until `rest` finds that nobody came back."""
        with self._lock:
            self.users -= 1
            self._used = time.monotonic()

    def rest(self) -> None:
        """Give a sign of life while the lease is held, and release it when it was not used for a while."""
        with self._lock:
            if self.users or not self.lease.held or time.monotonic() - self._used < LINGER:
                self.lease.beat()
            else:
                self._release()

    def _still_held(self) -> bool:
        """Whether this process may go on writing, and knows all that the server has."""
        if not self.lease.held:
            return False
        try:
            if self.unsure:
                self.lease.recover()
            self.lease.check()
        except LeaseError:  # somebody took over, so what is begun now takes the lease anew
            return False
        return not self.unsure

    def _release(self) -> None:
        """Say how far the vectors are, and let another process have the lease."""
        if not self.unsure:
            self.settle()
            with self.store.database.reading() as db:
                rows = self._rows(Catalog.read(db))
            self.lease.write(lambda state: state.model_copy(update={"generations": rows}))
        self.lease.release()

    def close(self) -> None:
        """Release the lease, where the server can be reached, and let go of the connections."""
        self.store.database.before_commit = self.store.database.after_rollback = None
        try:
            if self.lease.held:
                self._release()
        except IndexStateError:
            self.lease.forget()
        finally:
            self.passages.close()
            self._states.close()

    def rows(self) -> dict[int, Row]:
        """The generations of the state that the mirror is in step with."""
        return {row.id: row for row in self.state.generations} if self.state else {}

    def place(self, generation: Generation) -> None:
        """Make sure that a generation that other processes built has its directory here."""
        row = self.rows().get(generation.id)
        if row is not None and row.collection and self.state is not None:
            place(self.layout, row, self.uri, self.checkpoints(self.state))

    def tidy(self, live: int) -> None:
        """Remove the directories of generations that are no more; their collections are `sweep`'s."""
        kept = {str(live), *(str(number) for number in self.rows())}
        for folder in self.layout.generations.iterdir():
            if folder.name.isdecimal() and folder.name not in kept:
                shutil.rmtree(folder)

    def share(self, generation: Generation) -> None:
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

    def _sync(self, until: int | None) -> None:
        """Take over passages up to a number; None: all there are, also those that nobody acknowledged."""
        synced = int(self.store.get_meta(SYNCED, "0"))
        end = self._highest() if until is None else until
        with progress_bar(end - synced, "mirror", "write", None if end - synced > 10_000 else False) as bar:
            while synced < end:
                step = min(synced + WINDOW, end)
                with self._quietly():
                    adopt(self.store.database, self.passages.between(synced, step), step)
                    self.store.set_meta(**{SYNCED: str(step)})
                self.store.recount()
                bar.update(step - synced)
                synced = step

    def sweep(self) -> None:
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
        self.checkpoints(self.state).remove_others({row.fingerprint for row in self.rows().values()})

    def _highest(self) -> int:
        """The last number that the server has: a writer that died may have written some beyond the last commit."""
        highest = self.lease.state.committed
        while found := self.passages.between(highest, highest + WINDOW):
            highest = found[-1].seq
        return highest

    def _take_over(self, state: State) -> None:
        if self.state is None or state.generations != self.state.generations:
            with self._quietly():
                adopt_generations(self.store.database, state.generations, self.uri, state.last_generation)
        self.state = state

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Transactions that come from the server are not sent to it."""
        self._adopting = threading.get_ident()
        try:
            yield
        finally:
            self._adopting = None

    def _send(self, db: sqlite3.Connection) -> None:
        """Send what a transaction did; what is raised here undoes it."""
        if self._adopting == threading.get_ident() or self.state is None:
            return
        self._sent = False
        documents = entries(db, self.state.committed)
        rows = self._rows(Catalog.read(db))
        if not documents and _settled(rows) == _settled(self.state.generations):
            return
        if self.unsure:
            raise IndexStateError(
                f"'{self.uri}': an earlier change failed half-way; try again, which looks what there is"
            )
        self._sent = True
        self.lease.check()
        if documents:
            self.passages.put(documents)
        committed = documents[-1].seq if documents else self.state.committed
        last = max([self.state.last_generation, *(row.id for row in rows)])
        change = {"committed": committed, "generations": rows, "last_generation": last}
        self.lease.write(lambda state: state.model_copy(update=change))
        self.state = self.lease.state
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (SYNCED, str(committed)))

    def _undone(self) -> None:
        """A transaction was undone here: what the server did of it is to be found out before the next."""
        self.unsure, self._sent = self.unsure or self._sent, False

    def _rows(self, generations: list[Generation]) -> list[Row]:
        """The generations as the state has them; retired ones are not kept."""
        known = self.rows()
        return [row_of(self.layout, g, known.get(g.id)) for g in generations if g.state != "retired"]


def _settled(rows: list[Row]) -> list[Row]:
    """Without what each beat may change: how far the vectors have come."""
    return [row.model_copy(update={"applied_seq": 0}) for row in rows]
