"""Builds: the corpus encoded into a new generation, by a child process, by the ranks of torchrun or on Ray.

An open index and a checkpoint come in; a generation that is ready to be swapped in goes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.build.start import build_generation, end_build
else:
    __getattr__, __dir__, __all__ = exports(__name__)
