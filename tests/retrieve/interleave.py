"""Threads that take turns where a test says: every interleaving of an index's operations can be played, and again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

#: Seconds after which a thread that should have paused is stuck on a lock that the test does not know.
STUCK = 120.0


#: Stop at the next pause, whichever it is.
ANY = "any"


class Killed(BaseException):
    """The process died here."""


class Actor:
    """One thread; it runs only while it has the turn."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        self.name, self.error, self.done = name, None, False
        self.at, self._until = "start", ANY
        self.ready: Callable[[], bool] = lambda: True
        #: raised in the thread when it goes on
        self.fate: type[BaseException] | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def step(self, until: str = ANY) -> None:
        """Run to a pause, to the end, or until something is not ready."""
        self._until = until
        self._go.release()
        if not self._back.acquire(timeout=STUCK):
            raise RuntimeError(f"{self.name} is stuck after '{self.at}'")

    def pause(self, at: str, ready: Callable[[], bool] = lambda: True) -> None:
        """Give the turn away if it was wanted back here, or if `ready` says so (in the thread itself)."""
        self.at, self.ready = at, ready
        if self._until in (at, ANY) or self.fate is not None:
            self._give()
        while not ready():
            self._give()

    def _give(self) -> None:
        """A change of threads is the dear part of this: it waits for the machine's scheduler, twice."""
        if self.fate is None:
            self._back.release()
            self._go.acquire()
        if (fate := self.fate) is not None:
            self.fate = fate if fate is Killed else None  # an interrupt comes once
            raise fate

    def _run(self, work: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if self.fate is None:
                work()
        except BaseException as error:
            self.error = error
        self.done = True
        self._back.release()


class Interleaving:
    """The actors of one process, of which at most one runs."""

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        #: called at every pause, in the thread that runs
        self.watch: Callable[[], None] = lambda: None
        self._by_thread: dict[threading.Thread, Actor] = {}

    def start(self, name: str, work: Callable[[], Any]) -> Actor:
        """Add an actor, which waits for its first turn."""
        actor = Actor(name, work)
        self.actors.append(actor)
        self._by_thread[actor._thread] = actor
        return actor

    def pause(self, at: str, ready: Callable[[], bool] = lambda: True) -> None:
        """A point at which another actor may go on; the test's own thread passes."""
        actor = self._by_thread.get(threading.current_thread())
        if actor is not None:
            if actor.fate is None:
                self.watch()
            actor.pause(at, ready)
        else:
            assert ready(), f"the test would wait for ever at '{at}'"

    def runnable(self) -> list[Actor]:
        """The actors that could go on."""
        return [actor for actor in self.actors if not actor.done and actor.ready()]

    def finish(self) -> None:
        """Let all of them end, in turn."""
        while able := self.runnable():
            for actor in able:
                if not actor.done and actor.ready():
                    actor.step(until="")
        assert all(actor.done for actor in self.actors), [(a.name, a.at) for a in self.actors if not a.done]

    def kill(self) -> None:
        """End all of them where they are; what they still do on their way out is not looked at."""
        for actor in self.actors:
            actor.fate = Killed
        for actor in self.actors:
            while not actor.done:
                actor.step()

    def points(self, owner: Any, *names: str) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Wrap functions so that there is a pause before and after each; for `monkeypatch.setattr`."""
        return [(owner, name, self._wrapped(getattr(owner, name), name)) for name in names]

    def _wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def paused(*args: Any, **options: Any) -> Any:
            self.pause(f"before {name}")
            result = function(*args, **options)
            self.pause(f"after {name}")
            return result

        return paused


class TurnLock:
    """A reentrant lock between actors: who waits for it gives the turn away."""

    def __init__(self, turns: Interleaving, name: str) -> None:
        self._turns, self._name = turns, name
        self._owner: threading.Thread | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.current_thread()
        while self._owner not in (None, me):
            self._turns.pause(f"waiting for {self._name}", lambda: self._owner is None)
        self._owner, self._depth = me, self._depth + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
