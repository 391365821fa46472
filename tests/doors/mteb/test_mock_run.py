"""mteb.mock_run, unmodified: all its mock tasks, for each protocol"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mteb
import pytest
from mteb.mocks.mock_run import get_compatible_mock_tasks

from ultrarag import Encoder
from ultrarag.doors.mteb import MtebEncoder, MtebReranker, MtebSearch

#: MTEB gives its models tasks with candidates and tasks without; the latter its own cross-encoders refuse too.
WITHOUT_CANDIDATES = "CrossEncoder search requires top_ranked documents for reranking."
MODELS: dict[str, tuple[Callable[[Encoder, Encoder], Any], int]] = {
    "encoder": (lambda encoder, _: MtebEncoder(encoder), 28),
    "encoder with task prompts": (lambda encoder, _: MtebEncoder(encoder, task_prompts=True), 28),
    "search, dense": (lambda encoder, _: MtebSearch(encoder, heads=["dense"]), 9),
    "search, hybrid": (lambda encoder, _: MtebSearch(encoder, weights={"dense": 1, "bm25": 0.5}), 9),
    "search, all heads": (lambda e, _: MtebSearch(e, heads=["dense", "sparse", "colbert", "bm25"], fusion="rrf"), 9),
    "search, reranked": (lambda encoder, reranker: MtebSearch(encoder, heads=["dense"], reranker=reranker), 9),
}
_runs: dict[str, Any] = {}


def run_of(name: str, encoder: Encoder, reranker: Encoder) -> Any:
    if name not in _runs:
        _runs[name] = mteb.mock_run(MODELS[name][0](encoder, reranker))
    return _runs[name]


def compatible(name: str) -> list[str]:
    """The names of the tasks that MTEB gives to such a model, as its own classes of models get them."""
    if name.startswith("encoder"):
        return sorted({task.metadata.name for task in mteb.mocks.ALL_MOCK_TASK_TEST_GRID if text(task)})
    return RETRIEVAL


def text(task: Any) -> bool:
    return set(task.metadata.modalities) == {"text"}


RETRIEVAL = sorted({t.metadata.name for t in mteb.mocks.ALL_MOCK_TASK_TEST_GRID if text(t) and t._support_search})


@pytest.mark.parametrize(("name", "task"), [(name, task) for name in MODELS for task in compatible(name)])
def test_mock_task(name: str, task: str, encoder: Encoder, reranker: Encoder) -> None:
    status = run_of(name, encoder, reranker)[task]
    assert type(status).__name__ == "TaskResult", status


@pytest.mark.parametrize("name", MODELS)
def test_these_are_all_that_mteb_finds_compatible(name: str, encoder: Encoder, reranker: Encoder) -> None:
    model, count = MODELS[name][0](encoder, reranker), MODELS[name][1]
    assert {task.metadata.name for task in get_compatible_mock_tasks(model)} == set(compatible(name))
    assert len(compatible(name)) == count
    assert run_of(name, encoder, reranker).all_passed


@pytest.fixture(scope="module")
def pairs_run(reranker: Encoder) -> Any:
    return mteb.mock_run(MtebReranker(reranker))


BARE = [name for name in RETRIEVAL if "Reranking" not in name]


@pytest.mark.parametrize("task", [name for name in RETRIEVAL if "Reranking" in name])
def test_cross_encoder_on_a_task_with_candidates(task: str, pairs_run: Any) -> None:
    assert type(pairs_run[task]).__name__ == "TaskResult", pairs_run[task]


@pytest.mark.parametrize("task", BARE)
def test_cross_encoder_on_a_retrieval_task_given_a_first_stage(
    task: str, pairs_run: Any, encoder: Encoder, reranker: Encoder, tmp_path: Any
) -> None:
    """MTEB's own way: the predictions of a search become the candidates. Without, no cross-encoder may try."""
    assert pairs_run[task].exception == WITHOUT_CANDIDATES
    given = mteb.mocks.ALL_MOCK_TASK_REGISTRY[task]
    first = given()
    mteb.evaluate(MtebSearch(encoder, heads=["dense"]), first, cache=None, prediction_folder=tmp_path)
    second = given().convert_to_reranking(tmp_path, top_k=2)
    (result,) = mteb.evaluate(MtebReranker(reranker), second, cache=None).task_results
    assert result.task_name == task


def test_mtebs_own_cross_encoders_fail_at_the_same_tasks(tmp_path: Any) -> None:
    from sentence_transformers import CrossEncoder

    from ultrarag.testing.tiny import tiny_cross_encoder

    tiny_cross_encoder(tmp_path)
    from mteb.models import CrossEncoderWrapper

    found = mteb.mock_run(CrossEncoderWrapper(CrossEncoder(str(tmp_path), device="cpu")))
    failed = {name for name, status in found.items() if type(status).__name__ == "TaskError"}
    assert failed == set(BARE)
