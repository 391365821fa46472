"""The small real model, and stores over it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import minilm, minilm_encoder  # noqa: F401  fixtures
from ultrarag.doors.langchain import UltraragVectorStore
from ultrarag.retrieve import LiveIndex


@pytest.fixture
def live(tmp_path: Path, minilm_encoder) -> Iterator[LiveIndex]:  # noqa: F811
    """An empty index, which other handles may share."""
    LiveIndex.create(tmp_path / "kb", minilm_encoder).close()
    with LiveIndex.open(tmp_path / "kb", minilm_encoder, share=True) as index:
        yield index


@pytest.fixture
def store(live: LiveIndex) -> UltraragVectorStore:
    return UltraragVectorStore(live)
