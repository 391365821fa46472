"""What doors ask of a LiveIndex, over each kind of index: numpy, embedded, and shared through a server."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.retrieve import servers
from tests.retrieve.test_live import EVERY, corpus
from ultrarag.retrieve import Hits, rerank
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.shared import link as link_module

KINDS = {"numpy": "numpy", "qdrant-edge": "qdrant_edge", "shared": "qdrant_client"}
Make = Callable[..., LiveIndex]


@pytest.fixture(params=KINDS)
def make(request, tmp_path: Path, memory: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Create an index of one kind; of a shared one, the watcher looks when a test says so."""
    kind = request.param
    if reason := servers.missing(KINDS[kind]):
        pytest.skip(reason)
    monkeypatch.setattr(link_module.Watcher, "_run", lambda self: None)
    monkeypatch.setattr(link_module, "WAIT_SECONDS", 0.5)
    made: list[LiveIndex] = []

    def create(name: str = "kb", encoder=tiny) -> LiveIndex:
        if kind == "shared":
            uri = f"qdrant://{memory}/{name}"
            made.append(LiveIndex.create(tmp_path / name, encoder, uri=uri))
        else:
            made.append(LiveIndex.create(tmp_path / name, encoder, backend=kind))
        return made[-1]

    yield create
    for live in made:
        live.close()


@pytest.fixture
def index(make: Make) -> LiveIndex:
    return make()


# Who answered


def test_an_answer_says_which_generation_gave_it(index: LiveIndex, checkpoint: Path, other, quick_builds) -> None:
    index.add(corpus(12))
    before = index.search("red apple", k=3, heads=["dense"])
    index.swap(index.build(checkpoint))
    after = index.search("red apple", k=3, heads=["dense"])
    assert (before.generation, before.fingerprint) == (1, index.generation(1).fingerprint)
    assert (after.generation, after.fingerprint) == (2, other.fingerprint)
    assert before == list(before)
    assert len(before) == 3
    assert before.query_id != after.query_id


def test_every_query_has_an_id_of_its_own_also_when_nothing_is_found(index: LiveIndex, tiny) -> None:
    queries = ["red apple", "", "red apple"]
    found = index.search_many(queries, heads=["dense"])
    index.add(corpus(3))
    found += index.search_many(queries, heads=["dense"])
    found += index.search_embeddings(tiny.encode(["red apple"], "query"), tiny.fingerprint, heads=["dense"])
    assert len({hits.query_id for hits in found}) == 7
    assert {(hits.generation, hits.fingerprint) for hits in found} == {(1, tiny.fingerprint)}
    assert [len(hits) for hits in found] == [0, 0, 0, 3, 0, 3, 3]


def test_hits_can_be_copied_pickled_and_reranked(tiny) -> None:
    hits = Hits([], generation=3, fingerprint="f" * 64)
    for same in (copy.copy(hits), copy.deepcopy(hits), pickle.loads(pickle.dumps(hits))):
        assert (same, vars(same)) == (hits, vars(hits))
    assert vars(rerank(tiny, "x", hits)) == vars(hits)


def test_reranked_hits_answer_the_same_query(live: LiveIndex, tiny) -> None:
    live.add(corpus(5))
    hits = live.search("red apple", heads=["dense"])
    reranked = rerank(tiny, "red apple", hits, weights={"dense": 1.0})
    assert isinstance(reranked, Hits)
    assert reranked.query_id == hits.query_id
    assert type(rerank(tiny, "red apple", list(hits), weights={"dense": 1.0})) is list


def test_answers_name_the_generation_that_answered_while_others_are_swapped_in(
    make: Make, checkpoint: Path, quick_builds
) -> None:
    live = make()
    live.add(corpus(20))
    live.swap(live.build(checkpoint))
    fingerprints = {id: live.generation(id).fingerprint for id in (1, 2)}
    seen: list[Hits] = []
    stop = threading.Event()

    def search() -> None:
        while not stop.is_set():
            seen.extend(live.search_many(["red apple", "deep ocean"], weights=EVERY))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        live.rollback()
    stop.set()
    for thread in threads:
        thread.join()
    assert all(fingerprints[hits.generation] == hits.fingerprint for hits in seen)
    assert {hits.generation for hits in seen} <= {1, 2}
