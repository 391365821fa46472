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
from pathlib import Path
from typing import Any

import torch
from faults import (
    MODEL,
    Journal,
    State,
    building_here,
    check_derived,
    explain,
    fork,
    noted,
    outcomes,
    run_or_raise,
    write_on,
)

from ultrarag import Encoder
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.generation.catalog import Catalog


def main() -> int:
    """Run the rounds; the exit status is 1 when something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--builds", type=int, help="how many of the rounds also build and swap (default: a fifth)")
    parser.add_argument("--backend", choices=["numpy", "qdrant-edge", "ivf"], default="numpy")
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
    write_on(live, journal, seed, flips=not build)


def build_and_swap(live: LiveIndex, folder: Path, journal: Journal) -> None:
    """Build the checkpoint that is not live, swap to it, and again."""
    for number in range(1_000_000):
        name = "b" if number % 2 else "a"
        built: list[Any] = []
        noted(journal, "build", -number - 1, lambda n=name, b=built: b.append(live.build(folder / n, progress=False)))
        noted(journal, "swap", -number - 1, lambda b=built: live.swap(b[0]), live=built[0].id)


def check(folder: Path, events: list[dict[str, Any]], expected: State) -> None:
    """Open the index and compare it with what the journal says."""
    before, after, lives = outcomes(events, expected, events[0]["live"])
    with LiveIndex.open(folder / "kb", device="cpu") as live:
        found: State = {p.id: (p.text, dict(p.metadata)) for p in live.passages()}
        assert found in (before, after), explain(found, before, after)
        states = [generation.state for generation in Catalog(live._core.store).all()]
        assert states.count("live") == 1, states
        number = live.status()["live"]["id"]
        assert number in lives, (number, lives)
        check_derived(live, found)
        (folder / "state.json").write_text(json.dumps({"passages": found, "live": number}))


def finish(folder: Path) -> None:
    """What was left unfinished can be taken up: build, swap and roll back once more."""
    with LiveIndex.open(folder / "kb", device="cpu") as live, building_here():
        live.swap(live.build(folder / "b"))
        passages: State = {p.id: (p.text, dict(p.metadata)) for p in live.passages()}
        check_derived(live, passages)
        live.rollback()
        check_derived(live, passages)
        live.vacuum()


if __name__ == "__main__":
    sys.exit(main())
