"""The live index as a state machine: readers, writers, a builder, swaps, rollbacks, kills; and what must always hold.

The real code runs, on the numpy engine and with a stand-in for the encoder. Every actor stops before and after each
step that changes or reads shared state, and hypothesis chooses who goes on. A kill is a copy of the directory at that
moment, which is opened again; the old one is not looked at any more.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.retrieve.interleave import Actor, Interleaving, Killed, TurnLock
from tests.retrieve.stand_in import KINDS as MODEL_KINDS
from tests.retrieve.stand_in import MODELS, StandIn, score
from ultrarag.errors import GateError, IndexStateError
from ultrarag.retrieve.live import LiveIndex
from ultrarag.types import Hit, Passage

IDS = ["a", "b", "c", "d", "e"]
#: Operations at a time.
ACTORS = 5
#: What an operation may end with: refused by name, interrupted, killed.
ENDS = (IndexStateError, GateError, KeyboardInterrupt, Killed)

KINDS = ["add", "delete", "search", "search", "build", "swap", "rollback", "vacuum"]
#: Where an operation may be left for a while; END is nowhere.
END = "end"
MOMENTS = {
    "before": ["flip", "replace", "changes", "put", "flush", "search_dense", "encode_passages", "set_state", "add"],
    "after": ["flip", "encode_queries", "write", "delete", "_commit", "last_seq", "check_count", "set_applied"],
}
POINTS = [END, *(f"{side} {name}" for side, names in MOMENTS.items() for name in names)]
moments = st.one_of(st.just(0), st.integers(0, 63))
ids_of_passages = st.lists(st.sampled_from(IDS), min_size=1, max_size=3, unique=True)


class History:
    """What was written to each passage, in the order of the store; None is its absence."""

    def __init__(self, texts: dict[str, str | None]) -> None:
        self._values = {id: [texts.get(id)] for id in IDS}
        self._acknowledged = dict.fromkeys(IDS, 0)

    def commit(self, id: str, text: str | None) -> int:
        """Note a write that the store has; return its number."""
        self._values[id].append(text)
        return len(self._values[id]) - 1

    def acknowledge(self, numbers: dict[str, int]) -> None:
        """Note that the writes with these numbers returned."""
        for id, number in numbers.items():
            self._acknowledged[id] = max(self._acknowledged[id], number)

    def now(self) -> dict[str, int]:
        """The last acknowledged write of each passage: a search that begins now sees it, or a later one."""
        return dict(self._acknowledged)

    def allowed(self, id: str, since: dict[str, int]) -> list[str | None]:
        """What may be seen of a passage by one who began at `since`."""
        return self._values[id][since[id] :]


class LiveMachine(RuleBasedStateMachine):
    """One index; subclassed with `template`, an empty index to copy, and `turns`."""

    #: what a machine does, and where it stops
    kinds, points = KINDS, POINTS

    template: Path
    turns: Interleaving
    _numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.history = History({})
        self.writing: dict[Any, dict[str, int]] = {}
        self.texts = itertools.count()
        self.deletes = 0
        self._open(self.template)

    # What happens

    @initialize(ids=ids_of_passages, swapped=st.booleans(), model=st.sampled_from([1, MODELS, 2 * MODELS]))
    def begin(self, ids: list[str], swapped: bool, model: int = 1) -> None:
        """Some passages, and a generation that is ready, or a second one that is live: of another model, of the same
        with another query side, or with a map too.
        """
        self._add(ids)
        self.turns.finish()
        self.live.build(StandIn(model))  # type: ignore[arg-type]
        if swapped:
            self.live.swap(2)

    @rule(kind=st.integers(0, 63), ids=ids_of_passages, model=st.integers(0, MODELS * MODEL_KINDS - 1), until=moments)
    def operation(self, kind: int, ids: list[str], model: int, until: int) -> None:
        """Begin an operation, and run it up to a moment."""
        if len(self.turns.actors) < ACTORS:
            name = self.kinds[kind % len(self.kinds)]
            getattr(self, f"_{name}")(*{"add": [ids], "delete": [ids], "build": [model]}.get(name, []))
            self._run(self.turns.actors[-1], until)

    @precondition(lambda self: self.turns.runnable())
    @rule(choice=st.integers(0, ACTORS - 1), until=moments)
    def go_on(self, choice: int, until: int) -> None:
        """Run one of the operations further."""
        able = self.turns.runnable()
        self._run(able[choice % len(able)], until)

    @precondition(lambda self: self.turns.runnable())
    @rule(choice=st.integers(0, ACTORS - 1))
    def interrupt(self, choice: int) -> None:
        able = self.turns.runnable()
        actor = able[choice % len(able)]
        actor.fate = KeyboardInterrupt
        actor.step()

    @rule()
    def kill(self) -> None:
        left = self.history.now()
        self._open(self.live.path)
        self._check({p.id: p.text for p in self.live.passages()}, left)
        self.history = History({p.id: p.text for p in self.live.passages()})
        self._check_hits(self.live.search("query", k=len(IDS)), self.history.now())

    # What must hold

    @invariant()
    def one_is_live(self) -> None:
        states = [generation.state for generation in self.live._core.catalog.all()]
        assert states.count("live") == 1, states

    @invariant()
    def nothing_failed(self) -> None:
        for actor in self.turns.actors:
            if actor.done and actor.error is not None and not isinstance(actor.error, ENDS):
                raise actor.error
        self.turns.actors = [actor for actor in self.turns.actors if not actor.done]

    def teardown(self) -> None:
        """Everything comes to its end, and the index is complete, now and when it is opened again."""
        try:
            self.turns.finish()
            self.nothing_failed()
            for _ in range(2):
                self._check({p.id: p.text for p in self.live.passages()}, self.history.now())
                self._check_hits(self.live.search("query", k=len(IDS)), self.history.now())
                self._open(self.live.path)
        finally:
            self._leave()

    # How

    def _run(self, actor: Actor, until: int) -> None:
        """Run an actor to a moment, to its end, or to a lock that another one holds."""
        moment = self.points[until % len(self.points)]
        while actor in self.turns.runnable():
            actor.step(moment)
            if actor.at == moment:
                return

    def _add(self, ids: list[str]) -> None:
        passages = [Passage(id, f"{id} {next(self.texts)}") for id in ids]
        self._start("add", lambda: self.live.add(passages))

    def _delete(self, ids: list[str]) -> None:
        self.deletes += 1
        self._start("delete", lambda: self.live.delete(ids))

    def _search(self) -> None:
        self._start("search", self._search_once)

    def _build(self, model: int) -> None:
        self._start("build", lambda: self.live.build(StandIn(model)))  # type: ignore[arg-type]

    def _swap(self) -> None:
        ready = self.live._core.catalog.in_state("ready")
        self._start("swap", lambda: [self.live.swap(generation) for generation in ready[-1:]])

    def _rollback(self) -> None:
        self._start("rollback", lambda: self.live.rollback())

    def _vacuum(self) -> None:
        self._start("vacuum", lambda: self.live.vacuum())

    def _start(self, name: str, work: Any) -> None:
        actor = self.turns.start(name, lambda: self._acknowledging(work))
        self.writing[actor._thread] = {}

    def _acknowledging(self, work: Any) -> None:
        work()
        self.history.acknowledge(self.writing[threading.current_thread()])

    def committed(self, values: dict[str, str | None]) -> None:
        """The store has a write of the running actor."""
        numbers = self.writing[threading.current_thread()]
        numbers.update({id: self.history.commit(id, text) for id, text in values.items()})

    def _search_once(self) -> None:
        since = self.history.now()
        deletes = self.deletes
        hits = self.live.search("query", k=len(IDS))
        self._check_hits(hits, since, deletes == self.deletes and not self._deleting())

    def _deleting(self) -> bool:
        return any(actor.name == "delete" and not actor.done for actor in self.turns.actors)

    def _check_hits(self, hits: list[Hit], since: dict[str, int], complete: bool = True) -> None:
        """All is there that must be, nothing that cannot, and every score is that of one model's two vectors.

        Args:
            complete: False beside a delete, see `test_a_search_beside_a_delete_finds_the_others`.
        """
        for hit in hits:
            allowed = [score(text) for text in self.history.allowed(hit.id, since) if text is not None]
            assert hit.score > 0.1, f"{hit.id}: the query's vector is of another model than the passage's"
            assert min(abs(hit.score - value) for value in allowed) < 1e-5, f"{hit.id}: the vector is of an old text"
        found = {hit.id: hit.passage.text for hit in hits}
        self._check(found, since, IDS if complete else list(found))

    def _check(self, found: dict[str, str], since: dict[str, int], ids: Sequence[str] = IDS) -> None:
        for id in ids:
            allowed = self.history.allowed(id, since)
            assert found.get(id) in allowed, f"{id} is {found.get(id)!r}, and must be one of {allowed}"

    def _open(self, path: Path) -> None:
        """Take a copy of the directory as it is now, end what runs, and open the copy."""
        copy = self.template.parent / f"run-{next(self._numbers)}"
        shutil.copytree(path, copy)
        self._leave()
        self.live = LiveIndex.open(copy)
        self.live._core.writing = TurnLock(self.turns, "writing")  # type: ignore[assignment]
        self.live._core.flipping = TurnLock(self.turns, "flipping")  # type: ignore[assignment]
        self.turns.watch = self.one_is_live
        type(self).current = self

    def _leave(self) -> None:
        """Forget the process that was."""
        self.turns.kill()
        self.turns.actors.clear()
        self.writing.clear()
        if (live := getattr(self, "live", None)) is not None:
            live._core.writing = contextlib.nullcontext()  # type: ignore[assignment]
            with contextlib.suppress(Exception):
                live.close()
            shutil.rmtree(live.path, ignore_errors=True)

    current: LiveMachine
