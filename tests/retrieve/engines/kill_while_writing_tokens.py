"""`python -m tests.retrieve.engines.kill_while_writing_tokens FOLDER ROUNDS SEED`: the same for the engine `plaid`.

The operations, kills and states are those of `kill_while_writing`; what is written are token vectors. Where they have
become codes, each must with its refinement be near what was written, and a search must rank by what is stored.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from tests.retrieve.engines import kill_while_writing as dense
from ultrarag.retrieve.engines import Schema, create, open_backend
from ultrarag.retrieve.engines.plaid import building, engine, search
from ultrarag.types import Embeddings

TOKENS = 4


def vectors(ids: list[str], operations: list[int]) -> Embeddings:
    """Unit token vectors, each passage's around one of its own; of every fifth there are none."""
    rows = [np.random.default_rng([int(id[1:]), by]) for id, by in zip(ids, operations, strict=True)]
    tokens = np.stack([rng.normal(size=(1, dense.DIM)) + 0.3 * rng.normal(size=(TOKENS, dense.DIM)) for rng in rows])
    mask = np.array([[int(id[1:]) % 5 > 0] * TOKENS for id in ids], np.int64)
    tokens = (tokens / np.linalg.norm(tokens, axis=2, keepdims=True)).astype(np.float32)
    return Embeddings(colbert=tokens * mask[..., None].astype(np.float32), mask=mask)


def check(folder: Path, states: list[dense.State]) -> None:
    """The folder holds one of these states; exit with its place."""
    backend = open_backend(folder)
    held = set(backend.ids())
    place = next(place for place, state in enumerate(states) if fits(backend, held, state))
    state = states[place]
    ids = [id for id in sorted(state) if int(id[1:]) % 5]
    if ids:
        query = vectors(["p1"], [10**6]).colbert[0]
        stored = backend.vectors(ids).colbert
        scores = (stored @ query.T).max(1).mean(1)
        best = {ids[row] for row in np.argsort(-scores)[:5]}
        assert {id for id, _ in backend.search_tokens(query, 5, exact=True)} == best
        for exact in (True, False):
            found = backend.search_tokens(query, 5, exact=exact)
            assert len(found) == min(5, len(ids))
            assert all(abs(score - scores[ids.index(id)]) < 1e-4 for id, score in found), "a wrong score"
        passing = {id for id in ids if state[id] % 7 == 3}
        assert {id for id, _ in backend.search_tokens(query, dense.IDS, {"by": 3})} == passing, "a wrong filter"
    backend.close()
    os._exit(place)


def fits(backend, held: set[str], state: dense.State) -> bool:
    if held != state.keys() or backend.count() != len(state):
        return False
    if not state:
        return True
    ids = sorted(state)
    wanted, stored = vectors(ids, [state[id] for id in ids]), backend.vectors(ids)
    if not np.array_equal(stored.mask, wanted.mask[:, : stored.mask.shape[1]]):
        return False
    off = np.linalg.norm(stored.colbert - wanted.colbert[:, : stored.colbert.shape[1]], axis=2)
    return bool((off < 0.02).all())  # codes alone are 0.1 away, those of another operation 1.4


def main(folder: Path, rounds: int, seed: int) -> None:
    engine.CODED_TOKENS, engine.DEAD_ROWS, engine.UNSAVED_ROWS = 800, 200, 50
    building.LIST_TOKENS, search.FEW, search.LEAST_CANDIDATES = 16, 20, 100
    search.LEAST_RESCORED = 16
    dense.create = lambda folder, schema, name: create(folder, Schema(colbert=dense.DIM), "plaid?bits=4")
    dense.batch, dense.check = vectors, check
    dense.main(folder, rounds, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
