"""Small encoders with every head, and live indexes over them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.retrieve import servers
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


#: The word that some checkpoints of `poisoned` cannot encode.
POISON = "violet"


@pytest.fixture(scope="session")
def poisoned(tiny_m3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints that give NaN for one word (`first`, `second`), and one that does not (`sound`)."""
    import torch

    from tests.retrieve.test_live import text_of
    from ultrarag import Encoder
    from ultrarag.checkpoint import publishing
    from ultrarag.encode.blocks import PROBES

    folder = tmp_path_factory.mktemp("poisoned")
    encoder = Encoder.load(tiny_m3, adapter="bgem3", device="cpu")
    weight = next(iter(encoder.model.parameters()))
    sound = ["well river copper lanterns", "a river of stone", "clouds and marble", *map(text_of, range(640))]
    common = set(encoder.tokenizer(" ".join([*PROBES, *publishing.PROBES, *sound]))["input_ids"])
    token = next(id for id in encoder.tokenizer(POISON)["input_ids"] if id not in common)
    encoder.save(folder / "sound")
    for name, shift in (("first", 0.01), ("second", 0.02)):
        with torch.no_grad():
            weight.add_(shift)
            kept = weight[token].clone()
            weight[token] = float("nan")
        encoder.save(folder / name)
        with torch.no_grad():
            weight[token] = kept
    return folder


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
