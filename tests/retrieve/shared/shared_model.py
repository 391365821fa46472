"""A model of one index that many processes share in a server, and a search of all that can happen in it.

It follows `ultrarag.retrieve.shared` request by request; docs/shared-index.md tells the rules in words. What the server
holds: the highest lease, a state for each lease, one passage whose n-th version is entry n of the log, and what each of
two generations has of it. Two processes take the lease from each other, write, and flip; others search.

A lease may be taken over at any moment. What the clocks are for is one rule, `timely`: a process whose lease was taken
over sends no more writes, because it looked at its clock before each. It may still read, and believe what it likes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

WRONG = "wrong:"


@dataclass(frozen=True)
class Design:
    """The protocol's rules; each can be left out, to see what for it is there."""

    #: entries and flips that each process attempts, searching processes, processes that may die at any moment
    writes: int = 1
    flips: int = 1
    readers: int = 0
    crashes: int = 1
    #: a process whose lease was taken over sends no more writes
    timely: bool = True
    #: nor any to the vectors
    vectors_too: bool = True
    #: each lease has a state of its own, the newest counts
    state_for_each: bool = True
    #: the state is taken over after the lease is
    copy_after_claim: bool = True
    #: a writer looks for a higher lease before it says that something is done
    confirm: bool = True
    #: who takes over reads all passages, also those that nobody acknowledged
    adopt: bool = True
    #: the new generation gets what it lacks before the flip
    catch_up: bool = True
    #: a write returns when the live generation has it
    apply_before_acknowledging: bool = True
    #: a search names the collection of the model that encoded its query, not an alias
    search_by_name: bool = True


class Shared(NamedTuple):
    """What a state document says."""

    live: int = 1
    released: bool = True


class Process(NamedTuple):
    """Holds lease `epoch`, or none (0); stands before the request that `step` names."""

    writes: int
    flips: int
    epoch: int = 0
    step: str = "idle"
    #: its lease was taken over
    late: bool = False
    #: versions that its mirror has; what it believes to be live; the state that it read
    mirror: int = 0
    live: int = 1
    read: Shared | None = None
    dead: bool = False


class Reader(NamedTuple):
    """Holds a pair (model, collection), and searches again and again."""

    pair: int = 1
    encoded: bool = False


class State(NamedTuple):
    """Everything, at one moment."""

    top: int
    states: tuple[Shared | None, ...]
    passage: int
    vectors: tuple[int, int]
    #: entries acknowledged; the generation of the last flip that was, 0 while one is under way
    acknowledged: int
    flipped: int
    processes: tuple[Process, ...]
    readers: tuple[Reader, ...]
    crashes: int

    @property
    def newest(self) -> Shared:
        """The state of the highest lease that has one."""
        return next(state for state in reversed(self.states) if state is not None)


class Violation(AssertionError):
    """The protocol allows what must not be; names the steps that lead there."""


Step = tuple[str, State]


def explore(design: Design) -> int:
    """Visit every state that can be reached, and return how many there are.

    Raises:
        Violation: for the first one that must not be, on a shortest way.
    """
    processes = (Process(design.writes, design.flips),) * 2
    first = State(1, (Shared(),), 0, (0, 0), 0, 1, processes, (Reader(),) * design.readers, design.crashes)
    came: dict[State, tuple[State, str] | None] = {first: None}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        for label, found in steps(design, state):
            if wrong := label if WRONG in label else broken(found):
                raise Violation(f"{wrong}: {way(came, state)}; {label}")
            if found not in came:
                came[found] = (state, label)
                queue.append(found)
    return len(came)


def broken(state: State) -> str:
    """What must hold at every moment."""
    if state.passage < state.acknowledged:
        return "an acknowledged write is lost"
    if state.vectors[state.newest.live - 1] < state.acknowledged:
        return "an acknowledged write is not in the live generation"
    if state.flipped not in (0, state.newest.live):
        return "an acknowledged flip is lost"
    return ""


def way(came: dict[State, tuple[State, str] | None], state: State) -> str:
    """The steps to a state."""
    labels = []
    while (before := came[state]) is not None:
        state, label = before
        labels.append(label)
    return "; ".join(reversed(labels))


def steps(design: Design, state: State) -> Iterator[Step]:
    """What can happen next."""
    for number, process in enumerate(state.processes):
        if process.dead:
            continue
        name = "AB"[number]
        for label, found, changed in process_steps(design, state, process):
            yield f"{name} {label}", _with(found, number, changed)
        if state.crashes:
            dead = Process(0, 0, dead=True)
            yield f"{name} dies", _with(state, number, dead)._replace(crashes=state.crashes - 1)
    for number, reader in enumerate(state.readers):
        for label, changed in read_steps(design, state, reader):
            readers = [changed if n == number else other for n, other in enumerate(state.readers)]
            yield label, state._replace(readers=tuple(sorted(readers)))


_Steps = Iterator[tuple[str, State, Process]]


def process_steps(design: Design, state: State, process: Process) -> _Steps:
    """The next request of a process, as `step` says."""
    if process.step == "idle":
        yield from idle_steps(design, state, process)
    elif process.step in ("claim", "copy", "enter", "adopt"):
        yield from acquire_steps(design, state, process)
    elif process.step in ("passage", "state", "confirm", "apply", "acknowledge"):
        yield from write_steps(design, state, process)
    else:
        yield from flip_steps(design, state, process)


