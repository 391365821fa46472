"""UltraRAG's retrieval core: fine-tune embedding models on domain data, and swap them into a live index.

Importing this module imports neither torch nor transformers; names load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.errors import UltraragError
    from ultrarag.hookspecs import hookimpl
    from ultrarag.types import Embeddings, Hit, Passage, Sparse
else:
    __getattr__, __dir__, __all__ = exports(__name__)
