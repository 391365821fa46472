"""figures: those of our own evaluation, to 1e-5"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mteb
import pytest

from ultrarag import Encoder
from ultrarag.doors.mteb import MtebEncoder, MtebReranker, MtebSearch, beir_task
from ultrarag.evaluation import Collection, Evaluation, evaluate_run, read_beir
from ultrarag.retrieve import LiveIndex, rerank

#: ours -> theirs
METRICS = {"nDCG@10": "ndcg_at_10", "Recall@100": "recall_at_100", "MRR@10": "mrr_at_10", "MAP@100": "map_at_100"}
HYBRIDS: dict[str, dict[str, Any]] = {
    "dense": {"heads": ["dense"]},
    "bm25": {"heads": ["bm25"]},
    "sum": {"weights": {"dense": 1, "bm25": 0.5}, "candidates": 40},
    "raw sum": {"weights": {"dense": 1, "sparse": 0.3, "colbert": 0.7}, "normalize": "raw"},
    "rrf": {"heads": ["dense", "bm25"], "fusion": "rrf"},
}


@pytest.fixture(scope="module")
def collection(folder: Path) -> Collection:
    return read_beir(folder)


@pytest.fixture(scope="module")
def live(encoder: Encoder, collection: Collection, tmp_path_factory: Any) -> Iterator[LiveIndex]:
    with LiveIndex.create(tmp_path_factory.mktemp("kb") / "kb", encoder, backend="numpy") as index:
        index.add(collection.corpus.values())
        yield index


def theirs(model: Any, task: Any) -> dict[str, float]:
    (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    return result.scores["test"][0]


def same(ours: Evaluation, scores: dict[str, float]) -> None:
    for name, key in METRICS.items():
        assert scores[key] == pytest.approx(ours.metrics[name], abs=1e-5), name  # MTEB rounds to 5 digits


def test_an_encoder(live: LiveIndex, collection: Collection, encoder: Encoder, folder: Path) -> None:
    ours = live.evaluate(collection.queries, collection.qrels, [*METRICS], k=1000, heads=["dense"])
    assert 0 < ours.metrics["nDCG@10"] < 1
    same(ours, theirs(MtebEncoder(encoder), beir_task(folder)))


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("own", ["an index of ours", "one that is made"])
def test_a_search(name: str, own: str, live: LiveIndex, collection: Collection, encoder: Encoder, folder: Path) -> None:
    ours = live.evaluate(collection.queries, collection.qrels, [*METRICS], k=1000, **HYBRIDS[name])
    model = live if own == "an index of ours" else encoder
    same(ours, theirs(MtebSearch(model, backend="numpy", **HYBRIDS[name]), beir_task(folder)))


@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_search_that_is_reranked(
    weight: float | None, live: LiveIndex, collection: Collection, reranker: Encoder, folder: Path
) -> None:
    run = {}
    for id, text in collection.queries.items():
        hits = live.search(text, k=20, heads=["dense"])
        run[id] = {hit.id: hit.score for hit in rerank(reranker, text, hits, weight=weight)}
    model = MtebSearch(live, heads=["dense"], reranker=reranker, depth=20, rerank_weight=weight)
    same(evaluate_run(collection.qrels, run, [*METRICS]), theirs(model, beir_task(folder)))


def test_a_reranker_on_given_candidates(
    live: LiveIndex, collection: Collection, reranker: Encoder, folder: Path
) -> None:
    hits = {id: live.search(text, k=20, heads=["dense"]) for id, text in collection.queries.items()}
    run = {
        id: {hit.id: hit.score for hit in rerank(reranker, collection.queries[id], found)} for id, found in hits.items()
    }
    task = beir_task(folder, candidates={id: [hit.id for hit in found] for id, found in hits.items()})
    same(evaluate_run(collection.qrels, run, [*METRICS]), theirs(MtebReranker(reranker), task))


def test_candidates_of_a_task_are_scored_by_the_index(live: LiveIndex, collection: Collection, folder: Path) -> None:
    given = {id: [f"p{n}" for n in range(0, 80, 3)] for id in collection.queries}
    scored = {id: live.score(text, given[id], {"dense": 1, "bm25": 0.1}) for id, text in collection.queries.items()}
    run = {id: {hit.id: hit.score for hit in hits} for id, hits in scored.items()}
    model = MtebSearch(live, weights={"dense": 1, "bm25": 0.1}, normalize="raw")
    same(evaluate_run(collection.qrels, run, [*METRICS]), theirs(model, beir_task(folder, candidates=given)))
