"""Encoding on a Ray cluster: read -> encode -> write, with a ledger of what was confirmed.

The passages of an index come in; vectors in a server come out. Only `pipeline` imports Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.encode.ray.driver import EncodeOnRay
    from ultrarag.encode.ray.pipeline import RayJob, RayPool
else:
    __getattr__, __dir__, __all__ = exports(__name__)
