"""The builder process and its parent: never two builders in one directory, whatever was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.retrieve.test_live import assert_complete, corpus
from ultrarag.errors import IndexStateError
from ultrarag.retrieve.build import child, start
from ultrarag.retrieve.build.child import Build
from ultrarag.retrieve.generation import Source, prepare
from ultrarag.retrieve.live import LiveIndex

#: A parent that is killed at a moment of its builder's life; the builder is stopped, so that it has not ended yet.
PARENT = """
import os, signal, sys, time
from pathlib import Path
from ultrarag.retrieve.build.start import run_builder
from ultrarag.retrieve.generation import Catalog
from ultrarag.retrieve.passages import Store

def started(child):
    if sys.argv[2] == "build":
        while open(f"/proc/{child.pid}/stat").read().split()[18] == str(os.nice(0)):
            time.sleep(0.01)
    else:
        os.kill(child.pid, signal.SIGSTOP)
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

store = Store.open(Path(sys.argv[1]), read_only=True)
run_builder(Path(sys.argv[1]), Catalog(store).in_state("building")[0], device="cpu", started=started)
"""


def orphaned(root: Path, moment: str) -> int:
    """The number of a builder whose parent was killed."""
    command = [sys.executable, "-c", PARENT, str(root), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        number = int(parent.stdout.readline())
        parent.stdout.close()
    assert parent.returncode == -signal.SIGKILL
    return number


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("moment", ["imports", "build"])
def test_an_orphan_is_named_and_waited_for(
    live: LiveIndex, other, checkpoint: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.add(corpus(4))
    source = Source(other)
    generation = start.enter(live._core, source, None, other.heads)
    prepare(live._core.layout, generation, source)
    orphan = orphaned(live.path, moment)
    if moment == "imports":  # a stopped process does not ask for its parent, and goes on when it likes
        with monkeypatch.context() as patch:
            patch.setattr(start, "PATIENCE", 0.1)
            with pytest.raises(IndexStateError, match=rf"in use by process {orphan} on .* parent was killed"):
                live.build(checkpoint)
        threading.Timer(0.5, os.kill, (orphan, signal.SIGCONT)).start()
    beside: list[bool] = []

    def begin(*_: object, **__: object) -> subprocess.Popen[str]:
        """The builder's work in this process, without the seconds that another one takes to import torch."""
        beside.append(runs(orphan))
        Build(live.path, generation, "cpu").run(False)
        return subprocess.Popen([sys.executable, "-S", "-c", ""], stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(start, "start_child", begin)
    live.swap(live.build(checkpoint))
    assert beside == [False]
    assert_complete(live, 4)


def test_a_build_ends_although_writes_come_as_fast_as_it_encodes(live: LiveIndex, other, monkeypatch) -> None:
    live.add(corpus(4))
    monkeypatch.setattr(child, "LEFT_OVER", 2)
    source = Source(other)
    generation = start.enter(live._core, source, None, other.heads)
    prepare(live._core.layout, generation, source)
    build = Build(live.path, generation, "cpu")
    encode, rounds = build.encode, []

    def encoding(texts):
        assert len(rounds) < 10, "the build never ends"
        rounds.append(len(texts))
        live.add({"id": f"new-{len(rounds)}-{n}", "text": f"new {len(rounds)} {n}"} for n in range(4))
        return encode(texts)

    monkeypatch.setattr(build, "encode", encoding)
    build.run(False)
    assert len(rounds) > 1  # the corpus, and what was written meanwhile; not all that was written then
    live.swap(start.finish(live._core, generation))  # which refuses a generation that lacks a passage
    assert len(live) == 4 + 4 * len(rounds)