def idle_steps(design: Design, state: State, process: Process) -> _Steps:
    """Acquire a lease that is free or has expired; write; flip; release the lease."""
    if not process.epoch:
        if state.top < 3 and (process.writes or process.flips):
            first = "claim" if design.copy_after_claim else "copy"
            yield "wants the lease", state, process._replace(step=first)
        return
    if process.writes:
        yield "begins a write", state, process._replace(step="passage", writes=process.writes - 1)
    if process.flips:
        yield "begins a flip", state, process._replace(step="level", flips=process.flips - 1)
    if may_send(design, process):
        released = state.newest._replace(released=True)
        yield "releases", put(design, state, process, released), process._replace(epoch=0)


def acquire_steps(design: Design, state: State, process: Process) -> _Steps:
    """Create the next lease; read the newest state; write it as one's own; read the passages."""
    if process.step == "claim":
        others = [p._replace(late=p.late or bool(p.epoch)) for p in state.processes]
        taken = state._replace(top=state.top + 1, states=(*state.states, None), processes=tuple(others))
        following = "copy" if design.copy_after_claim else "enter"
        if state.top < 3:
            yield "claims", taken, process._replace(step=following, epoch=taken.top, late=False)
    elif process.step == "copy":
        following = "enter" if design.copy_after_claim else "claim"
        yield "reads the state", state, process._replace(step=following, read=state.newest)
    elif process.step == "enter":
        assert process.read is not None
        if not may_send(design, process):
            yield "has lost the lease", state, given_up(process)
            return
        own = process.read._replace(released=False)
        found = put(design, state, process, own)
        yield "enters its state", found, process._replace(step="adopt", live=own.live, read=None)
    else:
        mirror = state.passage if design.adopt else process.mirror
        yield "reads the passages", state, process._replace(step="idle", mirror=mirror)


def write_steps(design: Design, state: State, process: Process) -> _Steps:
    """Store the passage, then the state; confirm that no lease is higher; give it to the live generation; return."""
    version = process.mirror + 1
    if process.step != "confirm" and process.step != "acknowledge" and not may_send(design, process, process.step):
        yield "has lost the lease", state, given_up(process)
    elif process.step == "passage":
        if version <= state.acknowledged and state.top == process.epoch:
            yield f"{WRONG} a number is given twice", state, process
        yield f"stores version {version}", state._replace(passage=version), process._replace(step="state")
    elif process.step == "state":
        mine = Shared(process.live, False)
        yield "writes the state", put(design, state, process, mine), process._replace(step="confirm")
    elif process.step == "confirm":
        if design.confirm and state.top != process.epoch:
            yield "sees a higher lease", state, given_up(process)
        else:
            step = "apply" if design.apply_before_acknowledging else "acknowledge"
            yield "sees none higher", state, process._replace(step=step, mirror=version)
    elif process.step == "apply":
        done = "idle" if not design.apply_before_acknowledging else "acknowledge"
        yield f"applies {process.mirror}", applied(state, process.live, process.mirror), process._replace(step=done)
    else:
        after = "idle" if design.apply_before_acknowledging else "apply"
        acknowledged = max(state.acknowledged, process.mirror)
        yield "acknowledges", state._replace(acknowledged=acknowledged), process._replace(step=after)


def flip_steps(design: Design, state: State, process: Process) -> _Steps:
    """Give the other generation what it lacks; write the state; confirm that no lease is higher; return."""
    target = 3 - process.live
    if process.step != "flipped" and not may_send(design, process, "apply" if process.step == "level" else ""):
        yield "has lost the lease", state, given_up(process)
    elif process.step == "level":
        found = applied(state, target, process.mirror) if design.catch_up else state
        yield f"brings {target} to {process.mirror}", found, process._replace(step="flip")
    elif process.step == "flip":
        found = put(design, state, process, Shared(target, False))
        if found.newest.live != state.newest.live:
            found = found._replace(flipped=0)
        yield f"flips to {target}", found, process._replace(step="flipped")
    elif design.confirm and state.top != process.epoch:
        yield "sees a higher lease", state, given_up(process)
    else:
        yield "acknowledges the flip", state._replace(flipped=target), process._replace(step="idle", live=target)


def read_steps(design: Design, state: State, reader: Reader) -> Iterator[tuple[str, Reader]]:
    """Follow the state; encode a query; search."""
    if not reader.encoded:
        if reader.pair != state.newest.live:
            yield f"reader switches to {state.newest.live}", Reader(state.newest.live)
        yield f"reader encodes by {reader.pair}", reader._replace(encoded=True)
        return
    searched = reader.pair if design.search_by_name else state.newest.live
    if searched != reader.pair:
        yield f"{WRONG} a query of one model among vectors of another", reader
    yield f"reader searches {searched}", reader._replace(encoded=False)


def may_send(design: Design, process: Process, step: str = "") -> bool:
    """What the clock forbids to a process whose lease was taken over."""
    checked = design.timely and (design.vectors_too or step != "apply")
    return not (process.late and checked)


def given_up(process: Process) -> Process:
    """The lease is gone, and what was begun fails; the next attempt takes it anew."""
    return process._replace(epoch=0, step="idle", late=False)


def put(design: Design, state: State, process: Process, written: Shared) -> State:
    """Store a state: that of the process's own lease, or the one that all share."""
    place = process.epoch - 1 if design.state_for_each else len(state.states) - 1
    states = [written if n == place else held for n, held in enumerate(state.states)]
    return state._replace(states=tuple(states))


def applied(state: State, generation: int, version: int) -> State:
    """A generation gets a version, whatever it had: engines know no condition."""
    vectors = [version if n == generation - 1 else held for n, held in enumerate(state.vectors)]
    return state._replace(vectors=(vectors[0], vectors[1]))


def _with(state: State, number: int, process: Process) -> State:
    return state._replace(processes=tuple(process if n == number else p for n, p in enumerate(state.processes)))
