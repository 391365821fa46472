"""Services over the small real model and over the tiny one."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.service.running import Running
from ultrarag import Encoder
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


def created(folder: Path, encoder: Encoder) -> LiveIndex:
    """An open index with the passages: a copy, for to save the model and try it takes longer than most tests."""
    shutil.copytree(_made(encoder), folder, copy_function=_linked)
    return LiveIndex.open(folder, encoder)


@cache
def _made(encoder: Encoder) -> Path:
    place = Path(tempfile.mkdtemp(prefix="service-index"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    with LiveIndex.create(place / "kb", encoder, backend="numpy") as live:
        live.add(PASSAGES)
    return place / "kb"


def _linked(source: str, target: str) -> None:
    """Copy a file; of weights, which nobody changes, make another name where the file system can."""
    try:
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)
    except OSError:
        shutil.copy2(source, target)


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
