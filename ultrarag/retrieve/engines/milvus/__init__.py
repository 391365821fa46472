"""Milvus: a collection in its server.

Embeddings come in as rows; ids with scores go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.engines.milvus.client import STRONG, MilvusConnection, quoted
else:
    __getattr__, __dir__, __all__ = exports(__name__)
