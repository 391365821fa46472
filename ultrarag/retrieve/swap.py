"""Making a generation the live one: bring it up to date, check it, compare it, and exchange one pointer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import GateError, IndexStateError
from ultrarag.evaluation import Verdict
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.gate import Gate, check_count, check_encoded, check_sound, compare
from ultrarag.retrieve.generation import Follower, Generation, Serving
from ultrarag.retrieve.search import Searcher

#: Entries of the log that may be left for the moment in which writers wait.
FEW = 16


@dataclass(frozen=True)
class Flip:
    """What a swap or a rollback did."""

    old: Generation
    new: Generation
    #: what the gate measured; None without a gate
    verdict: Verdict | None
    #: seconds that writers waited; searches never did
    seconds: float


#: Told what the gate measured, before it decides.
Note = Callable[[Verdict], None]


@dataclass(frozen=True)
class SwapTerms:
    """On which terms a generation goes live."""

    gate: Gate | None = None
    #: go live although the gate says no
    force: bool = False
    metric: str = "nDCG@10"
    #: options of `LiveIndex.search` for the gate
    search: Mapping[str, Any] = field(default_factory=dict)
    note: Note | None = None


def swap(core: Core, generation: int, terms: SwapTerms) -> Flip:
    """Make a ready generation live; see `LiveIndex.swap`."""
    with core.flipping, core.leading():
        found = core.catalog.get(generation)
        if found.state != "ready":
            advice = {"live": "it is live already", "previous": "rollback brings it back", "building": "build it first"}
            raise IndexStateError(
                f"generation {found.id} is {found.state}, not ready: {advice.get(found.state, 'build it again')}"
            )
        return _go_live(core, found, terms)


def rollback(core: Core) -> Flip:
    """Make the previous generation live again; see `LiveIndex.rollback`."""
    with core.flipping, core.leading():
        previous = core.catalog.in_state("previous")
        if not previous:
            raise IndexStateError("there is no previous generation to roll back to")
        return _go_live(core, previous[0], SwapTerms())


def _go_live(core: Core, generation: Generation, terms: SwapTerms) -> Flip:
    """Make a finished generation live; GateError leaves everything as it was."""
    old = core.live
    new, vectors = core.load(generation)
    seconds = 0.0
    try:
        _approach(core, vectors)
        check_sound(new, core.store, vectors.applied)
        forced = _allowed(lambda: check_encoded(new, old, core.store), terms.force)
        verdict = _measure(core, new, terms)
        if verdict is not None:
            if terms.note is not None:
                terms.note(verdict)
            _decide(verdict, generation, terms.force)
        _approach(core, vectors)
        forced |= bool(terms.force and verdict and (verdict.worse or verdict.judges_nothing))
        seconds = _exchange(core, new, vectors, verdict, forced)
    except BaseException:
        if core.catalog.live().id != generation.id:
            core.let_go(new)
            raise
        core.replace(new, vectors)  # Ctrl-C between the two halves of the flip: carry it through
    core.let_go(old)
    new.cuts.tell()
    return Flip(core.catalog.get(old.generation.id), core.catalog.get(generation.id), verdict, seconds)


def _approach(core: Core, vectors: Follower) -> None:
    """Apply the writes so far, and those made meanwhile while they get fewer; writers need not wait for these."""
    before = None
    while (behind := core.store.last_seq() - vectors.applied) > 0:
        if before is not None and (behind <= FEW or behind > before / 2):
            return
        before = behind
        vectors.catch_up(core.store.last_seq())


def _measure(core: Core, new: Serving, terms: SwapTerms) -> Verdict | None:
    if terms.gate is None:
        return None
    with core.searching() as live:
        return compare(live, Searcher(new, core.store, core.bm25), terms.gate, terms.metric, dict(terms.search))


def _allowed(check: Callable[[], None], force: bool) -> bool:
    """Check; whether it took force to go on."""
    try:
        check()
    except GateError:
        if not force:
            raise
        return True
    return False


def _decide(verdict: Verdict, generation: Generation, force: bool) -> None:
    if force:
        return
    if verdict.judges_nothing:
        raise GateError(
            f"generation {generation.id} cannot be judged: {verdict.metric} is 0 for it and for the live one, so the "
            f"gate's queries tell nothing about either; the live one stays (check the ids of the qrels, or give other "
            f"queries; force=True swaps all the same)"
        )
    if verdict.worse:
        raise GateError(
            f"generation {generation.id} is significantly worse than the live one: {verdict}; the live one stays "
            f"(force=True swaps all the same)"
        )


def _exchange(core: Core, new: Serving, vectors: Follower, verdict: Verdict | None, forced: bool) -> float:
    """Apply the last writes, then flip in one transaction and one assignment, while writers wait; return how long."""
    with core.writing:
        started = time.perf_counter()
        vectors.catch_up()
        vectors.flush()
        check_count(new, core.store)
        core.flush()
        core.catalog.flip(new.generation.id, forced, verdict.to_dict() if verdict else None)
        core.replace(new, vectors)
        return time.perf_counter() - started
