"""Stores over a tiny model and over the small real one, and nothing that calls home."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when haystack is imported

import pytest

from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from tests.conftest import minilm, quick_builds, tiny_m3  # noqa: F401  fixtures
from tests.retrieve.conftest import checkpoint, other, rest, tiny  # noqa: F401  fixtures
from ultrarag.testing.tiny import tiny_cross_encoder


@pytest.fixture(scope="session")
def empty_index(tiny_m3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """An index without documents, dense vectors alone and words, to be copied: making one takes longer."""
    folder = tmp_path_factory.mktemp("empty") / "kb"
    store = UltraRAGDocumentStore(folder, model=tiny_m3, adapter="bgem3", heads=["dense"], backend="numpy")
    assert store.count_documents() == 0
    store.close()
    return folder


@pytest.fixture
def place(empty_index: Path, tmp_path: Path) -> Path:
    """The folder of an empty index."""
    return shutil.copytree(empty_index, tmp_path / "kb")


@pytest.fixture
def store(place: Path) -> Iterator[UltraRAGDocumentStore]:
    opened = UltraRAGDocumentStore(place)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reranker, with random weights."""
    folder = tmp_path_factory.mktemp("reranker") / "model"
    tiny_cross_encoder(folder)
    return folder
