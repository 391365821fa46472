"""`python -m tests.retrieve.engines.kill_while_writing FOLDER ROUNDS SEED`: kill the owner of an engine that writes.

The engine is `ivf`; what is left is checked after each kill.

Operations (upserts, deletes, optimisations) are a pure function of their number, and each is flushed before it is
acknowledged, so that what is left must be the state after the last one acknowledged, or after the one that followed.
The engine is told that hundreds of passages are many. Forks, so it opens nothing in this process itself. Prints the
rounds, the operations acknowledged and how many kills met one under way.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ultrarag.retrieve.engines import Schema, create, open_backend
from ultrarag.retrieve.engines.ivf import codes, engine, lookup, search
from ultrarag.types import Embeddings

DIM, IDS = 16, 900
State = dict[str, int]  # id -> the operation that wrote it


def vector(id: str, operation: int) -> np.ndarray:
    return np.random.default_rng([int(id[1:]), operation]).normal(size=DIM).astype(np.float32)


def chosen(operation: int) -> tuple[str, list[str]]:
    """What an operation does, and to which ids."""
    draw = random.Random(operation)
    kind = draw.choices(["upsert", "delete", "optimize"], [70, 25, 5])[0]
    return kind, [f"p{row}" for row in draw.sample(range(IDS), draw.randint(1, 120))]


def after(state: State, operation: int) -> State:
    kind, ids = chosen(operation)
    if kind == "upsert":
        return {**state, **dict.fromkeys(ids, operation)}
    return {id: by for id, by in state.items() if id not in ids} if kind == "delete" else state


def batch(ids: list[str], operations: list[int]) -> Embeddings:
    """What operations write to ids."""
    return Embeddings(dense=np.stack([vector(id, by) for id, by in zip(ids, operations, strict=True)]))


def apply(backend, operation: int) -> None:
    kind, ids = chosen(operation)
    if kind == "upsert":
        backend.upsert(ids, batch(ids, [operation] * len(ids)), [{"by": operation % 7} for _ in ids])
    elif kind == "delete":
        backend.delete(ids)
    else:
        backend.optimize()
    backend.flush()


def write_on(folder: Path, operation: int, acknowledged: int) -> None:
    """Apply operations until the end of the process; every hundredth time close and open again."""
    backend = open_backend(folder)
    while True:
        apply(backend, operation)
        os.write(acknowledged, b".")
        operation += 1
        if operation % 100 == 0:
            backend.close()
            backend = open_backend(folder)


def check(folder: Path, states: list[State]) -> None:
    """The folder holds one of these states; exit with its place."""
    backend = open_backend(folder)
    held = set(backend.ids())
    place = next(place for place, state in enumerate(states) if fits(backend, held, state))
    state = states[place]
    query = vector("p0", 10**6)
    ids = sorted(state)
    if ids:
        dense = np.stack([vector(id, state[id]) for id in ids])
        best = [ids[row] for row in np.argsort(-(dense @ query))[:5]]
        assert [id for id, _ in backend.search_dense(query, 5, exact=True)] == best
        found = dict(backend.search_dense(query, 50))
        assert all(abs(found[id] - float(dense[ids.index(id)] @ query)) < 1e-3 for id in found), "a wrong score"
        passing = {id for id in ids if state[id] % 7 == 3}
        assert {id for id, _ in backend.search_dense(query, IDS, {"by": 3})} == passing, "a wrong filter"
    backend.close()
    os._exit(place)


def fits(backend, held: set[str], state: State) -> bool:
    if held != state.keys() or backend.count() != len(state):
        return False
    ids = sorted(state)
    stored = backend.vectors(ids).dense
    return bool(np.array_equal(stored, np.array([vector(id, state[id]) for id in ids]).reshape(-1, DIM)))


def forked(work) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(99)


def loses_nothing(module: str, folder: Path, rounds: int) -> None:
    """For tests: run this script, or one that builds on it, in a process of its own."""
    command = [sys.executable, "-m", module, str(folder), str(rounds), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout + done.stderr
    ran, acknowledged, _ = map(int, done.stdout.split())
    assert ran == rounds
    assert acknowledged >= rounds


def main(folder: Path, rounds: int, seed: int) -> None:
    engine.EXACT_ROWS, engine.DEAD_ROWS, engine.UNSAVED_ROWS = 300, 200, 50
    search.FEW, codes.LISTS, codes.PROBES, lookup.TAIL_ROWS = 20, 1.0, 12, 100
    create(folder, Schema(dense=DIM), "ivf").close()
    state, operation, met, draw = {}, 0, 0, random.Random(seed)
    for number in range(rounds):
        reader, writer = os.pipe()
        child = forked(lambda: write_on(folder, operation, writer))  # noqa: B023
        os.close(writer)
        os.read(reader, 1)  # the first is done: it is open
        operation, state = operation + 1, after(state, operation)
        time.sleep(draw.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while got := os.read(reader, 4096):
            for _ in got:
                operation, state = operation + 1, after(state, operation)
        os.close(reader)
        states = [state, after(state, operation)]
        status = os.waitstatus_to_exitcode(os.waitpid(forked(lambda: check(folder, states)), 0)[1])  # noqa: B023
        if status not in (0, 1):
            sys.exit(f"round {number}, seed {seed}: after operation {operation} the index is not what was acknowledged")
        operation, state, met = operation + status, states[status], met + status
    print(rounds, operation, met)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
