"""Small encoders with every head, and live indexes over them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.retrieve import servers
from ultrarag.retrieve.build import start
from ultrarag.retrieve.build.child import Build
from ultrarag.retrieve.live import LiveIndex


@pytest.fixture(scope="session")
def tiny(tiny_m3: str):
    """The tiny m3 model, loaded once: dense, sparse and ColBERT."""
    from ultrarag import Encoder

    return Encoder.load(tiny_m3, adapter="bgem3", device="cpu")


@pytest.fixture(scope="session")
def other(tiny_m3: str):
    """The same with one weight changed: another identity, almost the same vectors."""
    import torch

    from ultrarag import Encoder

    encoder = Encoder.load(tiny_m3, adapter="bgem3", device="cpu")
    with torch.no_grad():
        next(iter(encoder.model.parameters())).add_(0.01)
    return encoder


@pytest.fixture(scope="session")
def checkpoint(other, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the other encoder."""
    return other.save(tmp_path_factory.mktemp("checkpoint") / "other")


@pytest.fixture
def live(tmp_path: Path, tiny):
    """An empty index with every head, on the numpy engine."""
    index = LiveIndex.create(tmp_path / "kb", tiny, backend="numpy")
    yield index
    index.close()


@pytest.fixture
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the builder's own code in this process, without the seconds that a new one takes to import torch."""

    def run(root, generation, *, device=None, **_: object) -> None:
        Build(root, generation, device).run(False)

    monkeypatch.setattr(start, "run_builder", run)


@pytest.fixture(scope="session")
def milvus_lite(tmp_path_factory: pytest.TempPathFactory):
    server = servers.MilvusLite(tmp_path_factory.mktemp("milvus") / "data")
    yield server
    server.kill()


@pytest.fixture
def rest():
    """Qdrant's REST interface in this process."""
    pytest.importorskip("qdrant_client")
    from tests.retrieve.qdrant_rest import Rest

    server = Rest()
    yield server
    server.close()


@pytest.fixture
def memory(tmp_path: Path):
    """A folder in memory where there is one: qdrant-client's local mode syncs the disk after every point."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
