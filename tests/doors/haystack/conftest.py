"""A store over the tiny model, and nothing that calls home."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when haystack is imported

import pytest

from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from tests.conftest import minilm, tiny_m3  # noqa: F401  fixtures


@pytest.fixture(scope="session")
def empty_index(tiny_m3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """An index without documents, dense alone and words, to be copied: making one takes longer."""
    folder = tmp_path_factory.mktemp("empty") / "kb"
    store = UltraRAGDocumentStore(folder, model=tiny_m3, adapter="bgem3", heads=["dense"], backend="numpy")
    assert store.count_documents() == 0
    store.close()
    return folder
