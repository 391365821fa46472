"""A model of one index that many processes share in a vector server, and a search of all that can happen in it.

No such index exists in the library yet: this is its protocol on paper, and what it must not leave out. docs/scale.md
tells it in words. What the server holds:

- a *control record*: which generation is live, how long the write log is, and who holds the lease, under which number.
  It is one point of a small collection, and changes only by compare-and-set;
- a collection for each generation, under a name that is never used again; and an alias, for people and other programs.

Time is not modelled: a lease may run out at any moment, and a process may stand still for as long as it likes between
two of its requests. What holds here holds whatever the clocks say. The index has one passage, whose n-th version is
entry n of the log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

GENERATIONS = (1, 2)
DROPPED = -1
#: A reader that has not begun a search; one that began on a pair that was not live any more.
IDLE, BEHIND = -1, -2
WRONG = "wrong:"


@dataclass(frozen=True)
class Design:
    """The protocol's rules; each can be left out, to see what for it is there."""

    #: entries that the writer adds, searching processes, flips of the process that swaps (the second is a rollback)
    writes: int = 2
    readers: int = 2
    flips: int = 1
    #: processes that may die, each at any moment
    crashes: int = 1
    #: the old generation's collection is deleted after the flip
    drop: bool = False
    #: a change of the control record fails if the record is not what it was read to be
    compare: bool = True
    #: the new generation gets what it lacks before the flip
    catch_up: bool = True
    #: the flip is refused when the log has grown since
    flip_checks_log: bool = True
    #: the flip is refused when the lease has another number
    flip_checks_lease: bool = True
    #: a passage is not replaced by an older version of it
    newer_stays: bool = True
    #: a write returns when the live generation has it
    apply_before_acknowledging: bool = True
    #: a collection is deleted only after the record says, under the lease, that it is never to be live again
    retire_before_drop: bool = True
    #: a search names the collection of the model that encoded its query, not the alias
    search_by_name: bool = True


class Control(NamedTuple):
    """The record that decides."""

    live: int
    #: entries of the log
    log: int
    #: number of the lease, which grows with each that is taken
    lease: int
    #: a generation that is never to be live again
    retired: int = 0


class Writer(NamedTuple):
    """Adds entry after entry."""

    #: entries acknowledged
    done: int = 0
    #: the control record as it was read, without compare-and-set
    read: Control | None = None
    #: generation to which the entry added is to be applied
    target: int = 0
    dead: bool = False


class Swapper(NamedTuple):
    """Takes the lease, brings a generation up to date, flips."""

    step: str = "start"
    left: int = 1
    lease: int = 0
    target: int = 0
    #: entries of the log read, and those that the target got
    seen: int = 0
    applied: int = DROPPED
    read: Control | None = None


class Reader(NamedTuple):
    """Holds a pair (model, collection), and searches again and again."""

    pair: int
    #: what was acknowledged when it encoded its query
    since: int = IDLE
    dead: bool = False


class State(NamedTuple):
    """Everything, at one moment."""

    control: Control
    alias: int
    #: version of the passage in each generation
    versions: tuple[int, ...]
    writer: Writer
    swappers: tuple[Swapper, ...]
    readers: tuple[Reader, ...]
    crashes: int


class Violation(AssertionError):
    """The protocol allows what must not be; names the steps that lead there."""


Step = tuple[str, State]


def start(design: Design) -> State:
    """A live generation, and one that was built before the first write."""
    swappers = (Swapper(left=design.flips), Swapper())
    return State(Control(1, 0, 0), 1, (0, 0), Writer(), swappers, (Reader(1),) * design.readers, design.crashes)


def explore(design: Design) -> int:
    """Visit every state that can be reached, and return how many there are.

    Raises:
        Violation: for the first one that must not be, on a shortest way.
    """
    first = start(design)
    came: dict[State, tuple[State, str] | None] = {first: None}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        for label, found in steps(design, state):
            if WRONG in label:
                raise Violation(f"{label}: {way(came, state)}")
            if found not in came:
                came[found] = (state, label)
                queue.append(found)
                if found.versions[found.control.live - 1] < found.writer.done:
                    raise Violation(f"an acknowledged write is not in the live generation: {way(came, found)}")
    return len(came)


def way(came: dict[State, tuple[State, str] | None], state: State) -> str:
    """The steps to a state."""
    labels = []
    while (before := came[state]) is not None:
        state, label = before
        labels.append(label)
    return "; ".join(reversed(labels))


def steps(design: Design, state: State) -> Iterator[Step]:
    """What can happen next."""
    yield from write_steps(design, state)
    for number in range(len(state.swappers)):
        for label, found in swap_steps(design, state, number):
            yield f"{'AB'[number]} {label}", found
    for number, reader in enumerate(state.readers):
        if number and reader == state.readers[number - 1]:
            continue  # two readers that stand at the same place are one
        for label, changed in read_steps(design, state, reader):
            yield label, _with_reader(state, number, changed)
    if state.crashes:
        yield from crash_steps(state)


def write_steps(design: Design, state: State) -> Iterator[Step]:
    """Append to the log, apply to the live generation, return."""
    writer, control = state.writer, state.control
    if writer.dead:
        return
    if writer.target:
        yield "writer applies and returns", _applied(design, state)
    elif writer.done < design.writes and not design.compare and writer.read is None:
        yield "writer reads the record", state._replace(writer=writer._replace(read=control))
    elif writer.done < design.writes:
        seen = writer.read or control
        changed = writer._replace(target=seen.live, read=None)
        if not design.apply_before_acknowledging:
            changed = changed._replace(done=writer.done + 1)
        yield "writer appends", state._replace(control=seen._replace(log=writer.done + 1), writer=changed)


