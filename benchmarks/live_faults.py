"""Kill a process that writes to, builds, swaps and rolls back a live index, again and again, and check what is left.

    python benchmarks/live_faults.py --rounds 50 [--builds 10] [--backend qdrant-edge] [--seed 0]

Each round forks a process that opens the index and works at random, noting in a journal what it begins and what was
acknowledged; after a random time it gets SIGKILL. Then another process opens the index and compares: every
acknowledged write is there (the one in flight wholly or not at all), exactly one generation is live and it is the one
last acknowledged, every passage has the vectors that the live encoder gives it, and BM25 finds it. Needs a POSIX
system. The model is the tiny one of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from ultrarag import Encoder
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.build import start
from ultrarag.retrieve.build.child import Build
from ultrarag.retrieve.generation.catalog import Catalog, Generation

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


def main() -> int:
    """Run the rounds; the exit status is 1 when something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--builds", type=int, help="how many of the rounds also build and swap (default: a fifth)")
    parser.add_argument("--backend", choices=["numpy", "qdrant-edge"], default="numpy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the index here (default: a temporary folder)")
    asked = parser.parse_args()
    builds = asked.rounds // 5 if asked.builds is None else asked.builds
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        Encoder.load(MODEL, adapter="bgem3", device="cpu")  # so that no round pays for the imports; nothing runs yet
        run_or_raise(lambda: set_up(folder, asked.backend))
        expected: State = {}
        for number in range(asked.rounds):
            build = number % max(1, asked.rounds // builds) == 0 if builds else False
            print(one_round(folder, number, asked.seed + number, build, expected), flush=True)
        run_or_raise(lambda: finish(folder))
    print(f"{asked.rounds} rounds ({asked.backend}, seed {asked.seed}): nothing was lost")
    return 0


def set_up(folder: Path, backend: str) -> None:
    """An index with two generations, and the checkpoint of the second."""
    encoder = Encoder.load(MODEL, adapter="bgem3", device="cpu")
    LiveIndex.create(folder / "kb", encoder, backend=backend).close()
    for name, shift in (("a", 0.01), ("b", 0.02)):
        with torch.no_grad():
            next(iter(encoder.model.parameters())).add_(shift)
        encoder.save(folder / name)
    with LiveIndex.open(folder / "kb") as live, building_here():
        live.swap(live.build(folder / "a"))


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


def one_round(folder: Path, number: int, seed: int, build: bool, expected: State) -> str:
    """Let a process work, kill it, and check; `expected` is brought up to date."""
    chance = random.Random(seed)
    journal = Journal(folder / f"journal-{number}")
    child = fork(lambda: work(folder, journal, seed, build))
    while not journal.events():
        time.sleep(0.01)
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit(f"round {number}: the process ended by itself")
    time.sleep(chance.uniform(0, 12 if build else 1.0))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    events = journal.events()
    run_or_raise(lambda: check(folder, events, expected))
    found = json.loads((folder / "state.json").read_text())
    expected.clear()
    expected.update({id: (text, metadata) for id, (text, metadata) in found["passages"].items()})
    done = [event["op"] for event in events if event["what"] == "done"]
    cut = next((event["op"] for event in reversed(events) if event["what"] == "begin"), "nothing")
    what = f"{len(done)} acknowledged, killed after beginning {cut}"
    return f"round {number}: {what}; {len(expected)} passages, generation {found['live']} is live"


def work(folder: Path, journal: Journal, seed: int, build: bool) -> None:
    """Open the index, and do one thing after the other until killed."""
    live = LiveIndex.open(folder / "kb", device="cpu")
    journal.note(what="opened", op="open", live=live.status()["live"]["id"])
    if build:
        threading.Thread(target=build_and_swap, args=(live, folder, journal), daemon=True).start()
    chance = random.Random(seed)
    for number in range(1_000_000):
        op = chance.choices(["add", "delete", "rollback", "vacuum"], [10, 4, 0 if build else 3, 0 if build else 1])[0]
        if op == "add":
            rows = [row(chance) for _ in range(chance.randint(1, 6))]
            noted(journal, op, number, lambda rows=rows: live.add(rows), rows=rows)
        elif op == "delete":
            ids = chance.sample(IDS, chance.randint(1, 4))
            noted(journal, op, number, lambda ids=ids: live.delete(ids), ids=ids)
        elif op == "rollback":
            target = live.status()["previous"]["id"]
            noted(journal, op, number, live.rollback, live=target)
        else:
            noted(journal, op, number, live.vacuum)


def build_and_swap(live: LiveIndex, folder: Path, journal: Journal) -> None:
    """Build the checkpoint that is not live, swap to it, and again."""
    for number in range(1_000_000):
        name = "b" if number % 2 else "a"
        built: list[Any] = []
        noted(journal, "build", -number - 1, lambda n=name, b=built: b.append(live.build(folder / n, progress=False)))
        noted(journal, "swap", -number - 1, lambda b=built: live.swap(b[0]), live=built[0].id)


def row(chance: random.Random) -> dict[str, Any]:
    """A passage with random words, under one of few ids."""
    text = " ".join(chance.choices(WORDS, k=chance.randint(3, 12)))
    return {"id": chance.choice(IDS), "text": text, "metadata": {"n": chance.randint(0, 9)}}


def noted(journal: Journal, op: str, number: int, act: Callable[[], Any], **more: Any) -> None:
    """Do something between two notes."""
    journal.note(what="begin", op=op, number=number, **more)
    act()
    journal.note(what="done", op=op, number=number)


def check(folder: Path, events: list[dict[str, Any]], expected: State) -> None:
    """Open the index and compare it with what the journal says."""
    done = {(event["op"], event["number"]) for event in events if event["what"] == "done"}
    before, after = dict(expected), dict(expected)
    live_before = live_after = events[0]["live"]
    for event in events:
        if event["what"] != "begin":
            continue
        acknowledged = (event["op"], event["number"]) in done
        apply(event, after)
        live_after = event.get("live", live_after)
        if acknowledged:
            apply(event, before)
            live_before = event.get("live", live_before)
    with LiveIndex.open(folder / "kb", device="cpu") as live:
        found: State = {p.id: (p.text, dict(p.metadata)) for p in live.passages()}
        assert found in (before, after), explain(found, before, after)
        states = [generation.state for generation in Catalog(live._core.store).all()]
        assert states.count("live") == 1, states
        number = live.status()["live"]["id"]
        assert number in (live_before, live_after), (number, live_before, live_after)
        check_derived(live, found)
        (folder / "state.json").write_text(json.dumps({"passages": found, "live": number}))


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


def finish(folder: Path) -> None:
    """What was left unfinished can be taken up: build, swap and roll back once more."""
    with LiveIndex.open(folder / "kb", device="cpu") as live, building_here():
        live.swap(live.build(folder / "b"))
        passages: State = {p.id: (p.text, dict(p.metadata)) for p in live.passages()}
        check_derived(live, passages)
        live.rollback()
        check_derived(live, passages)
        live.vacuum()


def explain(found: State, before: State, after: State) -> str:
    """Which passages are wrong."""
    lost = [id for id in before if found.get(id) not in (before[id], after.get(id))]
    extra = [id for id in found if found[id] not in (before.get(id), after.get(id))]
    return f"lost or wrong: {lost}; unexpected: {extra}"


def fork(act: Callable[[], None]) -> int:
    """Run `act` in a child process; imports are done already, engines and models are not there yet."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        act()
        status = 0
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


if __name__ == "__main__":
    sys.exit(main())
