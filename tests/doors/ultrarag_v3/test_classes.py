"""UltraRAG's own Retriever and Reranker classes against the service: deployed search, and their openai backends."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.doors.ultrarag_v3 import world
from tests.service.running import Running

OWN = Path(__file__).parent / "own_classes.py"
QUERIES = ["when was the last time anyone was on the moon", "who was the ruler of england in 1616"]


@pytest.fixture(scope="module")
def results(
    ultrarag: world.Ultrarag, service: Running, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("own")
    given = {
        "checkout": str(ultrarag.folder),
        "url": service.url,
        "model": service.live.fingerprint,
        "corpus": str(world.write_corpus(folder / "corpus.jsonl")),
        "queries": QUERIES,
        "passages": [[row["contents"] for row in world.CORPUS]] * 2,
        "folder": str(folder),
    }
    words: dict[str, Any] = {"input": json.dumps(given), "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([str(world.PEER / "python"), str(OWN)], cwd=folder, **words)  # it writes logs where it is
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ")[-1])


def best(service: Running, k: int) -> list[list[str]]:
    return [[hit.passage.content for hit in hits] for hits in service.live.search_many(QUERIES, k, heads=["dense"])]


def test_a_deployed_search(results: dict[str, Any], service: Running) -> None:
    assert results["deployed"] == {"ret_psg": best(service, 3)}


def test_its_index_of_our_vectors(results: dict[str, Any], service: Running) -> None:
    """The same passages in the same order: what it asks for in base64 are the index's own vectors."""
    assert results["embedded"] == {"ret_psg": best(service, 3)}


def test_reranking(results: dict[str, Any], service: Running) -> None:
    assert results["reranked"] == {"rerank_psg": best(service, 2)}


@pytest.mark.parametrize("what", ["embedded", "reranked"])
def test_another_fingerprint_is_refused_in_words(results: dict[str, Any], service: Running, what: str) -> None:
    said = results[f"{what} by another"]
    assert "409" in said
    assert f"the request names the model 0123456789ab, and the live one is {service.live.fingerprint[:12]}" in said
