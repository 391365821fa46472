"""BM25: inverted lists over a corpus that changes, exact after every write.

Texts come in; ids with scores go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.bm25.index import BM25
    from ultrarag.retrieve.bm25.terms import Postings
else:
    __getattr__, __dir__, __all__ = exports(__name__)
