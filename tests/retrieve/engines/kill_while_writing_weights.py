"""`python -m tests.retrieve.engines.kill_while_writing_weights FOLDER ROUNDS SEED`: the same for lexical weights.

The operations, kills and states are those of `kill_while_writing`; what is written are lexical weights, to which
the engine `ivf` is told to give postings after tens of passages. Weights are in quarters: sums are exact in any order.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from tests.retrieve.engines import kill_while_writing as dense
from ultrarag.retrieve.engines import Schema, create, open_backend
from ultrarag.retrieve.engines.ivf import engine, lexical, lookup
from ultrarag.types import Embeddings, Sparse

TOKENS, VOCABULARY = 8, 200


def weights(ids: list[str], operations: list[int]) -> Sparse:
    """Of every fifth passage there are none."""
    tokens, held = np.full((len(ids), TOKENS), Sparse.PAD_ID), np.zeros((len(ids), TOKENS), np.float32)
    for row, (id, by) in enumerate(zip(ids, operations, strict=True)):
        rng = np.random.default_rng([int(id[1:]), by])
        if int(id[1:]) % 5:
            tokens[row] = np.sort(rng.choice(VOCABULARY, TOKENS, replace=False))
            held[row] = rng.integers(1, 12, TOKENS) / 4
    return Sparse(tokens, held)


def batch(ids: list[str], operations: list[int]) -> Embeddings:
    return Embeddings(sparse=weights(ids, operations))


def check(folder: Path, states: list[dense.State]) -> None:
    """The folder holds one of these states; exit with its place."""
    backend = open_backend(folder)
    held = set(backend.ids())
    place = next(place for place, state in enumerate(states) if fits(backend, held, state))
    state = states[place]
    rng = np.random.default_rng(len(held))
    for _ in range(5):
        tokens = rng.choice(VOCABULARY, 9, replace=False).tolist()
        query = dict(zip(tokens, (rng.integers(1, 9, 9) / 2).tolist(), strict=True))
        scores = {id: score(row, query) for id, row in zip(sorted(state), rows(state), strict=True)}
        wanted = sorted(((id, found) for id, found in scores.items() if found), key=lambda hit: (-hit[1], hit[0]))
        asked = list(query), list(query.values())
        assert backend.search_sparse(*asked, 10) == wanted[:10], "a wrong hit"
        passing = [hit for hit in wanted if state[hit[0]] % 7 == 3]
        assert backend.search_sparse(*asked, dense.IDS, {"by": 3}) == passing, "a wrong filter"
    backend.close()
    os._exit(place)


def rows(state: dense.State) -> list[dict[int, float]]:
    return weights(sorted(state), [state[id] for id in sorted(state)]).to_dicts() if state else []


def score(row: dict[int, float], query: dict[int, float]) -> float:
    return sum(row.get(token, 0.0) * weight for token, weight in query.items())


def fits(backend, held: set[str], state: dense.State) -> bool:
    if held != state.keys() or backend.count() != len(state):
        return False
    return not state or backend.vectors(sorted(state)).sparse.to_dicts() == rows(state)


def main(folder: Path, rounds: int, seed: int) -> None:
    engine.DEAD_ROWS, lexical.TAIL_ROWS, lexical.FEW, lookup.TAIL_ROWS = 200, 60, 20, 100
    dense.create = lambda folder, schema, name: create(folder, Schema(sparse=True), name)
    dense.batch, dense.check = batch, check
    dense.main(folder, rounds, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
