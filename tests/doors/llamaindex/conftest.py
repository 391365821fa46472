"""A small index with one dense head, nodes of every kind, and how many texts were encoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

from tests.conftest import minilm, quick_builds, tiny_m3  # noqa: F401  fixtures
from tests.retrieve.conftest import checkpoint, other, tiny  # noqa: F401  fixtures
from ultrarag.doors.llamaindex import UltraRAGEmbedding, UltraRAGVectorStore
from ultrarag.encoder import SharedEncoder
from ultrarag.retrieve import LiveIndex
from ultrarag.testing.tiny import tiny_cross_encoder

#: text, metadata and document of each node
HELD: list[tuple[str, dict[str, Any], str]] = [
    ("Milvus is a vector database.", {"lang": "en", "year": 2024, "tags": ["db", "ann"], "title": "Vectors"}, "d1"),
    (
        "Faiss is a library for similarity search.",
        {"lang": "en", "year": 2019, "tags": ["ann"], "day": "2019-05-01"},
        "d1",
    ),
    ("The opera begins at eight.", {"lang": "en", "year": 2019.5, "draft": True, "tags": []}, "d2"),
    ("Die Oper beginnt um acht.", {"lang": "de", "title": "Abend in der Oper", "day": "2024-05-01"}, "d3"),
]


def nodes(**fields: Any) -> list[TextNode]:
    """New nodes n1 .. n4."""
    return [
        TextNode(
            id_=f"n{number}",
            text=text,
            metadata=dict(metadata),
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)},
            **fields,
        )
        for number, (text, metadata, document) in enumerate(HELD, start=1)
    ]


@pytest.fixture
def live(tmp_path: Path, tiny: Any) -> Iterator[LiveIndex]:  # noqa: F811
    index = LiveIndex.create(tmp_path / "kb", tiny, heads=["dense"], backend="numpy")
    yield index
    index.close()


@pytest.fixture
def store(live: LiveIndex) -> UltraRAGVectorStore:
    """The four nodes, in a store."""
    store = UltraRAGVectorStore(live)
    store.add(nodes())
    return store


@pytest.fixture
def embed_model(live: LiveIndex) -> UltraRAGEmbedding:
    return UltraRAGEmbedding(live)


@pytest.fixture(scope="session")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from ultrarag import Encoder

    folder = tmp_path_factory.mktemp("reranker") / "model"
    tiny_cross_encoder(folder)
    return Encoder.load(folder, adapter="bge-reranker", device="cpu")


@pytest.fixture
def swapped(live: LiveIndex, checkpoint: Path, quick_builds: None) -> Any:  # noqa: F811
    """A function that puts another encoder into the index."""
    return lambda: live.swap(live.build(checkpoint))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an index's encoder is given to encode, text by text."""
    seen: list[str] = []
    encode = SharedEncoder.encode

    def counting(self: Any, texts: Any, *args: Any, **options: Any) -> Any:
        seen.extend(texts)
        return encode(self, texts, *args, **options)

    monkeypatch.setattr(SharedEncoder, "encode", counting)
    return seen
