"""PLAID: token vectors in little memory, as codes of a few bits a dimension, with lists by centroid for candidates.

`engine` is the engine; `tokens` keeps the vectors of each row durably, `coder` makes codes of them, `lists` finds
candidates, which `search` scores by their codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.engines.plaid.engine import Plaid
else:
    __getattr__, __dir__, __all__ = exports(__name__)
