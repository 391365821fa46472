"""What doors ask of a LiveIndex, over each kind of index: numpy, embedded, and shared through a server."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime
from enum import Enum
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from tests.retrieve import servers
from tests.retrieve.shared.test_shared import release
from tests.retrieve.test_live import EVERY, corpus, count_encoded, text_of
from ultrarag.errors import DataError, ExistsError, FingerprintError, IndexStateError, UsageError
from ultrarag.retrieve import Hits, Written, evaluate, jsonable, rerank
from ultrarag.retrieve.build import start
from ultrarag.retrieve.build.child import Build
from ultrarag.retrieve.generation import Follower, Generation, Serving
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.shared import link as link_module
from ultrarag.types import Embeddings, Passage

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


# Listing, counting, changing by a filter


def names(passages: Iterable[Passage]) -> list[str]:
    return [passage.id for passage in passages]


def test_passages_are_listed_by_filter_and_by_page(index: LiveIndex) -> None:
    index.add(corpus(12))
    assert names(index.passages()) == [f"p{n}" for n in range(12)]
    assert names(index.passages({"even": True})) == ["p0", "p2", "p4", "p6", "p8", "p10"]
    assert names(index.passages({"n": {"gte": 3}}, ids=["p9", "nobody", "p1", "p3"])) == ["p9", "p3"]
    assert names(index.passages(ids=["p9", "p3", "p1"], after="p1", limit=1)) == ["p3"]
    assert names(index.passages(limit=5)) == ["p0", "p1", "p10", "p11", "p2"]
    pages, last = [], ""
    while page := names(index.passages({"even": True}, after=last, limit=2)):
        pages.append(page)
        index.delete([page[0]])  # a page goes on from an id, whether it still exists or not
        index.vacuum()
        last = page[-1]
    assert pages == [["p0", "p10"], ["p2", "p4"], ["p6", "p8"]]


def test_count_and_delete_by_filter(index: LiveIndex) -> None:
    index.add(corpus(10))
    assert (index.count(), index.count({}), index.count({"even": True}), index.count({"n": 77})) == (10, 10, 5, 0)
    assert index.delete(filter={"even": True, "n": {"lt": 5}}) == 3
    assert index.delete(filter={"even": True, "n": {"lt": 5}}) == 0
    assert (len(index), index.count({"even": True})) == (7, 2)
    for head in ("dense", "bm25", "colbert"):
        assert not {"p0", "p2", "p4"} & {hit.id for hit in index.search("number", k=50, heads=[head])}, head
    assert index.delete(["p1", "p1", "nobody"]) == 1
    assert index.clear() == 6
    assert (len(index), index.count(), names(index.passages()), index.clear()) == (0, 0, [], 0)
    assert index.search("number", weights=EVERY) == []
    assert index.add(corpus(2)).added == 2


def test_delete_refuses_what_could_mean_everything(index: LiveIndex) -> None:
    index.add(corpus(2))
    for call in (
        lambda: index.delete(),
        lambda: index.delete(["p1"], filter={"n": 1}),
        lambda: index.delete(filter={}),
    ):
        with pytest.raises(UsageError, match="clear"):
            call()
    with pytest.raises(UsageError, match="limit is 0"):
        index.passages(limit=0)
    with pytest.raises(UsageError, match="unknown bound"):
        index.count({"n": {"more": 1}})
    with pytest.raises(UsageError, match="after is 3"):
        index.passages(after=3)  # type: ignore[arg-type]
    assert len(index) == 2


def test_update_merges_metadata_and_encodes_nothing(index: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add(corpus(6))
    seen = count_encoded(monkeypatch, index)
    assert index.update({"even": True}, {"tags": ["a", "b"], "n": None}) == 3
    assert index.update({"tags": "a"}, {"tags": ["a", "b"]}) == 3  # as they are: nothing is logged
    writes = index.status()["writes"]
    assert index.update({}, {"seen": 1}) == 6
    assert index.status()["writes"] - writes == 6
    assert seen == []
    assert index.get("p2").metadata == {"even": True, "tags": ["a", "b"], "seen": 1}
    assert index.get("p3").metadata == {"even": False, "n": 3, "seen": 1}
    for head in ("dense", "bm25"):
        assert {hit.id for hit in index.search("number", heads=[head], filter={"tags": "b"})} == {"p0", "p2", "p4"}
        assert index.search("number", heads=[head], filter={"n": 2}) == []
    with pytest.raises(DataError, match="'x'"):
        index.update({}, {"x": float("nan")})
    with pytest.raises(DataError, match="must be a mapping"):
        index.update({}, [1])  # type: ignore[arg-type]
    assert index.count({"seen": 1}) == 6


def test_changes_by_filter_are_there_after_opening_again(make: Make, tiny) -> None:
    live = make()
    live.add(corpus(6))
    live.update({"n": 1}, {"kept": True})
    live.delete(filter={"even": True})
    live.close()
    with closing(LiveIndex.open(live._owned.layout.root, tiny)) as again:
        assert names(again.passages({"kept": True})) == ["p1"]
        assert [hit.id for hit in again.search("number", heads=["dense"], filter={"kept": True})] == ["p1"]
        assert again.count() == 3


def test_an_update_reaches_a_generation_that_is_built_meanwhile(
    make: Make, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make()
    live.add(corpus(8))

    def run(root: Path, generation: Generation, *, device: str | None = None, **_: object) -> None:
        live.update({"even": True}, {"when": "before"})
        Build(root, generation, device).run(False)
        live.update({"even": False}, {"when": "after"})
        live.delete(filter={"n": 0})

    monkeypatch.setattr(start, "run_builder", run)
    live.swap(live.build(checkpoint))
    for head in ("dense", "bm25"):
        before = live.search("number", heads=[head], filter={"when": "before"})
        after = live.search("number", heads=[head], filter={"when": "after"})
        assert (len(before), len(after)) == (3, 4)
    live.update({"n": 1}, {"when": "later"})
    live.rollback()
    assert [hit.id for hit in live.search("number", heads=["dense"], filter={"when": "later"})] == ["p1"]


def test_others_follow_what_was_changed_by_filter(make: Make, tmp_path: Path, memory: Path, tiny) -> None:
    live = make()
    if live._core.link is None:
        pytest.skip("one process has it")
    live.add(corpus(8))
    with closing(LiveIndex.open(tmp_path / "reader", uri=f"qdrant://{memory}/kb")) as reader:
        live.update({"even": True}, {"new": 1})
        live.delete(filter={"n": {"lt": 3}})
        assert reader._core.watcher is not None
        reader._core.watcher.poll()
        assert names(reader.passages({"new": 1}, limit=10)) == ["p4", "p6"]
        assert {hit.id for hit in reader.search("number", heads=["bm25"], filter={"new": 1})} == {"p4", "p6"}
        release(live)
        assert reader.update({"n": 4}, {"new": 2}) == 1


def test_many_are_looked_up_at_once(index: LiveIndex) -> None:
    index.add(corpus(5))
    found = index.get_many(["p3", "nobody", "p1", "p3"])
    assert list(found) == ["p3", "p1"]
    assert found["p1"] == index.get("p1")
    assert index.get_many([]) == {}


def test_vectors_of_what_was_deleted_meanwhile_can_be_skipped(index: LiveIndex) -> None:
    index.add(corpus(7))
    whole = index.vectors(["p6", "p1"])
    found, vectors = index.vectors(["p6", "nobody", "p1"], missing="skip")
    assert found == ["p6", "p1"]
    np.testing.assert_allclose(vectors.dense, whole.dense)
    index._core.live.backend.delete(["p2", "p3"])  # as another process that shares the index does, before we hear of it
    found, vectors = index.vectors([f"p{n}" for n in range(7)], missing="skip")
    assert found == ["p0", "p1", "p4", "p5", "p6"]
    assert len(vectors) == 5
    for gone in (["nobody"], ["p2"], []):
        found, vectors = index.vectors(gone, missing="skip")
        assert (found, len(vectors)) == ([], 0)
    with pytest.raises(UsageError, match="nobody"):
        index.vectors(["p6", "nobody"])
    with pytest.raises(UsageError, match="'fail' or 'skip'"):
        index.vectors(["p6"], missing="zero")  # type: ignore[call-overload]


# One generation beside the live one; given passages


def test_generations_are_searched_beside_the_live_one(
    index: LiveIndex, tiny, other, checkpoint: Path, quick_builds
) -> None:
    index.add(corpus(10))
    built = index.build(checkpoint)
    index.add(corpus(4, start=10))
    index.delete(["p0"])
    index.update({"n": 11}, {"late": True})
    query = text_of(12)
    with index.searcher(built) as ready, index.searcher(1) as live:
        found, before = ready.search(query, k=50, weights=EVERY), index.search(query, k=50, weights=EVERY)
        assert {hit.id for hit in found} == {f"p{n}" for n in range(1, 14)}
        assert [hit.id for hit in ready.search(query, heads=["dense"], filter={"late": True})] == ["p11"]
        assert (found.generation, found.fingerprint) == (ready.generation, ready.fingerprint) == (2, other.fingerprint)
        expected = other.similarity(other.encode([query], "query"), index.vectors(["p12"]), {"dense": 1.0})
        assert ready.score(query, ["p12"], heads=["dense"])[0].score == pytest.approx(float(expected[0, 0]), abs=0.05)
        index.swap(built)
        assert index.search(query, k=50, weights=EVERY) == found
        assert live.search(query, k=50, weights=EVERY) == before  # as it was, now that it is the previous one
        assert live.search(query, heads=["bm25"]).generation == 1
        assert evaluate(live, {"q": query}, {"q": {"p12": 1}}, heads=["dense"]).run["q"]
        queries = tiny.encode([query], "query")
        assert live.search_embeddings(queries, tiny.fingerprint, k=50, heads=["dense"])[0]
        with pytest.raises(FingerprintError):
            ready.search_embeddings(queries, tiny.fingerprint)
        index.rollback()
        assert index.search(query, k=50, weights=EVERY) == before
    for closed in (ready, live):
        closed.close()
        with pytest.raises(IndexStateError, match="was closed"):
            closed.search(query)
    assert index.search(query, k=50, weights=EVERY) == before


def test_a_generation_that_was_removed_is_not_searched(
    make: Make, checkpoint: Path, tiny, other, tmp_path: Path, quick_builds
) -> None:
    live = make()
    live.add(corpus(5))
    built = live.build(checkpoint)
    with live.searcher(built) as ready:
        assert len(ready.search("number", heads=["dense"])) == 5
        live.discard(built)
        live.vacuum()
        with pytest.raises(IndexStateError, match="generation"):
            ready.search("number")
    live.vacuum()
    with pytest.raises(IndexStateError, match="generation"):
        live.searcher(built)
    with pytest.raises(IndexStateError, match="no generation 77"):
        live.searcher(77)
    again = live.build(checkpoint)
    with live.searcher(again) as ready:
        live.close()
        with pytest.raises(IndexStateError, match="closed"):
            ready.search("number")


def test_searchers_come_and_go_while_generations_are_swapped(make: Make, checkpoint: Path, quick_builds) -> None:
    live = make()
    live.add(corpus(10))
    live.swap(live.build(checkpoint))
    wrong: list[BaseException] = []
    stop = threading.Event()

    def search(id: int) -> None:
        try:
            while not stop.is_set():
                with live.searcher(id) as searcher:
                    assert searcher.search(text_of(3), heads=["dense"]).generation == id
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=search, args=[id]) for id in (1, 2, 1)]
    for thread in threads:
        thread.start()
    for number in range(4):
        live.add([Passage(f"new{number}", text_of(40 + number))])
        live.rollback()
        assert live.search(text_of(40 + number), k=1, heads=["bm25"])[0].id == f"new{number}"
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(live.search("number", k=50, heads=["dense"])) == 14


def test_search_and_score_of_given_passages(index: LiveIndex) -> None:
    index.add(corpus(20))
    some = ["p3", "p7", "nobody", "p8", "p14"]
    for head in ("dense", "sparse", "colbert", "bm25"):
        everywhere = {hit.id: hit.score for hit in index.search(text_of(7), k=50, heads=[head], exact=True)}
        found = index.search(text_of(7), ids=some, heads=[head])
        assert {hit.id for hit in found} == everywhere.keys() & set(some), head
        for hit in found:
            assert hit.score == pytest.approx(everywhere[hit.id], abs=1e-4)
    assert [hit.id for hit in index.search(text_of(7), ids=some, heads=["dense"], filter={"even": True}, k=1)] in (
        ["p8"],
        ["p14"],
    )
    assert index.search(text_of(7), ids=[], weights=EVERY) == []
    assert index.search("", ids=some, weights=EVERY) == []
    scored = index.score("castle", some, weights={"dense": 1.0, "bm25": 1.0})
    assert {hit.id for hit in scored} == {"p3", "p7", "p8", "p14"}
    assert scored[0].id == "p3"
    assert {hit.id: hit.scores["bm25"] for hit in scored[1:]} == {"p7": 0, "p8": 0, "p14": 0}
    for hit in scored:
        assert hit.score == pytest.approx(hit.scores["dense"] + hit.scores["bm25"])
    assert [hit.id for hit in index.search("castle", ids=some, heads=["bm25"])] == ["p3"]
    assert index.score("castle", ["nobody"], heads=["dense"]) == []
    with pytest.raises(UsageError, match="explicit weights"):
        index.score("castle", some, heads=["dense", "bm25"])
    with pytest.raises(UsageError, match="put one alone into a list"):
        index.search("castle", ids="p3", heads=["bm25"])


def test_hits_must_have_a_score_of_a_head(index: LiveIndex) -> None:
    index.add(corpus(20))
    plain = index.search(text_of(7), k=50, heads=["dense"], exact=True)
    least = (plain[4].score + plain[5].score) / 2
    above = index.search(text_of(7), k=50, heads=["dense"], exact=True, min_scores={"dense": least})
    assert [hit.id for hit in above] == [hit.id for hit in plain[:5]]
    both = index.search(text_of(7), k=50, weights={"dense": 1, "bm25": 3}, min_scores={"dense": least})
    assert {hit.id for hit in both} == {hit.id for hit in plain[:5]}
    assert {hit.id: hit.scores["dense"] for hit in both} == pytest.approx({hit.id: hit.score for hit in plain[:5]})
    words = {"weights": {"dense": 1, "bm25": 9}, "candidates": 1, "k": 1}
    by_words = index.search("castle 3", **words, min_scores={"dense": -99})[0]  # not the dense head's one candidate
    assert by_words.scores["dense"] == pytest.approx(index.score("castle 3", [by_words.id], heads=["dense"])[0].score)
    assert index.search(text_of(7), weights={"dense": 1, "bm25": 1}, min_scores={"dense": 99}) == []
    assert len(index.score(text_of(7), [hit.id for hit in plain], heads=["dense"], min_scores={"dense": least})) == 5
    for wrong, why in (
        ({"bm25": 1.0}, "head 'bm25' is not searched"),
        ({"dense": "x"}, "finite number"),
        ({"dense": float("nan")}, "finite number"),
        (0.3, "maps heads to numbers"),
    ):
        with pytest.raises(UsageError, match=why):
            index.search("x", heads=["dense"], min_scores=wrong)


def test_hits_that_differ_from_each_other(index: LiveIndex) -> None:
    index.add(corpus(12))
    index.add([Passage(f"copy {n}", text_of(3)) for n in range(3)])
    query = {"query": text_of(3), "k": 4}
    alike = index.search(**query, heads=["dense"])
    assert {hit.id for hit in alike} == {"p3", "copy 0", "copy 1", "copy 2"}
    differing = index.search(**query, heads=["dense"], mmr=0.3)
    assert sum(hit.passage.text == text_of(3) for hit in differing) == 1
    scores = {hit.id: hit.score for hit in index.search(text_of(3), k=20, heads=["dense"])}
    assert [hit.score for hit in differing] == pytest.approx([scores[hit.id] for hit in differing])
    assert [hit.id for hit in index.search(**query, heads=["dense"], mmr=1.0)] == [hit.id for hit in alike]
    words = index.search("number", k=2, heads=["bm25"], mmr=0.5)  # found by words, told apart by vectors
    assert len({hit.passage.text for hit in words}) == 2
    with index.encoding() as lent:
        vector = lent.encode([text_of(3)], "query"), lent.fingerprint
    assert index.search_embeddings(*vector, k=4, heads=["dense"], mmr=0.3) == [differing]
    assert len(index.search(text_of(3), k=99, heads=["dense"], mmr=0.3)) == 15
    assert index.search("", heads=["dense"], mmr=0.5) == []
    for wrong in (2, -0.1, "x", True):
        with pytest.raises(UsageError, match="mmr is"):
            index.search("x", heads=["dense"], mmr=wrong)
    sparse = Embeddings(sparse=index.encoder.encode([text_of(3)], "query").sparse)
    with pytest.raises(UsageError, match="dense"):
        index.search_embeddings(sparse, index.fingerprint, mmr=0.5)


def test_hits_that_differ_need_dense_vectors(tmp_path: Path, tiny) -> None:
    with LiveIndex.create(tmp_path / "kb", tiny, backend="numpy", heads=["sparse"]) as index:
        assert repr(index) == f"LiveIndex('{tmp_path / 'kb'}')"
        with pytest.raises(UsageError, match="mmr compares dense vectors, and the index has sparse, bm25"):
            index.search("castle", mmr=0.5)


# Adding


def test_what_becomes_of_passages_that_exist(index: LiveIndex) -> None:
    index.add(corpus(3))
    again = [Passage("p1", "other"), Passage("new", "first"), Passage("new", "second")]
    assert index.add(again, on_existing="skip") == Written(added=1, unchanged=1)
    assert (index.get("p1"), index.get("new").text) == (corpus(2)[1], "first")
    many = [Passage(f"m{n}", text_of(n)) for n in range(600)]  # more than are written at a time otherwise
    with pytest.raises(ExistsError, match="'p2'"):
        index.add([*many, Passage("p2", "x")], on_existing="fail")
    with pytest.raises(ExistsError, match="'m1' is twice"):
        index.add([*many, many[1]], on_existing="fail")
    assert len(index) == 4
    assert index.delete(["p2"]) == 1
    assert index.add([Passage("p2", "x")], on_existing="fail") == Written(added=1)  # a tombstone is no passage
    with pytest.raises(UsageError, match="replace, skip, fail"):
        index.add([], on_existing="never")  # type: ignore[arg-type]


def test_of_two_that_add_the_same_passage_one_fails(make: Make) -> None:
    live = make()
    done: list[object] = []

    def add(number: int) -> None:
        for turn in range(5):
            try:
                done.append(live.add([Passage(f"t{turn}", text_of(number))], on_existing="fail"))
            except ExistsError:
                done.append(None)

    threads = [threading.Thread(target=add, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (done.count(Written(added=1)), done.count(None)) == (5, 10)


def test_given_vectors_are_stored_and_nothing_is_encoded(
    index: LiveIndex, tiny, other, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, quick_builds
) -> None:
    passages = corpus(6)
    vectors = tiny.encode([passage.content for passage in passages])
    flipped = Embeddings(vectors.dense[::-1].copy(), vectors.sparse, vectors.colbert, vectors.mask)
    seen = count_encoded(monkeypatch, index)
    index.add(passages[:1])
    assert len(seen) == 1
    assert index.add(passages, embeddings=flipped, fingerprint=tiny.fingerprint) == Written(added=5, unchanged=1)
    assert len(seen) == 1
    np.testing.assert_allclose(index.vectors(["p2"]).dense[0], vectors.dense[3], atol=1e-3)  # as they were given
    index.add([Passage("p1", "of its own")])
    assert len(seen) == 2
    with pytest.raises(FingerprintError, match="encode them with the live encoder"):
        index.add(corpus(7), embeddings=tiny.encode(["x"] * 7), fingerprint=other.fingerprint)
    assert len(index) == 6
    index.swap(index.build(checkpoint))
    with pytest.raises(FingerprintError):
        index.add(corpus(1), embeddings=vectors[:1], fingerprint=tiny.fingerprint)


def test_given_vectors_must_be_what_the_encoder_could_make(live: LiveIndex, tiny) -> None:
    good, fingerprint = tiny.encode(["a", "b"]), tiny.fingerprint
    wrong = {
        "as many": good[:1],
        "give exactly these": Embeddings(dense=good.dense),
        "dense vectors are 3 wide": Embeddings(good.dense[:, :3], good.sparse, good.colbert, good.mask),
        "not finite": Embeddings(good.dense * np.nan, good.sparse, good.colbert, good.mask),
        "has length 2": Embeddings(good.dense * 2, good.sparse, good.colbert, good.mask),
    }
    for why, embeddings in wrong.items():
        with pytest.raises(UsageError, match=why):
            live.add(corpus(2), embeddings=embeddings, fingerprint=fingerprint)
    with pytest.raises(UsageError, match="go together"):
        live.add(corpus(2), embeddings=good)
    assert len(live) == 0
    assert live.add(corpus(2), embeddings=good, fingerprint=tiny.passage_fingerprint) == Written(added=2)
    mixed = live._core.live.encode_passages
    with live._core.live.giving({"b": 0}, good[:1]):
        found = mixed(["a", "b", "c"])
    np.testing.assert_allclose(found.dense[1], good.dense[0])
    np.testing.assert_allclose(found.dense[[0, 2]], tiny.encode(["a", "c"]).dense, atol=1e-5)


def test_of_vectors_that_were_given_a_kill_loses_few(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultrarag.retrieve.core.MOST_GIVEN", 4)
    monkeypatch.setattr(Follower, "_flush_pays", lambda self: False)
    texts = [f"text {n}" for n in range(7)]
    vectors, asked = tiny.encode(texts), []
    with LiveIndex.create(tmp_path / "index", tiny, backend="numpy") as live:
        for rows in (slice(0, 3), slice(3, 5), slice(5, 7)):
            passages = [{"id": text, "text": text} for text in texts[rows]]
            live.add(passages, embeddings=vectors[rows], fingerprint=tiny.fingerprint)
        assert live._core.vectors.pending == 2
        shutil.copytree(tmp_path / "index", tmp_path / "killed", ignore=shutil.ignore_patterns("owner.lock"))
    encode = Serving.encode_passages
    monkeypatch.setattr(Serving, "encode_passages", lambda self, some: asked.extend(some) or encode(self, some))
    with LiveIndex.open(tmp_path / "killed", tiny) as live:
        assert asked == texts[5:]
        np.testing.assert_allclose(live.vectors(texts).dense, vectors.dense, atol=1e-5)


def test_values_of_python_become_metadata(live: LiveIndex) -> None:
    key = uuid.uuid4()
    given = {
        "at": datetime(2024, 5, 1, 12, tzinfo=UTC),
        "day": date(2024, 5, 1),
        "np day": np.datetime64("2024-05-01T00:00"),
        "never": np.datetime64("NaT"),
        "id": key,
        "path": PurePosixPath("a/b"),
        "n": [np.int64(3), np.float32(0.5), np.bool_(True), np.arange(2)],
        "set": {"b", "a"},
        "tuple": (1, None),
        "colour": Enum("Colour", {"RED": "red"}).RED,
        "plain": {"x": "y"},
    }
    made = jsonable(given)
    assert made == {
        "at": "2024-05-01T12:00:00+00:00",
        "day": "2024-05-01",
        "np day": "2024-05-01T00:00:00",
        "never": None,
        "id": str(key),
        "path": "a/b",
        "n": [3, 0.5, True, [0, 1]],
        "set": ["a", "b"],
        "tuple": [1, None],
        "colour": "red",
        "plain": {"x": "y"},
    }
    assert json.loads(json.dumps(made)) == made
    live.add([Passage("p", "text", metadata=made)])
    assert live.count({"at": {"gte": "2024-05-01", "lt": "2024-05-02"}, "id": str(key)}) == 1
    for bad, place in (
        ({"a": [1, math.nan]}, r"'a\[1\]' is nan"),
        ({"a": {"b": np.float32("inf")}}, "'a.b' is inf"),
        ({"a": {1: 2}}, "'a' is an object with the key 1"),
        ({"a": b"x"}, "'a' is builtins.bytes"),
        ({"a": object()}, "'a' is builtins.object"),
        (holding_itself({}), "it holds itself"),
        ({"a": holding_itself([])}, "it holds itself"),
        ({"a": holding_itself({})}, "it holds itself"),
    ):
        with pytest.raises(DataError, match=place):
            jsonable(bad)


def holding_itself(value: dict | list) -> dict | list:
    value.append(value) if isinstance(value, list) else value.update(me=value)
    return value


# One process, several handles


def test_an_index_is_shared_within_a_process_and_closed_with_the_last_handle(make: Make, tiny, other) -> None:
    live = make()
    live.add(corpus(3))
    path = live.path
    live.close()
    first, second = (LiveIndex.open(path, encoder, share=True) for encoder in (tiny, None))
    first.add(corpus(4))
    assert len(second) == 4
    assert second.encoder is first.encoder
    with pytest.raises(IndexStateError, match="in use"):
        LiveIndex.open(path)
    for wrong, why in (({"device": "cuda"}, "device=None"), ({"repair": True}, "repaired"), ({"uri": "x"}, "uri=None")):
        with pytest.raises(UsageError, match=why):
            LiveIndex.open(path, share=True, **wrong)
    with pytest.raises(FingerprintError, match="leave the encoder out"):
        LiveIndex.open(path, other, share=True)
    first.close()
    first.close()
    with pytest.raises(IndexStateError, match="this handle of"):
        len(first)
    assert len(second.search("number", heads=["dense"])) == 4
    second.close()
    with closing(LiveIndex.open(path, tiny)) as alone:  # nobody has it any more
        assert len(alone) == 4


def test_threads_that_open_an_index_at_once_share_one(make: Make) -> None:
    live = make()
    path = live.path
    live.close()
    opened: list[LiveIndex] = []
    threads = [threading.Thread(target=lambda: opened.append(LiveIndex.open(path, share=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(each.encoder) for each in opened}) == 1
    for each in opened:
        each.add([Passage(f"by{id(each)}", "text")])
        each.close()
    with closing(LiveIndex.open(path)) as alone:
        assert len(alone) == 4
