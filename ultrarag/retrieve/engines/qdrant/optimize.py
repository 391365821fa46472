"""`python -m ultrarag.retrieve.engines.qdrant.optimize SHARD`: build the graph of a shard that its owner has let go of.

A process of its own, because the engine's `optimize` holds the GIL for its whole length; at low priority, and
ended with its parent, so that it never keeps a directory from the next owner.
"""

from __future__ import annotations

import os
import sys

import qdrant_edge

from ultrarag.io import end_with_parent


def main(shard: str) -> None:
    """Optimise the shard in a directory, until there is nothing more to do."""
    end_with_parent()
    if hasattr(os, "nice"):
        os.nice(10)
    edge = qdrant_edge.EdgeShard.load(shard)
    while edge.optimize():
        pass
    edge.flush()
    edge.close()


if __name__ == "__main__":
    main(sys.argv[1])
