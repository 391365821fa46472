"""IVF: dense vectors in little memory, as codes of two bits a dimension in partitions of the space.

`engine` is the engine; `table` keeps the rows durably, `lookup` finds those with an id or a fact, `codes` finds
candidates, which are scored anew by their vectors on the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.engines.ivf.engine import IVF
    from ultrarag.retrieve.engines.ivf.gate import Gate
    from ultrarag.retrieve.engines.ivf.table import Facts, Growing, Table
else:
    __getattr__, __dir__, __all__ = exports(__name__)
