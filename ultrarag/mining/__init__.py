"""Hard negatives: candidates found by any head or BM25, chosen, vetoed, and accounted for.

Rows and a pool of texts come in; rows with negatives and a report go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.mining.choice import MiningSettings
    from ultrarag.mining.miner import checked_weights, mine, mine_files
    from ultrarag.mining.pool import MiningSources, pool_file, prepare, read_pool
    from ultrarag.mining.search import BM25_HEAD, Asked, MiningSearch, candidate_heads
else:
    __getattr__, __dir__, __all__ = exports(__name__)
