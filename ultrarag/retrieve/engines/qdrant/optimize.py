"""`python -m ultrarag.retrieve.engines.qdrant.optimize SHARD`: build the graph of a shard that its owner has let go of.

A process of its own, because the engine's `optimize` holds the GIL for its whole length; at low priority, and
ended with its parent, so that it never keeps a directory from the next owner.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import qdrant_edge

from ultrarag.errors import IndexStateError
from ultrarag.io import NICENESS, start_child
from ultrarag.retrieve.engines.base import Progress


def optimize_in_child(shard: Path, descriptors: Sequence[int], progress: Progress | None) -> None:
    """Run this file in a child process that inherits the descriptors; IndexStateError when it fails."""
    started = time.monotonic()
    pipes: dict[str, Any] = {"pass_fds": descriptors, "stderr": subprocess.PIPE, "text": True}
    with start_child(__name__, str(shard), niceness=NICENESS, **pipes) as child:
        try:
            errors = _wait(child, lambda: progress and progress(time.monotonic() - started))
        except BaseException:  # such as Ctrl-C: the engine survives a kill, as its tests show
            child.kill()
            raise
    if child.returncode:
        raise IndexStateError(
            f"optimising '{shard.parent}' failed ({errors.strip()[-300:] or f'exit status {child.returncode}'}); "
            f"nothing is lost: the index answers without the graph"
        )


def _wait(child: subprocess.Popen[str], tick: Callable[[], object]) -> str:
    """Wait for a child, calling `tick` every second; return what it wrote to stderr."""
    while True:
        try:
            return child.communicate(timeout=1)[1]
        except subprocess.TimeoutExpired:
            tick()


def main(shard: str) -> None:
    """Optimise the shard in a directory, until there is nothing more to do."""
    edge = qdrant_edge.EdgeShard.load(shard)
    while edge.optimize():
        pass
    edge.flush()
    edge.close()


if __name__ == "__main__":
    main(sys.argv[1])
