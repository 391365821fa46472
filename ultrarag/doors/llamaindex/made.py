"""Whose vector is it: LlamaIndex hands vectors on as plain lists of numbers, which do not say what made them.

What our embeddings make is remembered by its content, so that a store knows it again: which encoder, and of which text.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ultrarag.types import Kind

#: Vectors remembered of each kind, the last ones: 0.3 KB each of a passage, and its text of a query.
MOST = {"passage": 100_000, "query": 5_000}


@dataclass(frozen=True)
class Origin:
    """What a vector was made of."""

    fingerprint: str
    kind: Kind
    #: of the texts
    digest: bytes
    #: of a query: what was encoded; several where the vector is the mean of theirs
    texts: tuple[str, ...] = ()

    def is_of(self, text: str, kind: Kind) -> bool:
        """Whether it was made of this text alone, and as a text of this kind."""
        return self.kind == kind and self.digest == _digest((text,))


class Made:
    """The vectors that this process made lately; any thread may use it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held: dict[str, OrderedDict[bytes, Origin]] = {kind: OrderedDict() for kind in MOST}

    def remember(self, vector: Sequence[float], fingerprint: str, kind: Kind, texts: tuple[str, ...]) -> None:
        origin = Origin(fingerprint, kind, _digest(texts), texts if kind == "query" else ())
        with self._mutex:
            held = self._held[kind]
            held[_key(vector)] = origin
            if len(held) > MOST[kind]:
                held.popitem(last=False)

    def of(self, vector: Sequence[float], kind: Kind) -> Origin | None:
        """Where it came from, first looked up among those of this kind."""
        key, other = _key(vector), "query" if kind == "passage" else "passage"
        with self._mutex:
            return self._held[kind].get(key) or self._held[other].get(key)


#: One for the process: an embedding and a store of one index need not know of each other.
made = Made()


def _key(vector: Sequence[float]) -> bytes:
    return hashlib.blake2b(np.asarray(vector, dtype=np.float32).tobytes(), digest_size=16).digest()


def _digest(texts: tuple[str, ...]) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
