"""An encoder without weights, whose vectors show which model made them; for tests of the index around it."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ultrarag.checkpoint import MANIFEST, Identity, Manifest
from ultrarag.io import write_json
from ultrarag.maps import LinearMap
from ultrarag.retrieve.generation.catalog import Generation, IndexLayout
from ultrarag.types import Embeddings, EncoderSettings, Tokens, text_of

#: Models, and dimensions of each: a model fills its own ones, so vectors of two models have the inner product 0.
MODELS, WIDTH = 3, 4
#: Of each model: as it is; another query side; another query side and a map of its passages' vectors, which moves them
#: into dimensions that no model fills.
KINDS = 3
DIM = 2 * MODELS * WIDTH
MAP = LinearMap(np.roll(np.eye(DIM, dtype=np.float32), DIM // 2, axis=0), np.zeros(DIM, np.float32))


class StandIn:
    """A model; the score of a query and a passage depends on the passage's text alone, and is 0 if they are mixed.

    Numbers 0 to MODELS - 1 are models, the next as many their kinds with another query side, and the last with a map.
    """

    heads, precision = ("dense",), "fp32"
    device, settings = SimpleNamespace(type="cpu"), SimpleNamespace(normalize=True)
    adapter, trust_remote_code = SimpleNamespace(name="stand-in"), False

    def __init__(self, number: int) -> None:
        self.number = number
        self.kind, self.model = divmod(number, MODELS)
        self.passage_maps = (MAP,) if self.kind == 2 else ()
        #: texts of passages that were encoded
        self.encoded: list[str] = []

    @cached_property
    def _identity(self) -> Identity:
        own = f"model-{self.model}"
        if not self.kind:
            return Identity(own)
        return Identity.of_sides((f"query-{self.number}", []), (own, [item.digest for item in self.passage_maps]))

    def identity(self) -> Identity:
        """As `Encoder.identity`."""
        return self._identity

    @property
    def fingerprint(self) -> str:
        """Of both sides."""
        return self._identity.fingerprint

    @property
    def passage_fingerprint(self) -> str:
        """Of the side that made the vectors."""
        return self._identity.passage

    def check_kind(self, kind: str) -> None:
        """It reads every kind."""

    def checked_heads(self, heads: tuple[str, ...]) -> tuple[str, ...]:
        """As `Encoder.checked_heads`."""
        return heads

    def max_length(self, kind: str, asked: int | None = None) -> int | None:
        """It cuts nothing."""

    def tokenize(self, texts: list[Any], kind: Any, *_: Any) -> Tokens:
        """A token is a byte."""
        return Tokens([list(text_of(text).encode()) for text in texts], kind=kind)

    def gives_dense(self, *_: Any) -> bool:
        """Nothing is compiled."""
        return False

    def encode_tokens(self, tokens: Tokens, *_: Any) -> Embeddings:
        """As `encode`."""
        return self.encode([bytes(ids).decode() for ids in tokens.ids], tokens.kind or "passage")

    def encode(self, texts: list[str], kind: str = "passage", **options: Any) -> Embeddings:
        """Unit vectors, (texts, DIM)."""
        self.encoded += [] if kind == "query" else texts
        vectors = np.zeros((len(texts), DIM), np.float32)
        for row, text in enumerate(texts):
            own = np.ones(WIDTH) if kind == "query" else _direction(text)
            vectors[row, self.model * WIDTH : (self.model + 1) * WIDTH] = own / np.linalg.norm(own)
        return Embeddings(dense=MAP.apply(vectors) if self.passage_maps else vectors)


def score(text: str) -> float:
    """What a query and this passage must score, whichever model encoded both."""
    return float(_direction(text).sum() / np.linalg.norm(_direction(text)) / np.sqrt(WIDTH))


def _direction(text: str) -> np.ndarray:
    return 1.0 + np.frombuffer(hashlib.sha256(text.encode()).digest()[:WIDTH], np.uint8)


def prepare(layout: IndexLayout, generation: Generation, source: Any) -> None:
    """Stands for `ultrarag.retrieve.generation.source.prepare`: the directory, with the model's number."""
    copy = IndexLayout.checkpoint(layout.directory(generation.id))
    copy.mkdir(parents=True, exist_ok=True)
    (copy / "model").write_text(str(source._encoder.number))
    identity = source.identity
    manifest = Manifest("stand-in", EncoderSettings(heads=("dense",)), identity.fingerprint, sides=identity.sides)
    write_json(copy / MANIFEST, manifest.to_dict())


def load_encoder(directory: Path, generation: Generation, *_: Any) -> StandIn:
    """Stands for `ultrarag.retrieve.generation.source.load_encoder`."""
    found = StandIn(int((IndexLayout.checkpoint(directory) / "model").read_text()))
    assert found.fingerprint == generation.fingerprint
    return found


def read_passage_maps(folder: Path) -> tuple[LinearMap, ...]:
    """Stands for `ultrarag.encoder.read_passage_maps`."""
    return StandIn(int((folder / "model").read_text())).passage_maps
