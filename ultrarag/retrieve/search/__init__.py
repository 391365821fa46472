"""One search: which heads, which filter, fused how, and reranked by what.

A query's embeddings come in; hits go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.search.encoding import Encoding
    from ultrarag.retrieve.search.filters import (
        AllOf,
        AnyOf,
        Filter,
        HasFact,
        InRange,
        Node,
        Not,
        facts,
        mask,
        matches,
        needed_texts,
        parse,
    )
    from ultrarag.retrieve.search.fusion import rerank
    from ultrarag.retrieve.search.hits import Hits
    from ultrarag.retrieve.search.searcher import Searcher
else:
    __getattr__, __dir__, __all__ = exports(__name__)
