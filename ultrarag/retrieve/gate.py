"""What a new generation must pass before it goes live: it is sound, and not significantly worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ultrarag.errors import GateError, UsageError
from ultrarag.evaluation import DEFAULT_METRICS, Qrels, Searchable, Verdict, evaluate
from ultrarag.retrieve.generation import Serving
from ultrarag.retrieve.passages import Store
from ultrarag.types import Embeddings, Passage

#: Passages whose stored vectors are looked at, and those of them that are encoded again.
SAMPLE, CANARIES = 256, 8
#: The share of passages that a new encoder may fail on, each of which is listed.
MOST_UNENCODED = 0.01
#: How far stored vectors may be from those of the encoder: bf16 moves components by some 0.005.
TOLERANCE = 0.03


#: Queries and what is relevant to them, or what was measured elsewhere.
Gate = tuple[Mapping[str, str], Qrels] | Verdict


def compare(old: Searchable, new: Searchable, gate: Gate, metric: str, search: dict[str, Any]) -> Verdict:
    """Evaluate both generations on the same queries, searched and fused in the same way."""
    if isinstance(gate, Verdict):
        return gate
    if not isinstance(gate, tuple | list) or len(gate) != 2:
        raise UsageError("gate is a pair (queries, qrels): query id -> text, and query id -> passage id -> relevance")
    queries, qrels = gate
    names = list(dict.fromkeys((metric, *DEFAULT_METRICS)))
    before, after = (evaluate(side, queries, qrels, names, **search) for side in (old, new))
    return Verdict.of(metric, before, after)


def check_count(serving: Serving, store: Store) -> None:
    """Raise GateError unless there is a vector for every passage."""
    held, wanted = serving.backend.count(), store.count() - len(store.unencoded(serving.generation.id))
    if held != wanted:
        raise GateError(
            f"generation {serving.generation.id} holds vectors of {held} passages, the index has {wanted} that can be "
            f"encoded; build it again"
        )


def check_encoded(new: Serving, old: Serving, store: Store) -> None:
    """Raise GateError when a generation cannot encode more than a few passages that the live one can."""
    failed = {id: why for id, why in new.unencoded.all().items() if id not in old.unencoded.all()}
    if len(failed) > MOST_UNENCODED * store.count():
        id, why = next(iter(failed.items()))
        raise GateError(
            f"generation {new.generation.id} has no vectors of {len(failed)} passages out of {store.count()} that the "
            f"live one can encode, such as {id!r} ({why}); force=True swaps all the same"
        )


def check_sound(serving: Serving, store: Store, applied: int) -> None:
    """Raise GateError unless stored vectors are there, finite, of the right length, and those of the encoder.

    Args:
        applied: the entry of the log that the vectors contain.
    """
    unencoded = serving.unencoded.all()
    passages = [passage for passage in store.sample(SAMPLE, applied) if passage.id not in unencoded]
    if not passages:
        return
    held = _stored(serving, passages)
    _check_values(serving, passages, held)
    canaries = passages[:: max(1, len(passages) // CANARIES)][:CANARIES]
    rows = np.array([passages.index(passage) for passage in canaries])
    _check_canaries(serving, canaries, held[rows])


def _stored(serving: Serving, passages: list[Passage]) -> Embeddings:
    try:
        return serving.backend.vectors([passage.id for passage in passages])
    except UsageError as error:
        raise _refused(serving, str(error)) from error


def _check_values(serving: Serving, passages: list[Passage], held: Embeddings) -> None:
    for array in held.arrays():
        wrong = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        if wrong.any():
            raise _refused(serving, f"the vector of passage '{passages[int(wrong.argmax())].id}' is not finite")
    if held.dense is not None and serving.encoder.settings.normalize:
        lengths = np.linalg.norm(held.dense, axis=1)
        worst = int(np.abs(lengths - 1).argmax())
        if abs(lengths[worst] - 1) > TOLERANCE:
            raise _refused(
                serving, f"the vector of passage '{passages[worst].id}' has length {lengths[worst]:.3f} instead of 1"
            )


def _check_canaries(serving: Serving, passages: list[Passage], held: Embeddings) -> None:
    """Encode some passages again: their stored vectors must be the same, and dense search must find them."""
    fresh = serving.encode_passages([passage.content for passage in passages])
    for row, passage in enumerate(passages):
        for head, difference in _differences(held[row : row + 1], fresh[row : row + 1]).items():
            if not difference <= TOLERANCE:
                raise _refused(
                    serving,
                    f"the {head} vector stored for passage '{passage.id}' is not the one that the encoder gives "
                    f"(largest difference {difference:.3g})",
                )
        if held.dense is not None:
            _check_found(serving, passage, fresh.dense[row])


def _check_found(serving: Serving, passage: Passage, vector: np.ndarray) -> None:
    """No hit of an exact search may be better than the best, and the passage's own score must be as stored."""
    own = float(serving.backend.score_dense(vector, [passage.id])[0])
    best = serving.backend.search_dense(vector, 10, exact=True)
    if not best or (serving.encoder.settings.normalize and best[0][1] > own + TOLERANCE):
        raise _refused(serving, f"passage '{passage.id}' is not found by its own vector")


def _differences(held: Embeddings, fresh: Embeddings) -> dict[str, float]:
    """The largest difference of any component, relative to the largest component, per head."""
    found = {}
    if held.dense is not None:
        found["dense"] = _difference(held.dense, fresh.dense)
    if held.sparse is not None and fresh.sparse is not None:
        mine, theirs = held.sparse.to_dicts()[0], fresh.sparse.to_dicts()[0]
        tokens = sorted(mine.keys() | theirs.keys())
        sides = [np.array([side.get(token, 0.0) for token in tokens]) for side in (mine, theirs)]
        found["sparse"] = _difference(*sides)
    if held.colbert is not None:
        found["colbert"] = _difference(*(e.colbert[0][e.mask[0].astype(bool)] for e in (held, fresh)))
    return found


def _difference(left: np.ndarray, right: np.ndarray) -> float:
    if left.shape != right.shape:
        return float("inf")
    return float(np.abs(left - right).max() / max(1.0, np.abs(right).max())) if left.size else 0.0


def _refused(serving: Serving, why: str) -> GateError:
    return GateError(f"generation {serving.generation.id} is not sound: {why}; build it again")
