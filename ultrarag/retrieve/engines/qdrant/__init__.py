"""Qdrant: embedded in this process, or as a server.

Embeddings come in as points; ids with scores go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.engines.qdrant.client import QdrantConnection
    from ultrarag.retrieve.engines.qdrant.payload import covering, key, prefixes
else:
    __getattr__, __dir__, __all__ = exports(__name__)