def _applied(design: Design, state: State) -> State:
    writer = state.writer
    entry = writer.done + (1 if design.apply_before_acknowledging else 0)
    found = _put(design, state, writer.target, entry)  # a dropped generation is none that is live: it needs nothing
    return found._replace(writer=writer._replace(done=entry, target=0))


def swap_steps(design: Design, state: State, number: int) -> Iterator[Step]:
    """Take the lease; read the log and apply it until nothing is new; flip; let the alias follow; drop the old one."""
    swapper, control = state.swappers[number], state.control

    def to(label: str, found: State = state, **changes: object) -> Step:
        swappers = list(found.swappers)
        swappers[number] = swapper._replace(**changes)  # type: ignore[arg-type]
        return label, found._replace(swappers=tuple(swappers))

    if swapper.step == "start" and swapper.left:
        target = 3 - control.live
        if target != control.retired and state.versions[target - 1] != DROPPED:
            taken = control._replace(lease=control.lease + 1)
            changes = {"step": "behind" if design.catch_up else "level", "lease": taken.lease, "target": target}
            yield to(f"takes lease {taken.lease}", state._replace(control=taken), applied=control.log, **changes)
    elif swapper.step == "behind":
        yield to("reads the log", step="apply", seen=control.log)
    elif swapper.step == "apply":
        put = _put(design, state, swapper.target, swapper.seen)
        yield to(f"applies entry {swapper.seen}", put, step="level", applied=swapper.seen)
    elif swapper.step == "level" and not design.compare and swapper.read is None:
        yield to("reads the record", read=control)
    elif swapper.step == "level":
        yield from _flip_steps(design, state, number, to)
    elif swapper.step == "flipped":
        yield to("moves the alias", state._replace(alias=swapper.target), step="follow")
    elif swapper.step == "follow" and design.drop and (control.lease == swapper.lease or not design.retire_before_drop):
        retired = control._replace(retired=3 - swapper.target) if design.retire_before_drop else control
        verb = "retires" if design.retire_before_drop else "means to drop"
        yield to(f"{verb} {3 - swapper.target}", state._replace(control=retired), step="drop")
    elif swapper.step == "drop":
        versions = tuple(
            DROPPED if n != swapper.target else v for n, v in zip(GENERATIONS, state.versions, strict=True)
        )
        yield to(f"drops {3 - swapper.target}", state._replace(versions=versions), step="end")
    elif swapper.step in ("follow", "end"):
        left = swapper.left - 1 if control.lease == swapper.lease else 0
        yield to("ends", **Swapper(left=left)._asdict())


def _flip_steps(design: Design, state: State, number: int, to) -> Iterator[Step]:  # type: ignore[no-untyped-def]
    swapper, control = state.swappers[number], state.control
    seen = swapper.read or control
    if design.flip_checks_lease and seen.lease != swapper.lease:
        yield to("has lost the lease", **Swapper(left=0)._asdict())
    elif swapper.target == seen.retired:
        yield to("finds the generation retired", **Swapper(left=0)._asdict())
    elif design.flip_checks_log and design.catch_up and seen.log != swapper.applied:
        yield to("finds the log longer", step="behind", read=None)
    else:
        if control.lease != swapper.lease:
            yield f"{WRONG} a flip by a process that has lost the lease", state
        flipped = state._replace(control=seen._replace(live=swapper.target))
        yield to(f"flips to {swapper.target}", flipped, step="flipped", read=None)


def read_steps(design: Design, state: State, reader: Reader) -> Iterator[tuple[str, Reader]]:
    """Look which pair is live; encode a query; search."""
    if reader.dead:
        return
    if reader.since == IDLE:
        if reader.pair != state.control.live:
            yield f"reader switches to {state.control.live}", reader._replace(pair=state.control.live)
        live = reader.pair == state.control.live
        yield f"reader encodes by {reader.pair}", reader._replace(since=state.writer.done if live else BEHIND)
        return
    searched = reader.pair if design.search_by_name else state.alias
    found = state.versions[searched - 1]
    if found != DROPPED and searched != reader.pair:
        yield f"{WRONG} a query of one model among vectors of another", reader
    elif found != DROPPED and found < reader.since:
        yield f"{WRONG} a search misses what was acknowledged before it", reader
    again = state.control.live if found == DROPPED else reader.pair  # gone: look at the record, and search again
    yield f"reader searches {searched}", Reader(again)


def crash_steps(state: State) -> Iterator[Step]:
    """Any process may die; the second swapper then is the one that takes over."""
    left = state._replace(crashes=state.crashes - 1)
    if not state.writer.dead:
        yield "writer dies", left._replace(writer=state.writer._replace(dead=True))
    for number, swapper in enumerate(state.swappers):
        if swapper.step != "start":
            swappers = tuple(Swapper(left=0) if n == number else other for n, other in enumerate(state.swappers))
            yield f"{'AB'[number]} dies", left._replace(swappers=swappers)
    for number, reader in enumerate(state.readers):
        if not reader.dead:
            yield "reader dies", _with_reader(left, number, Reader(0, dead=True))


def _put(design: Design, state: State, generation: int, version: int) -> State:
    held = state.versions[generation - 1]
    if held == DROPPED or (design.newer_stays and held > version):
        return state
    versions = tuple(version if n == generation else old for n, old in zip(GENERATIONS, state.versions, strict=True))
    return state._replace(versions=versions)


def _with_reader(state: State, number: int, reader: Reader) -> State:
    readers = [reader if n == number else other for n, other in enumerate(state.readers)]
    return state._replace(readers=tuple(sorted(readers)))
