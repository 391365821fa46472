"""Generations that share vectors, or map them: no passage is encoded, and all that holds for others holds for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve import stand_in
from tests.retrieve.stand_in import MODELS, StandIn, score
from tests.retrieve.test_live import assert_complete, corpus
from ultrarag import Encoder
from ultrarag.encode.ranks import FOLDER, Encoded
from ultrarag.errors import FingerprintError, GateError, IndexStateError, UsageError
from ultrarag.maps import LinearMap
from ultrarag.packages import install
from ultrarag.retrieve.build import child, start
from ultrarag.retrieve.build.origin import mapped
from ultrarag.retrieve.engines import registry
from ultrarag.retrieve.engines.numpy_engine import NumpyBackend
from ultrarag.retrieve.generation import Catalog
from ultrarag.retrieve.generation import open as opening
from ultrarag.retrieve.live import LiveIndex
from ultrarag.types import Embeddings

#: A model, the same with another query side, and with a map of its passages' vectors too.
BASE, QUERY, MAPPED = 0, MODELS, 2 * MODELS
TEXTS = {f"p{n}": f"text {n}" for n in range(7)}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, quick_builds: None) -> list[str]:
    """Stand-ins are saved and loaded; the texts of passages that anything but a live encoder encodes."""
    encoded: list[str] = []
    for module in (opening, start):
        monkeypatch.setattr(module, "prepare", stand_in.prepare)
    for module in (opening, child):
        monkeypatch.setattr(module, "load_encoder", stand_in.load_encoder)
    monkeypatch.setattr("ultrarag.encoder.read_passage_maps", stand_in.read_passage_maps)
    encode = child.Build.encode
    monkeypatch.setattr(child.Build, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    return encoded


@pytest.fixture
def kb(tmp_path: Path, built: list[str]):
    """An index of the model with some passages."""
    with LiveIndex.create(tmp_path / "kb", StandIn(BASE), backend="numpy") as live:  # type: ignore[arg-type]
        live.add({"id": id, "text": text} for id, text in TEXTS.items())
        yield live


def check(live: LiveIndex, texts: dict[str, str] = TEXTS) -> None:
    """Every passage is found with the score that its text has in any model."""
    hits = {hit.id: hit for hit in live.search("query", k=20)}
    assert {id: hit.passage.text for id, hit in hits.items()} == texts
    assert all(abs(hit.score - score(texts[id])) < 1e-5 for id, hit in hits.items())
    core = live._core
    assert sorted(core.live.backend.ids()) == sorted(texts)


def test_a_query_side_is_built_at_once_and_swapped_and_rolled_back_as_a_pointer(kb, built, caplog) -> None:
    caplog.set_level("INFO", "ultrarag")
    generation = kb.build(StandIn(QUERY))
    assert (generation.state, generation.vectors_of, built) == ("ready", 1, [])
    assert "no passage was encoded: generation 2 shares the vectors of generation 1" in caplog.text
    assert not (kb.path / "generations" / "2" / "vectors").exists()
    vectors = kb._core.live.vectors
    kb.swap(generation)
    assert kb.fingerprint == StandIn(QUERY).fingerprint
    assert kb._core.live.vectors is vectors
    check(kb)
    kb.rollback()
    assert kb.fingerprint == StandIn(BASE).fingerprint
    assert kb._core.live.vectors is vectors
    check(kb)


def test_writes_are_encoded_and_replayed_once_for_all_that_share(kb, built, monkeypatch) -> None:
    kb.swap(kb.build(StandIn(QUERY)))
    kb.add([{"id": "p1", "text": "another"}, {"id": "new", "text": "a new one"}])
    kb.delete(["p2"])
    texts = {**{id: text for id, text in TEXTS.items() if id != "p2"}, "p1": "another", "new": "a new one"}
    check(kb, texts)
    with monkeypatch.context() as patch:
        patch.setattr(kb._core.live.backend, "upsert", lambda *a: pytest.fail("a write was replayed"))
        kb.rollback()
    check(kb, texts)
    kb.close()
    with LiveIndex.open(kb.path) as live:
        assert live.encoder.encoded == []
        check(live, texts)
        assert [g["behind"] for g in live.status()["generations"]] == [0, 0]


def test_vectors_outlive_the_generation_that_made_them(kb, built) -> None:
    kb.swap(kb.build(StandIn(QUERY)))
    kb.swap(kb.build(StandIn(1)))  # generation 1 is retired, 2 shares its vectors and is the previous one
    kb.vacuum()
    assert not (kb.path / "generations" / "1" / "checkpoint").exists()
    kb.add([{"id": "new", "text": "a new one"}])
    kb.rollback()
    check(kb, {**TEXTS, "new": "a new one"})
    kb.close()
    with LiveIndex.open(kb.path) as live:
        check(live, {**TEXTS, "new": "a new one"})
        assert live.build(StandIn(BASE)).vectors_of == 1  # the first model again, whose vectors are there
        live.swap(4)
        live.swap(live.build(StandIn(2)))
        live.swap(live.build(StandIn(1)))
        live.vacuum()  # nobody uses them now
        assert not (live.path / "generations" / "1").exists()


def test_stored_vectors_are_mapped_and_what_was_written_meanwhile_is_encoded(kb, built, monkeypatch) -> None:
    monkeypatch.setattr("ultrarag.encode.ranks.CHUNK_TEXTS", 3)
    monkeypatch.setattr(child, "LEFT_OVER", 0)
    write, blocks = Encoded.write, []

    def writing(self, block, texts, vectors) -> None:
        if not blocks:
            kb.add([{"id": "p6", "text": "changed meanwhile"}])
        blocks.append(list(texts))
        write(self, block, texts, vectors)

    monkeypatch.setattr(Encoded, "write", writing)
    generation = kb.build(StandIn(MAPPED))
    assert (generation.mapped_from, generation.vectors_of) == (1, 2)
    assert blocks == [["text 0", "text 1", "text 2"], ["text 3", "text 4", "text 5"], []]
    assert built == ["changed meanwhile"]
    assert "were mapped" in generation.how_built()
    assert not any((kb.path / FOLDER).glob("*"))
    kb.swap(generation)
    check(kb, {**TEXTS, "p6": "changed meanwhile"})
    kb.rollback()
    check(kb, {**TEXTS, "p6": "changed meanwhile"})


@pytest.mark.parametrize("then", [MAPPED, 1], ids=["goes on", "is given up"])
def test_a_mapping_that_was_cut_off_leaves_nothing(kb, built, monkeypatch, then: int) -> None:
    monkeypatch.setattr("ultrarag.encode.ranks.CHUNK_TEXTS", 3)
    write, blocks = Encoded.write, []

    def writing(self, block, texts, vectors) -> None:
        blocks.append(block)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        write(self, block, texts, vectors)

    monkeypatch.setattr(Encoded, "write", writing)
    with pytest.raises(KeyboardInterrupt):
        kb.build(StandIn(MAPPED))
    kb.close()
    with LiveIndex.open(kb.path) as live:
        live.swap(live.build(StandIn(then)))
        assert (blocks, built) == (([0, 1, 1, 2], []) if then == MAPPED else ([0, 1], list(TEXTS.values())))
        check(live)
        live.vacuum()
        assert not any((live.path / FOLDER).glob("*"))


def test_another_live_generation_ends_a_mapping(kb, built, monkeypatch) -> None:
    kb.swap(kb.build(StandIn(1)))
    kb.rollback()
    begin = Encoded.begin
    monkeypatch.setattr(Encoded, "begin", lambda self: (begin(self), kb.rollback())[0])
    with pytest.raises(IndexStateError, match="generation 2 went live while the vectors of generation 1 were read"):
        kb.build(StandIn(MAPPED))


@pytest.mark.parametrize(
    ("number", "wishes", "why"),
    [
        (1, {}, "its passage side .* is another one than that of the live generation 1"),
        (BASE, {}, "live with this very encoder"),
        (QUERY, {"backend": "qdrant-edge"}, "it is to be in 'qdrant-edge'"),
    ],
)
def test_sharing_can_be_insisted_on_and_refused(kb, built, number: int, wishes: dict, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        kb.build(StandIn(number), share=True, **wishes)
    assert len(kb.status()["generations"]) == 1
    shared = kb.build(StandIn(QUERY), share=True)
    own = kb.build(StandIn(QUERY), share=False)
    assert (own.vectors_of, sorted(built)) == (own.id, sorted(TEXTS.values()))
    assert kb.build(StandIn(QUERY), share=True).id == shared.id
    kb.swap(own)
    check(kb)


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default engine is numpy, and for seven passages another one is better."""
    monkeypatch.setattr(registry, "default_backend", lambda: "numpy")
    monkeypatch.setattr(registry, "LARGE", len(TEXTS))
    registry._tell_of_faiss.cache_clear()


