"""An encoder without weights, whose vectors show which model made them; for tests of the index around it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ultrarag.retrieve.generation.catalog import Generation, IndexLayout
from ultrarag.types import Embeddings

#: Models, and dimensions of each: a model fills its own ones, so vectors of two models have the inner product 0.
MODELS, WIDTH = 3, 4


class StandIn:
    """A model; the score of a query and a passage depends on the passage's text alone, and is 0 if they are mixed."""

    heads, precision = ("dense",), "fp32"
    device, settings = SimpleNamespace(type="cpu"), SimpleNamespace(normalize=True)

    def __init__(self, model: int) -> None:
        self.model, self.fingerprint = model, f"model-{model}"

    def encode(self, texts: list[str], kind: str = "passage", **options: Any) -> Embeddings:
        """Unit vectors, (texts, MODELS * WIDTH)."""
        vectors = np.zeros((len(texts), MODELS * WIDTH), np.float32)
        for row, text in enumerate(texts):
            own = np.ones(WIDTH) if kind == "query" else _direction(text)
            vectors[row, self.model * WIDTH : (self.model + 1) * WIDTH] = own / np.linalg.norm(own)
        return Embeddings(dense=vectors)


def score(text: str) -> float:
    """What a query and this passage must score, whichever model encoded both."""
    return float(_direction(text).sum() / np.linalg.norm(_direction(text)) / np.sqrt(WIDTH))


def _direction(text: str) -> np.ndarray:
    return 1.0 + np.frombuffer(hashlib.sha256(text.encode()).digest()[:WIDTH], np.uint8)


def prepare(layout: IndexLayout, generation: Generation, source: Any) -> None:
    """Stands for `ultrarag.retrieve.generation.source.prepare`: the directory, with the model's name."""
    copy = IndexLayout.checkpoint(layout.directory(generation.id))
    copy.mkdir(parents=True, exist_ok=True)
    (copy / "model").write_text(generation.fingerprint)


def load_encoder(directory: Path, generation: Generation, device: str | None = None) -> StandIn:
    """Stands for `ultrarag.retrieve.generation.source.load_encoder`."""
    name = (IndexLayout.checkpoint(directory) / "model").read_text()
    assert name == generation.fingerprint
    return StandIn(int(name.removeprefix("model-")))
