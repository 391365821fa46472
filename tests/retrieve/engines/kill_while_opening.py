"""`python kill_while_opening.py FOLDER ENGINE STRIDE`: end the process at steps of opening an index, and open again.

A step is the return of a function of ours, or of one that ours called, such as the engine's `load`; every STRIDE-th is
tried. Prints how many there are. Forks, so it opens nothing in this process itself.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from ultrarag.retrieve.bm25 import BM25
from ultrarag.retrieve.engines import Schema, create, open_backend
from ultrarag.types import Embeddings

IDS = [f"p{row}" for row in range(3)]


def make(folder: Path, engine: str):
    if engine == "bm25":
        index = BM25.create(folder)
        index.upsert(IDS, ["red green"] * 3, [{}] * 3)
        return index
    backend = create(folder, Schema(dense=4), engine)
    backend.upsert(IDS, Embeddings(dense=np.eye(3, 4, dtype=np.float32)), [{}] * 3)
    return backend


def open_again(folder: Path, engine: str):
    return BM25.open(folder) if engine == "bm25" else open_backend(folder)


def kill_after(steps: int) -> None:
    """End this process after so many steps from now."""
    left = steps

    def profile(frame, event: str, argument: object) -> None:
        nonlocal left
        if event in ("return", "c_return") and counted(frame.f_code.co_filename):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def counted(file: str) -> bool:
    """Whether returns in a file are steps; in those that read checksums alone there are hundreds."""
    return f"{os.sep}retrieve{os.sep}" in file


def in_child(work) -> int:
    """Do something in a process of its own; return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def opened_and_killed(folder: Path, engine: str, steps: int) -> None:
    kill_after(steps)
    index = open_again(folder, engine)
    sys.setprofile(None)
    index.close()


def checked(folder: Path, engine: str) -> None:
    index = open_again(folder, engine)
    assert index.count() == 3
    assert sorted(index.ids()) == IDS
    index.close()


def main(folder: Path, engine: str, stride: int) -> None:
    made, copy = folder / "made", folder / "copy"
    assert in_child(lambda: make(made, engine).close()) == 0
    for steps in itertools.count(1, stride):
        shutil.copytree(made, copy)  # as it was closed after its first writes, which leave the engine a journal
        if in_child(lambda: opened_and_killed(copy, engine, steps)) == 0:  # noqa: B023
            print(steps)
            return
        if in_child(lambda: checked(copy, engine)):
            sys.exit(f"{engine}: does not open after a kill at step {steps}")
        shutil.rmtree(copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