def test_a_build_of_many_passages_takes_the_engine_for_many(kb, built, few_are_many) -> None:
    pytest.importorskip("faiss")
    kb.delete(["p0"])
    assert kb.build(StandIn(1)).backend == "numpy"
    kb.add([{"id": "p0", "text": TEXTS["p0"]}])
    assert kb.build(StandIn(1)).backend == "numpy", "it is ready"
    assert kb.build(StandIn(2), backend="numpy").backend == "numpy"
    assert kb.build(StandIn(QUERY)).backend == "numpy", "it shares"
    many = kb.build(StandIn(BASE))
    assert many.backend == "ivf"
    kb.swap(many)
    check(kb)
    kb.delete(["p0"])
    assert kb.build(StandIn(BASE)).backend == "ivf", "it stays with what is live"
    kb.swap(kb.build(StandIn(QUERY), share=True))
    assert kb.status()["live"]["backend"] == "ivf"


def test_a_build_shares_with_a_generation_in_another_engine(kb, built, few_are_many) -> None:
    pytest.importorskip("faiss")
    many = kb.build(StandIn(1))
    shared = kb.build(StandIn(QUERY + 1), share=True)
    assert (shared.backend, shared.vectors_of) == ("ivf", many.id)
    kb.swap(shared)
    check(kb)


