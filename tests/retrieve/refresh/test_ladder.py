"""The ladder: how a rung is judged from stored vectors, and how far a refresh climbs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ultrarag.encode import CorpusVectors
from ultrarag.errors import TrainingError, UsageError
from ultrarag.maps import LinearMap
from ultrarag.retrieve.refresh.judging import Questions
from ultrarag.retrieve.refresh.ladder import EFFORTS, Comparison, Guard, Judge, Step, checked_effort, climb

DIM, PASSAGES = 8, 60


class FakeEncoder:
    """A query's vector is that of the passage it names, moved by so much noise."""

    def __init__(self, corpus: np.ndarray, noise: float, maps: Sequence[LinearMap] = ()) -> None:
        self.corpus, self.noise = corpus, noise
        self.passage_maps, self.passage_fingerprint = tuple(maps), "same"

    def encode(self, texts: Sequence[str], kind: str, **options: Any) -> Any:
        draws = np.random.default_rng(7).normal(size=(len(self.corpus), DIM))
        rows = [int(text.split()[-1]) for text in texts]
        found = self.corpus[rows] + (self.noise * draws[rows] if kind == "query" else 0)
        return SimpleNamespace(dense=(found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32))


@pytest.fixture
def corpus() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(PASSAGES, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


@pytest.fixture
def asked() -> Questions:
    names = range(PASSAGES)
    return Questions({f"q{n}": f"query {n}" for n in names}, {f"q{n}": {f"p{n}": 1} for n in names})


def judge_of(corpus: np.ndarray, asked: Questions, noise: float = 2.0) -> Judge:
    held = CorpusVectors("same", [f"p{n}" for n in range(PASSAGES)], np.zeros((PASSAGES, 2), np.int64), corpus)
    return Judge(asked, held, FakeEncoder(corpus, noise), "nDCG@10", False)  # type: ignore[arg-type]


class Work:
    """A refresh whose rungs give encoders of a known quality."""

    def __init__(self, corpus: np.ndarray, noise: dict[str, float]) -> None:
        self.corpus, self.noise = corpus, noise
        self.trained: list[tuple[str, int | None]] = []
        self.saved = 0

    def train(self, rung: str, folder: Path, steps: int | None) -> dict[str, Any]:
        self.trained.append((rung, steps))
        return {"fingerprint": rung, "steps": 1, "loss": None, "metrics": {}, "notes": []}

    def load(self, folder: Path) -> Any:
        maps = [LinearMap.identity(DIM, True)] if folder.name.startswith("passage-map") else []
        return FakeEncoder(self.corpus, self.noise[folder.name], maps)

    def texts(self, ids: Sequence[str]) -> dict[str, str]:
        return {id: f"passage {id.removeprefix('p')}" for id in ids}

    def save(self) -> None:
        self.saved += 1


def test_a_judge_finds_the_best_by_exact_scores(corpus, asked) -> None:
    judge = judge_of(corpus, asked)
    exact = judge.measure(FakeEncoder(corpus, 0.0))  # type: ignore[arg-type]
    assert exact.metrics["nDCG@10"] == 1.0
    best = {id: max(hits, key=lambda name: hits[name]) for id, hits in exact.run.items()}
    assert all(best[f"q{n}"] == f"p{n}" for n in range(PASSAGES))
    assert 0 < np.mean(list(judge.before.values())) < 0.9


def test_a_judge_maps_the_stored_vectors(corpus, asked) -> None:
    judge = judge_of(corpus, asked)
    turned = np.linalg.qr(np.random.default_rng(3).normal(size=(DIM, DIM)))[0].astype(np.float32)
    through = FakeEncoder(corpus @ turned.T, 0.0, [LinearMap(turned, np.zeros(DIM, np.float32))])
    assert judge.measure(through).metrics["nDCG@10"] == 1.0  # type: ignore[arg-type]
    through.passage_maps = ()
    assert judge.measure(through).metrics["nDCG@10"] < 0.9  # type: ignore[arg-type]


def test_a_pilot_encodes_what_the_old_vectors_propose(corpus, asked) -> None:
    judge = judge_of(corpus, asked)
    found, encoded = judge.promised(FakeEncoder(corpus, 0.1), Work(corpus, {}).texts)  # type: ignore[arg-type]
    assert 0 < encoded <= PASSAGES
    assert len(found.per_query) == PASSAGES
    assert found.metrics["nDCG@10"] > 0.9


def test_a_pilot_goes_without_passages_that_were_deleted_meanwhile(corpus, asked) -> None:
    work = Work(corpus, {})

    def left(ids: Any) -> dict[str, str]:
        return {id: work.texts([id])[id] for id in list(ids)[1:]}

    _, encoded = judge_of(corpus, asked).promised(FakeEncoder(corpus, 0.1), left)  # type: ignore[arg-type]
    assert 0 < encoded < PASSAGES


@pytest.mark.parametrize(
    ("noise", "taken", "trained"),
    [
        # the first rung gains, and the next promises no more
        ({"query-map": 0.3, "query-pilot": 0.3}, "query-map", ["query-map", "query"]),
        # nothing gains: the last is trained, and left to the gate
        ({"query-map": 2.0, "query": 2.0, "passage-map": 2.5}, "full", ["query-map", "query", "passage-map", "full"]),
        # the first gains, and the next promises more and keeps it
        (
            {"query-map": 1.2, "query-pilot": 0.2, "query": 0.2, "passage-map-pilot": 0.2},
            "query",
            ["query-map", "query", "query", "passage-map"],
        ),
        # the promise is not kept: back to what was good enough
        ({"query-map": 1.2, "query-pilot": 0.2, "query": 2.0}, "query-map", ["query-map", "query", "query"]),
    ],
)
def test_how_far_it_climbs(corpus, asked, tmp_path, noise, taken, trained) -> None:
    work, steps = Work(corpus, noise), []
    found = climb(work, steps, tmp_path, judge_of(corpus, asked), None)
    assert found.rung == taken
    assert [name for name, _ in work.trained] == trained
    assert [step.rung for step in steps if step.taken] == [taken]
    assert all(step.decision for step in steps)


def test_a_rung_that_forgets_the_guard_is_passed_over(corpus, asked, tmp_path) -> None:
    guard = Guard(judge_of(corpus, asked, noise=0.0), 0.005)
    steps: list[Step] = []
    noise = {"query-map": 0.5, "query": 0.0, "passage-map-pilot": 0.0}
    found = climb(Work(corpus, noise), steps, tmp_path, judge_of(corpus, asked), guard)
    assert found.rung == "query"
    assert not steps[0].guard_holds
    assert "the guard falls" in steps[0].decision


def test_a_rung_that_cannot_be_trained_is_passed_over(corpus, asked, tmp_path) -> None:
    class Refusing(Work):
        def train(self, rung: str, folder: Path, steps: int | None) -> dict[str, Any]:
            if rung != "query":
                raise TrainingError("the map gains nothing")
            return super().train(rung, folder, steps)

    steps: list[Step] = []
    found = climb(Refusing(corpus, {"query": 0.2}), steps, tmp_path, judge_of(corpus, asked), None)
    assert found.rung == "query"
    assert steps[0].decision == "passed over: it cannot be trained: the map gains nothing"
    assert "passage-map cannot be trained: the map gains nothing" in found.decision


def test_a_promised_rung_that_cannot_be_trained_gives_way_to_the_one_below(corpus, asked, tmp_path) -> None:
    class Refusing(Work):
        def train(self, rung: str, folder: Path, steps: int | None) -> dict[str, Any]:
            if rung == "query" and steps is None:
                raise TrainingError("too little memory")
            return super().train(rung, folder, steps)

    steps: list[Step] = []
    work = Refusing(corpus, {"query-map": 1.2, "query-pilot": 0.2})
    assert climb(work, steps, tmp_path, judge_of(corpus, asked), None).rung == "query-map"
    assert "taken all the same: query did not keep the promise" in steps[0].decision


def test_what_was_tried_before_a_crash_is_not_tried_again(corpus, asked, tmp_path) -> None:
    noise = {"query-map": 2.0, "query": 0.2, "passage-map-pilot": 0.2}
    first, steps = Work(corpus, noise), []
    climb(first, steps, tmp_path, judge_of(corpus, asked), None)
    kept = [Step.from_dict(step.to_dict()) for step in steps[:1]]
    again = Work(corpus, noise)
    found = climb(again, kept, tmp_path, judge_of(corpus, asked), None)
    assert found.rung == "query"
    assert [name for name, _ in again.trained] == ["query", "passage-map"]
    assert [step.to_dict() | {"seconds": 0} for step in kept] == [step.to_dict() | {"seconds": 0} for step in steps]


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown effort 'querry'; did you mean 'query'"):
        checked_effort("querry")


def test_a_comparison_is_of_the_queries_that_both_have() -> None:
    found = Comparison.of("m", {"a": 0.0, "b": 0.5}, {"b": 1.0})
    assert (found.old, found.new, found.change["queries"]) == (0.5, 1.0, 1)


def test_the_command_line_knows_the_same_efforts(capsys) -> None:
    from ultrarag.retrieve.command.parser import main

    with pytest.raises(SystemExit):
        main(["refresh", "--help"])
    assert f"--effort {{{','.join(EFFORTS)}}}" in " ".join(capsys.readouterr().out.split())
