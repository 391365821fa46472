"""The room of builds: the corpus encoded into a new generation, in a process of its own, by torchrun or on Ray.

A generation in the catalog comes in; its vectors, ready to be swapped in, go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.build.child import Build, create_vectors, load_encoder, read_progress
else:
    __getattr__, __dir__, __all__ = exports(__name__)