def test_without_its_library_a_build_of_many_says_so_once(kb, built, few_are_many, monkeypatch, caplog) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else find_spec(name))
    assert [kb.build(StandIn(number)).backend for number in (1, 2)] == ["numpy"] * 2
    assert [record.getMessage() for record in caplog.records if "pip install faiss-cpu==" in record.getMessage()] == [
        "from 7 passages on the engine 'ivf' is built faster than 'numpy' and takes less memory, after: "
        f"{install('faiss-cpu', 'numba')}"
    ]


def test_a_precision_of_its_own_is_encoded(kb, built) -> None:
    encoder = StandIn(QUERY)
    encoder.precision = "bf16"
    assert not kb.build(encoder).shares


def test_what_is_not_sound_does_not_go_live(kb, built, monkeypatch) -> None:
    kb.build(StandIn(QUERY))
    wide = Embeddings(dense=np.ones((1, 3), np.float32))
    encode = StandIn.encode
    monkeypatch.setattr(
        StandIn, "encode", lambda self, t, kind="passage", **o: wide if kind == "query" else encode(self, t, kind)
    )
    with pytest.raises(GateError, match="the dense vectors of queries are 3 wide, those of passages 24"):
        kb.swap(2)
    monkeypatch.setattr(StandIn, "encode", lambda self, t, kind="passage", **o: encode(self, t[::-1], kind))
    with pytest.raises(GateError, match="is not the one that the encoder gives"):
        kb.swap(2)
    monkeypatch.setattr(StandIn, "encode", encode)
    check(kb)


def test_an_encoder_of_other_passages_is_refused(kb, built) -> None:
    live = kb._core.live
    with pytest.raises(FingerprintError, match="holds vectors of the encoder model-0"):
        type(live)(live.generation, StandIn(1), live.vectors)
    with pytest.raises(FingerprintError):  # the query side counts too
        kb.search_embeddings(StandIn(QUERY).encode(["q"], "query"), StandIn(QUERY).fingerprint)
    kb.swap(kb.build(StandIn(QUERY)))
    assert kb.search_embeddings(StandIn(QUERY).encode(["q"], "query"), StandIn(QUERY).fingerprint)[0]


