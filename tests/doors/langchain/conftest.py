"""The small real model in an index that every test finds empty, and a tiny one whose generations are swapped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import minilm, minilm_encoder, quick_builds, tiny_m3  # noqa: F401  fixtures
from tests.retrieve.conftest import checkpoint, other, tiny  # noqa: F401  fixtures
from ultrarag.doors.langchain import UltraRAGVectorStore
from ultrarag.retrieve import LiveIndex
from ultrarag.testing.tiny import tiny_cross_encoder


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory, minilm_encoder) -> Iterator[LiveIndex]:  # noqa: F811
    folder = tmp_path_factory.mktemp("index") / "kb"
    LiveIndex.create(folder, minilm_encoder, backend="numpy").close()
    with LiveIndex.open(folder, minilm_encoder, share=True) as index:
        yield index


@pytest.fixture
def live(kept: LiveIndex) -> Iterator[LiveIndex]:
    """An empty index of a real model, which other handles may share."""
    yield kept
    kept.clear()


@pytest.fixture
def store(live: LiveIndex) -> UltraRAGVectorStore:
    return UltraRAGVectorStore(live)


@pytest.fixture
def swapped(tmp_path: Path, tiny, quick_builds) -> Iterator[LiveIndex]:  # noqa: F811
    """An empty index of a tiny model with every head, whose generations can be built quickly."""
    LiveIndex.create(tmp_path / "tiny", tiny, backend="numpy").close()
    with LiveIndex.open(tmp_path / "tiny", share=True) as index:
        yield index


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cross-encoder, with random weights."""
    folder = tmp_path_factory.mktemp("reranker") / "model"
    tiny_cross_encoder(folder)
    return folder
