"""`python -m ultrarag.retrieve.engines.qdrant.optimize SHARD`: build the graph of a shard that its owner has let go of.

A process of its own, because the engine's `optimize` holds the GIL for its whole length; at low priority, and
ended with its parent, so that it never keeps a directory from the next owner.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import qdrant_edge


def main(shard: str) -> None:
    """Optimise the shard in a directory, until there is nothing more to do."""
    _die_with_parent()
    if hasattr(os, "nice"):
        os.nice(10)
    edge = qdrant_edge.EdgeShard.load(shard)
    while edge.optimize():
        pass
    edge.flush()
    edge.close()


def _die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is killed; elsewhere it ends by itself."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