def test_passages_that_cannot_be_encoded_are_listed_once_for_all_that_share(kb, built, monkeypatch) -> None:
    encode = StandIn.encode

    def failing(self, texts, kind="passage", **options):
        if "poison" in texts:
            raise ValueError("no")
        return encode(self, texts, kind, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "encode", failing)
        kb.add([{"id": "bad", "text": "poison"}])
        kb.swap(kb.build(StandIn(QUERY)))
        assert [list(g["unencoded"]) for g in kb.status()["generations"]] == [["bad"], ["bad"]]
    assert kb.retry() == {}
    kb.rollback()
    assert kb.status()["live"]["unencoded"] == {}
    check(kb, {**TEXTS, "bad": "poison"})


def test_a_swap_that_fails_between_its_steps_leaves_the_live_pair_usable(kb, built, monkeypatch) -> None:
    kb.build(StandIn(QUERY))
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "flip", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            kb.swap(2)
    kb.add([{"id": "p0", "text": "written afterwards"}])
    check(kb, {**TEXTS, "p0": "written afterwards"})
    kb.swap(2)
    check(kb, {**TEXTS, "p0": "written afterwards"})


def test_a_gate_judges_a_query_side(kb, built) -> None:
    kb.build(StandIn(QUERY))
    verdict = kb.swap(2, gate=({"q": "query"}, {"q": {"p0": 1}})).verdict
    assert verdict.old == verdict.new > 0
    kb.rollback()
    assert kb.build(StandIn(QUERY)).vectors_of == 1  # that of the previous generation


def test_maps_are_of_heads() -> None:
    turn = LinearMap(np.array([[0, -1], [1, 0]], np.float32), np.full(2, 0.5, np.float32), False, "colbert")
    tokens = np.array([[[1, 0], [0, 0]]], np.float32)
    found = mapped(Embeddings(dense=np.ones((1, 2)), colbert=tokens, mask=np.array([[1, 0]])), [turn])
    assert found.colbert.tolist() == [[[0.5, 1.5], [0.0, 0.0]]]  # padding stays zero
    assert found.dense.tolist() == [[1, 1]]


@pytest.fixture(params=["query side", "map"])
def child_of_tiny(request, tiny, other, tmp_path: Path) -> Path:
    """A checkpoint whose passage side is that of the tiny model, or that with a map behind it."""
    maps = []
    if request.param == "map":
        chance = np.random.default_rng(0)
        weight = np.eye(tiny.dim) + 0.1 * chance.standard_normal((tiny.dim, tiny.dim))
        maps = [LinearMap(weight, 0.1 * chance.standard_normal(tiny.dim))]
    return Encoder.of_sides(tiny, other, passage_maps=maps).save(tmp_path / "child")


def test_a_real_encoder_with_every_head(live: LiveIndex, tiny, other, child_of_tiny, quick_builds, monkeypatch) -> None:
    passages = corpus(9)
    live.add(passages)
    monkeypatch.setattr(child.Build, "encode", lambda self, texts: pytest.fail("a passage was encoded"))
    generation = live.build(child_of_tiny)
    assert not generation.encodes
    live.swap(generation)
    assert_complete(live, 9)
    fresh = live.encoder.encode([p.content for p in passages], "passage")
    held = live.vectors([p.id for p in passages])
    np.testing.assert_allclose(held.dense, fresh.dense, atol=1e-5)
    np.testing.assert_allclose(held.colbert, fresh.colbert, atol=1e-5)
    query = other.encode(["red apple"], "query")
    hits = live.search("red apple", k=9, heads=["dense"])
    wanted = np.sort(query.dense @ fresh.dense.T)[0][::-1]
    np.testing.assert_allclose([hit.score for hit in hits], wanted, atol=1e-5)
    live.add(corpus(2, 9))
    live.rollback()
    assert_complete(live, 11)


@pytest.mark.parametrize(("most", "exact"), [(1_000_000, True), (3, False)])
def test_a_swap_compares_passages_with_all_only_where_there_are_not_very_many(
    most: int, exact: bool, kb: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrarag.retrieve.swap.MOST_COMPARED", most)
    generation, asked = kb.build(StandIn(2)), []  # type: ignore[arg-type]
    search = NumpyBackend.search_dense

    def searching(self, vector, k, filter=None, exact=False):
        asked.append(exact)
        return search(self, vector, k, filter, exact)

    monkeypatch.setattr(NumpyBackend, "search_dense", searching)
    kb.swap(generation)
    assert set(asked) == {exact}
    monkeypatch.undo()
    check(kb)
