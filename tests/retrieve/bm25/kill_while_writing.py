"""`python kill_while_writing.py FOLDER STRIDE`: end the process at steps of writes, merges and flushes, and open again.

A step is the return of a function of ours, or of one that ours called; every STRIDE-th is tried, until a process gets
to its end. What was flushed must be there each time, and nothing else but what the next flush would have kept; no file
may be left that the index does not name. Prints how many steps there are. Forks, so it opens nothing itself.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from ultrarag.retrieve.bm25 import BM25, merging, store

store.BATCH_ROWS, store.FILE_ROWS, merging.FAN, merging.IDLE = 4, 8, 3, 1e9
#: What each flush ends: (ids and texts written, ids deleted).
STEPS = [
    ({f"p{row}": f"red number{row}" for row in range(6)}, []),
    ({f"p{row}": f"blue number{row}" for row in range(3, 12)}, ["p0"]),
    ({f"p{row}": f"green number{row}" for row in range(10, 14)}, ["p4", "p13"]),
    ({}, ["p1", "p2", "p5", "p6"]),
]


def states() -> list[dict[str, str]]:
    """The passages before the first flush and after each."""
    found: list[dict[str, str]] = [{}]
    for written, deleted in STEPS:
        after = {**found[-1], **written}
        found.append({id: text for id, text in after.items() if id not in deleted})
    return found


def work(folder: Path, done: Path) -> None:
    """All steps, each noted in `done` after its flush."""
    index = BM25.open(folder)
    for number, (written, deleted) in enumerate(STEPS, 1):
        index.upsert(list(written), list(written.values()), [{}] * len(written))
        index.delete(deleted)
        index.flush()
        done.write_text(str(number))
        if number % 2 == 0:
            index.vacuum()
    index.close()


def held(folder: Path) -> None:
    """Fails unless the index holds what was flushed, or what was about to be."""
    index = BM25.open(folder)
    flushed = int((folder.parent / "done").read_text())
    ids = sorted(index.ids())
    state = next((state for state in states()[flushed : flushed + 2] if sorted(state) == ids), None)
    assert state is not None, f"after flush {flushed}: {ids}"
    found = {id for word in ("red", "blue", "green") for id, _ in index.search(word, 100)}
    assert found == set(ids)
    for id, text in state.items():
        assert index.search(text, 1)[0][0] == id
        assert index.score(text.split()[0], [id])[0] > 0
    index.close()
    named = {part for part in os.listdir(folder) if part.startswith("segment-")}
    assert len(named) <= 3, named
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def kill_after(steps: int) -> None:
    """End this process after so many steps from now."""
    left = steps

    def profile(frame, event: str, argument: object) -> None:
        nonlocal left
        if event in ("return", "c_return") and f"{os.sep}bm25{os.sep}" in frame.f_code.co_filename:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def in_child(task) -> int:
    """Do something in a process of its own; return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        task()
        status = 0
    finally:
        sys.setprofile(None)
        os._exit(status)


def killed(folder: Path, steps: int) -> None:
    kill_after(steps)
    work(folder, folder.parent / "done")


def main(place: Path, stride: int) -> None:
    folder = place / "index"
    for steps in itertools.count(1, stride):
        assert in_child(lambda: BM25.create(folder).close()) == 0
        (place / "done").write_text("0")
        status = in_child(lambda: killed(folder, steps))  # noqa: B023
        if in_child(lambda: held(folder)):
            sys.exit(f"wrong after a kill at step {steps}")
        if status == 0:
            print(steps)
            return
        assert status == -signal.SIGKILL, status
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
