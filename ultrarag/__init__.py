"""UltraRAG's retrieval core: fine-tune embedding models on domain data, and swap them into a live index.

Importing this module imports neither torch nor transformers; names load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.errors import UltraragError
    from ultrarag.hookspecs import hookimpl
    from ultrarag.types import Embeddings, Hit, Passage, Sparse

__version__ = "0.1.0"

_HOMES = {
    "Encoder": "ultrarag.encoder",
    "Embeddings": "ultrarag.types",
    "Hit": "ultrarag.types",
    "Passage": "ultrarag.types",
    "Sparse": "ultrarag.types",
    "UltraragError": "ultrarag.errors",
    "hookimpl": "ultrarag.hookspecs",
}

__all__ = ["Embeddings", "Encoder", "Hit", "Passage", "Sparse", "UltraragError", "__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ultrarag' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
