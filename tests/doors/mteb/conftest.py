"""Small models and a small collection, whose figures are the same in both libraries."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.conftest import minilm, tiny_m3  # noqa: F401
from ultrarag import Encoder
from ultrarag.evaluation import write_beir
from ultrarag.testing.tiny import tiny_cross_encoder
from ultrarag.types import Passage

WORDS = [
    "vector",
    "database",
    "search",
    "index",
    "passage",
    "query",
    "model",
    "train",
    "swap",
    "graph",
    "list",
    "opera",
    "begins",
    "night",
    "music",
    "city",
]


@pytest.fixture(scope="session")
def encoder(tiny_m3: str) -> Encoder:  # noqa: F811
    return Encoder.load(tiny_m3, "bgem3", device="cpu")


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("reranker")
    tiny_cross_encoder(folder)
    return Encoder.load(folder, device="cpu")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 passages, every third with a title, and 20 queries with two relevant passages each."""
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=8)) for _ in range(80)]
    corpus = {f"p{n}": Passage(f"p{n}", text, "The city" if n % 3 == 0 else "") for n, text in enumerate(texts)}
    queries = {f"q{n}": " ".join(drawn.sample(texts[n].split(), 4)) for n in range(20)}
    qrels = {f"q{n}": {f"p{n}": 2, f"p{n + 20}": 1, f"p{n + 40}": 0} for n in range(20)}
    place = tmp_path_factory.mktemp("beir") / "small"
    write_beir(place, list(corpus.values()), queries, {"test": qrels})
    return place
