"""Making a generation the live one: brought up to date, checked, compared by the gate, one pointer exchanged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ultrarag.errors import GateError, IndexStateError, UsageError
from ultrarag.evaluation import DEFAULT_METRICS, Qrels, Searchable, Verdict, evaluate
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.engines import kept
from ultrarag.retrieve.generation import Follower, Generation, Serving
from ultrarag.retrieve.passages import Store
from ultrarag.retrieve.search import Searcher
from ultrarag.types import Embeddings, Passage

logger = logging.getLogger("ultrarag")

#: Passages whose stored vectors are looked at, and those of them that are encoded again.
SAMPLE, CANARIES = 256, 8
#: Passages up to which such a one is compared with all: of ten million, 15 GB are read for each.
MOST_COMPARED = 1_000_000
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
    held, wanted = serving.backend.count(), store.count() - len(store.unencoded(serving.generation.vectors_of))
    if held != wanted:
        raise GateError(
            f"generation {serving.generation.id} holds vectors of {held} passages, the index has {wanted} that can be "
            f"encoded; build it again"
        )


def check_encoded(new: Serving, old: Serving, store: Store) -> None:
    """Raise GateError when a generation cannot encode more than a few passages that the live one can."""
    failed, told = _lacks(new, old, store)
    if failed > MOST_UNENCODED * store.count():
        raise GateError(f"{told}; force=True swaps all the same")


def tell_unencoded(new: Serving, old: Serving, store: Store) -> None:
    """Warn of passages that the live generation can encode, and the one that is to take its place cannot."""
    failed, told = _lacks(new, old, store)
    if failed:
        logger.warning("%s; `retry` encodes them again, and rolling back again brings them back", told)


def _lacks(new: Serving, old: Serving, store: Store) -> tuple[int, str]:
    """How many passages only the live generation can encode, and that in words."""
    able = old.unencoded.all()
    failed = {id: why for id, why in new.unencoded.all().items() if id not in able}
    example = next((f", such as {id!r} ({why})" for id, why in failed.items()), "")
    return len(failed), (
        f"generation {new.generation.id} has no vectors of {len(failed)} passages out of {store.count()} that the live "
        f"one can encode{example}"
    )


def check_sound(serving: Serving, store: Store, applied: int) -> None:
    """Raise GateError unless stored vectors are there, finite, of the right length, and those of the encoder.

    Args:
        applied: the entry of the log that the vectors contain.
    """
    _check_query(serving)
    passages = _sampled(serving, store, SAMPLE, applied)
    if not passages:
        return
    held = _stored(serving, passages)
    _check_values(serving, passages, held)
    canaries = passages[:: max(1, len(passages) // CANARIES)][:CANARIES]
    rows = np.array([passages.index(passage) for passage in canaries])
    fresh = _check_canaries(serving, canaries, held[rows])
    if fresh.dense is not None:
        for passage, vector in zip(canaries, fresh.dense, strict=True):
            _check_found(serving, passage, vector)


def check_sharing(core: Core, serving: Serving) -> None:
    """Raise GateError unless the vectors that are in service now are those of the encoder too.

    They are neither counted nor searched anew: they answer right now.
    """
    _check_query(serving)
    with core.writing:  # else a write could come between a passage and its vector
        core.vectors.catch_up()
        passages = _sampled(serving, core.store, CANARIES, core.vectors.applied)
        held = _stored(serving, passages) if passages else None
    if held is not None:
        _check_values(serving, passages, held)
        _check_canaries(serving, passages, held)


def _sampled(serving: Serving, store: Store, size: int, applied: int) -> list[Passage]:
    unencoded = serving.unencoded.all()
    return [passage for passage in store.sample(size, applied) if passage.id not in unencoded]


def _check_query(serving: Serving) -> None:
    """The query side may be another model than the passages': its vectors must be finite, and as wide as theirs."""
    query, schema = serving.encode_queries(["dimension"], serving.heads), serving.backend.schema
    for array in query.arrays():
        if not np.isfinite(array).all():
            raise _refused(serving, "the vector of a query is not finite")
    for head in ("dense", "colbert"):
        if (stored := getattr(schema, head)) and (given := getattr(query, head).shape[-1]) != stored:
            raise _refused(serving, f"the {head} vectors of queries are {given} wide, those of passages {stored}")


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


