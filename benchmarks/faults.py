"""What live_faults.py and campaign.py share: forked processes, their journal, and what an index holds after them."""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.build import start
from ultrarag.retrieve.build.child import Build
from ultrarag.retrieve.generation.catalog import Generation

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # two threads of a tiny model wait for one another, seconds a round on a busy machine

MODEL = Path(__file__).parents[1] / "tests" / "fixtures" / "peer" / "model"
WORDS = "river stone cloud ember violet marble harbor meadow copper lantern willow thunder saffron anchor".split()  # noqa: SIM905
IDS = [f"p/{n}" for n in range(40)]

State = dict[str, tuple[str, dict[str, Any]]]


class Journal:
    """A file of JSON lines, each written with one system call, so that a killed writer leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def note(self, **event: Any) -> None:
        """Append an event."""
        os.write(self._file, json.dumps(event).encode() + b"\n")

    def events(self) -> list[dict[str, Any]]:
        """All events so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@contextmanager
def building_here() -> Iterator[None]:
    """Build in this process, without the seconds that a new one takes to import torch."""

    def run(root: Path, generation: Generation, **options: Any) -> None:
        Build(root, generation, "cpu").run(False)

    real, start.run_builder = start.run_builder, run
    try:
        yield
    finally:
        start.run_builder = real


def row(chance: random.Random) -> dict[str, Any]:
    """A passage with random words, under one of few ids."""
    text = " ".join(chance.choices(WORDS, k=chance.randint(3, 12)))
    return {"id": chance.choice(IDS), "text": text, "metadata": {"n": chance.randint(0, 9)}}


def noted(journal: Journal, op: str, number: int, act: Callable[[], Any], **more: Any) -> None:
    """Do something between two notes."""
    journal.note(what="begin", op=op, number=number, **more)
    act()
    journal.note(what="done", op=op, number=number)


def few_are_many() -> None:
    """Have the engine `ivf` do with tens of passages what it does with many: codes, runs, tables written anew."""
    from ultrarag.retrieve.engines.ivf import codes, engine, lookup, search, table

    engine.EXACT_ROWS, engine.DEAD_ROWS, engine.UNSAVED_ROWS = 16, 20, 4
    codes.LISTS, codes.PROBES, search.FEW = 1.0, 4, 4
    lookup.TAIL_ROWS, table.MAPPED_ROWS = 8, 8


def write_on(
    live: LiveIndex, journal: Journal, seed: int, flips: bool = True, checkpoints: Sequence[Path] = ()
) -> None:
    """Write, with `flips` roll back and vacuum, with checkpoints build and swap, one after the other, until killed."""
    chance, builds = random.Random(seed), bool(checkpoints)
    shares = {
        "add": 10,
        "delete": 4,
        "rollback": 3 * flips,
        "vacuum": 1 * flips,
        "build": 2 * builds,
        "swap": 2 * builds,
    }
    for number in range(1_000_000):
        op = chance.choices(list(shares), list(shares.values()))[0]
        if op == "add":
            rows = [row(chance) for _ in range(chance.randint(1, 6))]
            noted(journal, op, number, lambda rows=rows: live.add(rows), rows=rows)
        elif op == "delete":
            ids = chance.sample(IDS, chance.randint(1, 4))
            noted(journal, op, number, lambda ids=ids: live.delete(ids), ids=ids)
        elif op == "rollback":
            target = live.status()["previous"]["id"]
            noted(journal, op, number, live.rollback, live=target)
        elif op == "build":
            checkpoint = chance.choice(checkpoints)
            noted(journal, op, number, lambda checkpoint=checkpoint: live.build(checkpoint, progress=False))
        elif op == "swap":
            ready = [found["id"] for found in live.status()["generations"] if found["state"] == "ready"]
            for target in ready[:1]:
                noted(journal, op, number, lambda target=target: live.swap(target), live=target)
        else:
            noted(journal, op, number, live.vacuum)


def outcomes(events: list[dict[str, Any]], expected: State, live: int) -> tuple[State, State, tuple[int, int]]:
    """The passages with what was acknowledged, and with what was in flight too; and the generations live then."""
    done = {(event["op"], event["number"]) for event in events if event["what"] == "done"}
    before, after = dict(expected), dict(expected)
    live_before = live_after = live
    for event in events:
        if event["what"] != "begin":
            continue
        apply(event, after)
        live_after = event.get("live", live_after)
        if (event["op"], event["number"]) in done:
            apply(event, before)
            live_before = event.get("live", live_before)
    return before, after, (live_before, live_after)


def apply(event: dict[str, Any], state: State) -> None:
    """Do to a dictionary what a write does to the index."""
    for row in event.get("rows", ()):
        state[row["id"]] = (row["text"], row["metadata"])
    for id in event.get("ids", ()):
        state.pop(id, None)


def check_derived(live: LiveIndex, found: State) -> None:
    """Vectors and words are those of the passages."""
    backend, bm25, ids = live._core.live.backend, live._core.bm25, list(found)
    assert sorted(backend.ids()) == sorted(ids)
    assert bm25 is not None
    assert sorted(bm25.ids()) == sorted(ids)
    if not ids:
        return
    fresh = live.encoder.encode([found[id][0] for id in ids], progress=False)
    held = backend.vectors(ids)
    np.testing.assert_allclose(held.dense, fresh.dense, atol=1e-4)
    assert held.sparse is not None
    assert [set(row) for row in held.sparse.to_dicts()] == [set(row) for row in fresh.sparse.to_dicts()]
    for id in ids[:5]:
        text, metadata = found[id]
        for head in ("bm25", "dense"):
            hits = live.search(text, k=len(ids), heads=[head], filter={"n": metadata["n"]})
            assert id in {hit.id for hit in hits}, (id, head)
            assert all(hit.passage.metadata["n"] == metadata["n"] for hit in hits)


def explain(found: State, before: State, after: State) -> str:
    """Which passages are wrong."""
    lost = [id for id in before if found.get(id) not in (before[id], after.get(id))]
    extra = [id for id in found if found[id] not in (before.get(id), after.get(id))]
    return f"lost or wrong: {lost}; unexpected: {extra}"


def fork(act: Callable[[], int | None]) -> int:
    """Run `act`, which may return an exit status, in a child process; imports are done already."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = act() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_or_raise(act: Callable[[], None]) -> None:
    """Run `act` in a child process to its end."""
    _, status = os.waitpid(fork(act), 0)
    if status:
        raise SystemExit(1)
