"""IVF: dense vectors as codes of a bit a dimension in lists around directions, and lexical weights as postings.

`engine` is the engine; `table` keeps the rows durably, in the files of `folder`, `lookup` finds those with an id or a
fact, `codes` finds candidates, which `search` scores anew by their vectors on the disk. `lexical` searches the rows'
`weights` by their `postings`, with the loops of `kernels`; `heads` are another engine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.engines.ivf.engine import IVF
    from ultrarag.retrieve.engines.ivf.folder import named_errors
    from ultrarag.retrieve.engines.ivf.gate import Gate
    from ultrarag.retrieve.engines.ivf.growing import Growing
    from ultrarag.retrieve.engines.ivf.heads import agree
    from ultrarag.retrieve.engines.ivf.table import Facts, Table
else:
    __getattr__, __dir__, __all__ = exports(__name__)
