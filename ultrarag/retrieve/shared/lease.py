"""Who may write to a shared index: one process at a time, without a clock that all agree on.

A lease is a collection of the server, `NAME_lease_7`: creating it is the one thing that two processes cannot both do.
The highest number counts. Its holder rewrites its state as a heartbeat; a process that sees the same state for
`seconds` by its own clock creates the next number. Before that the holder has stopped: it begins nothing when its last
heartbeat is older than a third of that time, and what it began ends within another two thirds, for the server's
`timeout` is a third too. After every write the holder looks whether a higher number exists, before it says that the
write is done: whoever takes over reads the state after its number exists, so either it has the write, or the writer
says that it failed.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ultrarag.errors import IndexStateError
from ultrarag.retrieve.shared.documents import Documents, SharedState, lease_numbers, read_state, state_key

#: Seconds between two attempts to acquire a lease that another process holds.
RETRY_SECONDS = 0.2


class LeaseError(IndexStateError):
    """Another process holds the lease, or took it over; names it."""


class Lease:
    """The right to write, as this process has it or not; every method may be called from any thread."""

    def __init__(self, states: Documents, root: Path) -> None:
        self._states, self._address = states, states.address
        self.holder = f"{socket.gethostname()}:{os.getpid()} {root}"
        #: after which the lease of a holder without a heartbeat has expired
        self.seconds = 3 * self._address.timeout
        self._mutex = threading.RLock()
        self._state: SharedState | None = None
        self._last_heartbeat = 0.0
        #: the state last seen of another holder, and since when
        self._seen: tuple[int, int, float] = (0, 0, 0.0)

    @property
    def held(self) -> bool:
        """This process holds the lease, as far as it knows."""
        return self._state is not None

    @property
    def state(self) -> SharedState:
        """The state as this process wrote it last; LeaseError without the lease."""
        if self._state is None:
            raise LeaseError(f"'{self._address.uri}': this process does not hold the lease; nothing was written")
        return self._state

    def is_free(self, state: SharedState) -> bool:
        """Whether a state that was just read belongs to no process: it was released, or its lease has expired."""
        with self._mutex:
            return self._free(state, self._numbers()[-1])

    def acquire(self, patience: float) -> SharedState:
        """Return the state under a lease of this process; waits for another holder to finish, or its lease to expire.

        Raises:
            LeaseError: when another process holds it for longer than `patience` seconds.
        """
        deadline = time.monotonic() + patience
        while True:
            with self._mutex:
                if self._state is not None:
                    self.check()
                    return self._state
                found = self._try_acquire()
            if isinstance(found, SharedState):
                return found
            if time.monotonic() > deadline and not self._overdue():
                raise LeaseError(
                    f"'{self._address.uri}' is being written to by {found}: one process writes at a time; try again "
                    f"when it has finished (should it have died, its lease expires {self.seconds:g} s after its last "
                    f"heartbeat)"
                )
            time.sleep(RETRY_SECONDS)

    def initialize(self, state: SharedState) -> bool:
        """Begin the index with this state; False where there is one."""
        with self._mutex:
            if self._numbers() or not self._claim(1):
                return False
            self._write(state.model_copy(update={"epoch": 1, "holder": self.holder}))
            return True

    def read(self) -> SharedState:
        """The newest state, whoever wrote it.

        Raises:
            IndexStateError: when the server holds no such index, or one that was never finished.
        """
        for _ in range(3):
            numbers = self._numbers()
            if not numbers:
                raise IndexStateError(
                    f"'{self._address.uri}' holds no shared index '{self._address.name}'; LiveIndex.create "
                    "(ultrarag index create) makes one"
                )
            if found := self._read_newest(numbers[-1]):
                return found  # else it was just replaced by that of a higher number
        raise IndexStateError(
            f"'{self._address.uri}': the shared index '{self._address.name}' was begun and never finished; remove it "
            f"with ultrarag.retrieve.remove_shared and create it again"
        )

    def write(self, change: Callable[[SharedState], SharedState]) -> None:
        """Rewrite the state; when this returns, whoever takes over will see it.

        Raises:
            LeaseError: when another process took over: it may have seen this or not.
        """
        with self._mutex:
            self.check()
            self._write(change(self.state))

    def check(self) -> None:
        """Make sure that what is begun now ends while the lease lasts: send a heartbeat if the last one is old."""
        with self._mutex:
            state = self.state
            if time.monotonic() - self._last_heartbeat > self.seconds / 3:
                self._confirm()  # asked first, so that a state of a dead epoch is not written
                self._write(state)

    def heartbeat(self) -> None:
        """Send a heartbeat if one is due."""
        with self._mutex:
            if self._state is not None and time.monotonic() - self._last_heartbeat > self.seconds / 9:
                self._write(self._state)

    def release(self) -> None:
        """Let another process have it at once."""
        with self._mutex:
            if self._state is not None:
                with suppress(LeaseError):  # it may be taken as soon as this is written, before we look
                    self._write(self._state.model_copy(update={"released": True}))
                self._state = None

    def recover(self) -> None:
        """After an error of which it is not known what the server did: read what it has."""
        with self._mutex:
            if self._state is not None:
                self._confirm()
                found = self._states.get([self._state.document().key])
                self._state = read_state(next(iter(found.values())), self._address.uri)
                self._last_heartbeat = float("-inf")

    def abandon(self) -> None:
        """Act as if the lease had never been acquired; others wait until it expires."""
        self._state = None

    def _write(self, state: SharedState) -> None:
        begun = time.monotonic()
        state = state.model_copy(update={"beat": state.beat + 1})
        self._states.put([state.document()])
        self._confirm(state.epoch)
        self._state, self._last_heartbeat = state, begun

    def _confirm(self, epoch: int | None = None) -> None:
        if (top := self._numbers()[-1]) != (epoch or self.state.epoch):
            self._state = None
            raise LeaseError(
                f"'{self._address.uri}': another process took over the lease ({top}) of this one, which was too slow; "
                f"what was being written may be stored or not"
            )

    def _try_acquire(self) -> SharedState | str:
        """Acquire the lease where it is free or has expired; else say who holds it."""
        state, top = self.read(), self._numbers()[-1]
        if not self._free(state, top):
            return state.holder
        if not self._claim(top + 1) or self._numbers()[-1] != top + 1:
            return state.holder
        inherited = self._read_newest(top)  # again: its writer may have gone on until our number existed
        assert inherited is not None
        fresh = {"epoch": top + 1, "holder": self.holder, "released": False, "beat": 0}
        self._write(inherited.model_copy(update=fresh))
        self._prune(top)
        return self.state

    def _free(self, state: SharedState, top: int) -> bool:
        return (state.epoch == top and state.released) or self._expired(top, state)

    def _expired(self, top: int, state: SharedState) -> bool:
        """Whether the state has been the same for too long, by this process's own clock."""
        sign = (top, state.beat if state.epoch == top else -1)
        if self._seen[:2] != sign:
            self._seen = (*sign, time.monotonic())
        return time.monotonic() - self._seen[2] > self.seconds

    def _overdue(self) -> bool:
        """The holder has missed two heartbeats: it is worth waiting until its lease expires."""
        return time.monotonic() - self._seen[2] > self.seconds / 4

    def _claim(self, number: int) -> bool:
        return self._states.claim(f"{self._address.name}_lease_{number}", f"h{uuid.uuid4().hex}")

    def _numbers(self) -> list[int]:
        return lease_numbers(self._states.collections(), self._address.name)

    def _read_newest(self, top: int) -> SharedState | None:
        """The state of the highest lease that has one: who took the last may have died before it wrote."""
        for epoch in range(top, 0, -1):
            if found := self._states.get([state_key(epoch)]):
                return read_state(found[state_key(epoch)], self._address.uri)
        return None

    def _prune(self, top: int) -> None:
        """Remove what earlier leases left."""
        for number in self._numbers():
            if number <= top:
                self._states.drop(f"{self._address.name}_lease_{number}")
        self._states.delete([state_key(number) for number in range(max(1, top - 20), top + 1)])
