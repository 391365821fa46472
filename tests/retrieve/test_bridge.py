"""The bridge: a new encoder over the old generation's vectors, from the sample to the swap."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.retrieve.test_live import corpus, text_of
from ultrarag.errors import UsageError
from ultrarag.maps import LinearMap, fit_ridge
from ultrarag.retrieve import bridge
from ultrarag.retrieve.bridge import BridgeTerms, ahead, crossing, serving
from ultrarag.retrieve.bridge import kept as kept_vectors
from ultrarag.retrieve.bridge.kept import Kept
from ultrarag.retrieve.bridge.serving import BridgedVectors
from ultrarag.retrieve.build import start
from ultrarag.retrieve.command import printing
from ultrarag.retrieve.live import LiveIndex
from ultrarag.types import Embeddings, Passage

PASSAGES = 60


class OldVectors:
    """An engine with vectors in memory, searched exactly."""

    directory = Path("old")

    def __init__(self, vectors: np.ndarray) -> None:
        self.held = vectors
        from ultrarag.retrieve.engines import Schema

        self.schema = Schema(dense=vectors.shape[1], fingerprint="old")

    def search_dense(self, vector: np.ndarray, k: int, filter: Any, exact: bool) -> list[tuple[str, float]]:
        scores = self.held @ vector
        return [(f"p{row}", float(scores[row])) for row in np.argsort(-scores)[:k]]

    def score_dense(self, vector: np.ndarray, ids: list[str]) -> np.ndarray:
        known = {f"p{row}" for row in range(len(self.held))}
        return np.array([0.0 if id in known else np.nan for id in ids])

    def vectors(self, ids: list[str]) -> Embeddings:
        return Embeddings(dense=self.held[[int(id[1:]) for id in ids]].copy())

    def count(self) -> int:
        return len(self.held)


@pytest.fixture
def spaces() -> tuple[np.ndarray, np.ndarray]:
    """Old vectors, and new ones that are the old ones turned, with some noise."""
    draws = np.random.default_rng(0)
    old = draws.normal(size=(400, 12))
    turn = np.linalg.qr(draws.normal(size=(12, 12)))[0]
    new = old @ turn.T + 0.05 * draws.normal(size=old.shape)
    old, new = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (old, new))
    return old.astype(np.float32), new.astype(np.float32)


def bridged(tmp_path: Path, old: np.ndarray, item: LinearMap) -> tuple[BridgedVectors, Kept, dict[str, Passage]]:
    passages = {f"p{row}": Passage(f"p{row}", f"text {row}") for row in range(len(old))}
    kept = Kept(tmp_path / "kept.sqlite")
    store: Any = SimpleNamespace(get=lambda ids: {id: passages[id] for id in ids if id in passages})
    held: Any = SimpleNamespace(backend=OldVectors(old), leave=lambda: None)
    return BridgedVectors(held, item, kept, store, "new"), kept, passages


def test_candidates_come_by_the_transposed_map_and_are_scored_in_the_new_space(tmp_path, spaces) -> None:
    old, new = spaces
    view, kept, _ = bridged(tmp_path, old, fit_ridge(old[:200], new[:200]).map)
    found = [view.search_dense(vector, 1)[0][0] for vector in new[300:]]
    assert np.mean([id == f"p{row}" for row, id in enumerate(found, 300)]) > 0.95
    unmapped, other, _ = bridged(tmp_path / "..", old, LinearMap.identity(12))
    assert np.mean([unmapped.search_dense(v, 1)[0][0] == f"p{r}" for r, v in enumerate(new[300:], 300)]) < 0.3
    kept.close()
    other.close()


def test_kept_vectors_count_before_mapped_ones_and_belong_to_one_text(tmp_path, spaces) -> None:
    old, new = spaces
    view, kept, passages = bridged(tmp_path, old, LinearMap.identity(12))
    missed: list[str] = []
    view.missed = missed.extend
    kept.add([passages["p7"]], new[7:8])
    assert view.score_dense(new[7], ["p7", "p8", "nowhere"])[0] == pytest.approx(1.0, abs=1e-5)
    assert missed == ["p8"]
    assert np.isnan(view.score_dense(new[7], ["nowhere"])[0])
    passages["p7"] = Passage("p7", "another text")
    np.testing.assert_allclose(view.vectors(["p7"]).dense, old[7:8], atol=1e-6)
    kept.close()


def test_a_kept_vector_makes_a_passage_a_candidate(tmp_path, spaces, monkeypatch) -> None:
    old, new = spaces
    monkeypatch.setattr(serving, "CANDIDATES", 3)
    monkeypatch.setattr(kept_vectors, "EVERY", 0.0)
    view, kept, passages = bridged(tmp_path, old, LinearMap.identity(12))
    far = int(np.argmin(old @ new[0]))
    assert f"p{far}" not in [id for id, _ in view.search_dense(new[0], 3)]
    kept.add([passages[f"p{far}"]], new[:1])
    assert view.search_dense(new[0], 3)[0] == (f"p{far}", pytest.approx(1.0, abs=1e-5))
    passages[f"p{far}"] = Passage(f"p{far}", "another text")
    assert f"p{far}" not in [id for id, _ in view.search_dense(new[0], 3)]
    kept.close()


@pytest.fixture
def dense(tmp_path: Path, tiny) -> Iterator[LiveIndex]:
    index = LiveIndex.create(tmp_path / "kb", tiny, backend="numpy", heads=["dense"])
    index.add(corpus(PASSAGES))
    yield index
    index.close()


@pytest.fixture
def terms() -> BridgeTerms:
    asked = range(0, PASSAGES, 3)
    qrels = {f"q{n}": {f"p{n}": 1} for n in asked}
    return BridgeTerms({f"q{n}": text_of(n) for n in asked}, qrels, search={"heads": ["dense"]})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bridge serves whatever was measured."""
    monkeypatch.setattr(crossing, "_chosen", lambda found: "mapped")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small sample, and no further passages are encoded to judge."""
    monkeypatch.setattr(crossing, "_measure_encoded", lambda core, own, terms: crossing._measure(core, own, terms))
    monkeypatch.setattr(crossing, "SAMPLE", 20)
    monkeypatch.setattr(crossing, "FEWEST", 10)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The build ends as by Ctrl-C, before a passage is encoded."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "run_builder", stop)


def begin(live: LiveIndex, checkpoint: Path, terms: BridgeTerms) -> None:
    with pytest.raises(KeyboardInterrupt):
        live.build(checkpoint, heads=["dense"], bridge=terms)


def test_it_serves_before_the_build_and_after_a_restart(dense, checkpoint, other, terms, taken, stopped) -> None:
    begin(dense, checkpoint, terms)
    assert dense.fingerprint == other.fingerprint
    state = dense.status()["bridge"]
    assert (state["generation"], state["mode"], state["over"]) == (2, "mapped", 1)
    assert set(state["measured"]) == {"raw", "mapped", "encoded"}
    own = {n: dense.search(text_of(n), k=1)[0].id for n in range(0, PASSAGES, 5)}
    assert sum(id == f"p{n}" for n, id in own.items()) >= 10
    dense.add([Passage("new", "a cat on the moon")])
    assert "new" in [hit.id for hit in dense.search("a cat on the moon", k=3)]
    dense.close()
    with LiveIndex.open(dense.path) as again:
        assert again.fingerprint == other.fingerprint
        assert {n: again.search(text_of(n), k=1)[0].id for n in own} == own


def test_rollback_ends_it(dense, checkpoint, tiny, terms, taken, stopped) -> None:
    before = dense.search(text_of(3), k=5)
    begin(dense, checkpoint, terms)
    flip = dense.rollback()
    assert (flip.old.id, flip.new.id) == (2, 1)
    assert dense.fingerprint == tiny.fingerprint
    assert dense.search(text_of(3), k=5) == before
    assert dense.status()["bridge"] is None
    assert not (dense.path / "bridge").exists()


def test_the_swap_ends_it(dense, checkpoint, other, terms, taken, quick_builds) -> None:
    ready = dense.build(checkpoint, heads=["dense"], bridge=terms)
    assert dense.status()["bridge"]["generation"] == ready.id
    decided = dense.status()["generations"][-1]["bridge"]
    shown = printing.built({**asdict(ready), "built": ready.how_built(), "bridge": decided})
    assert f"bridge to generation {ready.id}: it served from the old vectors, mapped, after" in shown
    assert "mapped nDCG@10" in shown
    dense.swap(ready)
    assert dense.status()["live"]["bridge"] == decided  # the record stays
    assert dense.status()["bridge"] is None
    assert dense.status()["live"]["id"] == ready.id
    assert dense.fingerprint == other.fingerprint
    assert not (dense.path / "bridge").exists()


def test_what_gains_nothing_does_not_serve_and_is_not_measured_again(
    dense, checkpoint, tiny, terms, stopped, monkeypatch
) -> None:
    begin(dense, checkpoint, terms)  # the other encoder is all but the same
    assert dense.fingerprint == tiny.fingerprint
    assert dense.status()["bridge"] is None
    report = bridge.read_report(dense._core.layout.directory(2))
    assert report is not None
    assert report["mode"] is None
    assert set(report["measured"]) == {"raw", "mapped", "encoded"}
    assert "the old encoder served on, as was decided after" in bridge.described(report)
    monkeypatch.setattr(start, "cross", lambda *_: pytest.fail("judged again"))
    begin(dense, checkpoint, terms)


def test_candidates_are_only_encoded_to_judge_where_nothing_gains_without(
    dense, checkpoint, terms, taken, stopped, monkeypatch
) -> None:
    monkeypatch.setattr(crossing, "_gains", lambda verdict: True)
    monkeypatch.setattr(crossing, "SAMPLE", 52)
    begin(dense, checkpoint, terms)
    state = dense.status()["bridge"]
    assert set(state["measured"]) == {"raw", "mapped"}
    assert state["encoded"] < state["passages"] == PASSAGES


def test_what_searches_meet_is_encoded_and_kept(dense, checkpoint, terms, taken, stopped, few) -> None:
    begin(dense, checkpoint, terms)
    first = dense.status()["bridge"]["encoded"]
    assert first < PASSAGES
    dense.search(text_of(1), k=3)
    deadline = time.monotonic() + 20
    while dense.status()["bridge"]["encoded"] < 50 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert dense.status()["bridge"]["encoded"] >= 50  # the candidates of one search


def test_the_builder_goes_by_predicted_residual_and_takes_what_is_kept(
    dense, checkpoint, other, terms, taken, few, quick_builds, monkeypatch
) -> None:
    begun: list[list[str]] = []
    fill = ahead.KeptAhead.fill

    def noted(self: Any, store: Any, encode: Any, progress: Any) -> int:
        assert self._kept is not None
        lines = (self._folder / ahead.ORDER).read_text(encoding="utf-8").splitlines()
        begun.append([json.loads(line) for line in lines])
        marked = store.get(["p5"])["p5"]
        self._kept.add([marked], np.eye(1, other.dim, dtype=np.float32))
        return fill(self, store, encode, progress)

    monkeypatch.setattr(ahead.KeptAhead, "fill", noted)
    ready = dense.build(checkpoint, heads=["dense"], bridge=terms)
    assert sorted(begun[0]) == sorted(f"p{n}" for n in range(PASSAGES))
    assert begun[0] != sorted(begun[0], key=lambda id: int(id[1:]))
    assert dense.status()["bridge"]["encoded"] == PASSAGES  # all of them are kept before they are put into the engine
    dense.swap(ready, force=True)
    np.testing.assert_allclose(dense._core.live.backend.vectors(["p5"]).dense, np.eye(1, other.dim), atol=1e-6)
    expected = other.encode([text_of(7)], "passage").dense
    np.testing.assert_allclose(dense._core.live.backend.vectors(["p7"]).dense, expected, atol=1e-5)


def test_a_bridge_that_ends_does_not_end_the_build(tmp_path) -> None:
    nothing = ahead.KeptAhead(None)
    assert nothing.fill(None, None, False) == 0  # type: ignore[arg-type]
    (tmp_path / ahead.ORDER).write_text('"p1"\n')
    gone = ahead.KeptAhead(tmp_path)
    gone._kept._db.execute("DROP TABLE kept")  # type: ignore[union-attr]
    store: Any = SimpleNamespace(get=lambda ids: {id: Passage(id, "x") for id in ids})
    assert gone.fill(store, None, False) == 0  # type: ignore[arg-type]
    texts = ["x"]
    assert gone.known([Passage("p1", "x")]).fill(texts, lambda asked: asked) == texts  # type: ignore[arg-type,return-value]


def test_passages_that_the_map_gets_wrong_come_first(spaces) -> None:
    old, new = spaces
    turned = old[:, 0] > 0.2  # of these the new vector is something else
    new = np.where(turned[:, None], -new, new)
    item = fit_ridge(old[:300], new[:300]).map
    found = ahead.Predicted.of(old[:300], new[:300], item).apply(old[300:])
    residual = np.square(item.apply(old[300:]) - new[300:]).sum(1)
    assert np.corrcoef(found, residual)[0, 1] > 0.5


def test_an_index_with_other_heads_is_refused(live, checkpoint, terms, stopped) -> None:
    live.add(corpus(PASSAGES))
    with pytest.raises(UsageError, match="a bridge is for dense vectors alone, and generation 1 has dense, sparse"):
        live.build(checkpoint, bridge=terms)


@pytest.mark.parametrize("given", [True, False, {"queries": {}}])
def test_a_build_says_what_a_bridge_is_judged_by(dense, checkpoint, given) -> None:
    with pytest.raises(UsageError, match=r"give BridgeTerms\(queries, qrels\)"):
        dense.build(checkpoint, bridge=given)
    assert "building" not in dense.status()["generations"]
