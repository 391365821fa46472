"""Services over the small real model and over the tiny one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.running import Running
from ultrarag.retrieve import LiveIndex

PASSAGES = [
    {
        "id": "milvus",
        "text": "Milvus is a vector database.",
        "title": "Milvus",
        "metadata": {"lang": "en", "year": 2019},
    },
    {"id": "qdrant", "text": "Qdrant is a vector search engine written in Rust.", "metadata": {"lang": "en"}},
    {"id": "apfel", "text": "Ein Apfel ist rot.", "metadata": {"lang": "de"}},
    {"id": "ocean/deep #1", "text": "The ocean is deep and blue.", "metadata": {"lang": "en"}},
]


def created(folder: Path, encoder) -> LiveIndex:
    live = LiveIndex.create(folder, encoder, backend="numpy")
    live.add(PASSAGES)
    return live


@pytest.fixture
def index(tmp_path: Path, minilm_encoder) -> LiveIndex:
    """An open index over the real model, with words."""
    return created(tmp_path / "kb", minilm_encoder)


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, minilm_encoder) -> Iterator[Running]:
    running = Running(created(tmp_path_factory.mktemp("common") / "kb", minilm_encoder), model_names=("my-model",))
    yield running
    running.stop()


@pytest.fixture
def served(common: Running) -> Running:
    """A service over it, which the tests of a file share; each finds the same passages."""
    common.live.delete(passage.id for passage in list(common.live.passages()))
    common.live.add(PASSAGES)
    return common