def _check_canaries(serving: Serving, passages: list[Passage], held: Embeddings) -> Embeddings:
    """Encode some passages again, whose stored vectors must be the same; return what the encoder gave.

    Codes may differ from those stored by as much as codes differ from vectors.
    """
    fresh = serving.encode_passages([passage.encodable for passage in passages])
    coded = kept(serving.backend, fresh)
    for row, passage in enumerate(passages):
        one = slice(row, row + 1)
        lost = _differences(coded[one], fresh[one])
        for head, difference in _differences(held[one], coded[one]).items():
            if not difference <= TOLERANCE + lost[head]:
                raise _refused(
                    serving,
                    f"the {head} vector stored for passage '{passage.id}' is not the one that the encoder gives "
                    f"(largest difference {difference:.3g})",
                )
    return fresh


def _check_found(serving: Serving, passage: Passage, vector: np.ndarray) -> None:
    """No hit may be better than the passage itself: none of all, or of very many none that a search finds."""
    own = float(serving.backend.score_dense(vector, [passage.id])[0])
    best = serving.backend.search_dense(vector, 10, exact=serving.backend.count() <= MOST_COMPARED)
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
    #: refuse also what measures lower without being significantly worse
    refuse_any_fall: bool = False
    #: go live although passages written since cannot be encoded by it; they are named in a warning
    returning: bool = False


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
        return _go_live(core, previous[0], SwapTerms(returning=True))


def _go_live(core: Core, generation: Generation, terms: SwapTerms) -> Flip:
    """Make a finished generation live; GateError leaves everything as it was."""
    old = core.live
    new, vectors = core.load(generation)
    seconds = 0.0
    try:
        if new.vectors is old.vectors:
            check_sharing(core, new)
        else:
            _approach(core, vectors)
            check_sound(new, core.store, vectors.applied)
        check = tell_unencoded if terms.returning else check_encoded
        forced = _allowed(lambda: check(new, old, core.store), terms.force)
        verdict = _measure(core, new, terms)
        if verdict is not None:
            if terms.note is not None:
                terms.note(verdict)
            if refusal := _refusal(verdict, generation, terms):
                if not terms.force:
                    raise GateError(refusal)
                forced = True
        if new.vectors is not old.vectors:
            _approach(core, vectors)
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


def _refusal(verdict: Verdict, generation: Generation, terms: SwapTerms) -> str | None:
    """Why the gate says no; None where it does not."""
    if verdict.judges_nothing:
        return (
            f"generation {generation.id} cannot be judged: {verdict.metric} is 0 for it and for the live one, so the "
            f"gate's queries tell nothing about either; the live one stays (check the ids of the qrels, or give other "
            f"queries; force=True swaps all the same)"
        )
    if verdict.worse:
        return (
            f"generation {generation.id} is significantly worse than the live one: {verdict}; the live one stays "
            f"(force=True swaps all the same)"
        )
    if terms.refuse_any_fall and verdict.change.difference < 0:
        return (
            f"generation {generation.id} measures lower than the live one, not significantly, but nothing speaks for "
            f"it: {verdict}; the live one stays (effort='full' may gain what this one cannot; force=True swaps all the "
            f"same)"
        )
    return None


def _exchange(core: Core, new: Serving, vectors: Follower, verdict: Verdict | None, forced: bool) -> float:
    """Apply the last writes, then flip in one transaction and one assignment, while writers wait; return how long."""
    with core.writing:
        started = time.perf_counter()
        if new.vectors is core.live.vectors:  # which have the writes, and go on from where they are
            core.vectors.catch_up()
            vectors.go_on_from(core.vectors)
        else:
            vectors.catch_up()
            vectors.flush()
            check_count(new, core.store)
            core.flush()
        core.catalog.flip(new.generation.id, forced, verdict.to_dict() if verdict else None)
        core.replace(new, vectors)
        return time.perf_counter() - started
