"""What is left after kill -9, Ctrl-C, a full disk and a killed builder: every acknowledged write, and one live pair."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.retrieve.test_live import assert_complete, corpus, text_of
from ultrarag.errors import GateError, IndexStateError
from ultrarag.io import durable
from ultrarag.retrieve import read_status
from ultrarag.retrieve.build import child as builder
from ultrarag.retrieve.build.child import Build, EncodeHere
from ultrarag.retrieve.build.start import enter
from ultrarag.retrieve.engines.registry import open_backend
from ultrarag.retrieve.generation import source
from ultrarag.retrieve.generation.catalog import Generation, Progress
from ultrarag.retrieve.generation.replay import GenerationVectors
from ultrarag.retrieve.generation.source import Source, prepare
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.passages.files import records
from ultrarag.retrieve.passages.store import Store

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "live_faults.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize("backend", ["numpy", "qdrant-edge"])
def test_killed_again_and_again_nothing_is_lost(backend: str, tmp_path: Path) -> None:
    if backend == "qdrant-edge":
        pytest.importorskip("qdrant_edge")
    # a round with a build costs some 15 seconds: one, on the engine that writes in place
    command = ["--rounds", "4", "--builds", "1" if backend == "qdrant-edge" else "0", "--backend", backend]
    command += ["--folder", str(tmp_path), "--seed", str(os.getpid())]
    done = subprocess.run([sys.executable, str(SCRIPT), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost" in done.stdout


def entry(live: LiveIndex, other) -> Generation:
    """A generation that is to be built, prepared."""
    source = Source(other)
    generation = enter(live._core, source, None, other.heads)
    prepare(live._core.layout, generation, source)
    return generation


class Killed(BaseException):
    """Stands for the death of the process at this line."""


def test_a_build_goes_on_after_the_last_committed_chunk(live: LiveIndex, other, quick_builds, monkeypatch) -> None:
    live.add(corpus(50))
    generation = entry(live, other)
    directory = live._core.layout.building(generation.id)
    monkeypatch.setattr(builder, "COMMIT_SHARE", float("inf"))  # commit every chunk, however little it holds
    build = Build(live.path, generation, "cpu", EncodeHere(chunk=10))
    commit = build.draft.commit

    def dying(finished: bool = False) -> None:
        commit(finished)
        if build.draft.progress.encoded == 20:
            raise Killed

    monkeypatch.setattr(build.draft, "commit", dying)
    with pytest.raises(Killed):
        build.run(False)
    build.draft.backend._lock.release()  # as the end of the process does
    assert Progress.read(directory).encoded == 20
    described = live.status()["generations"][1]
    assert (described["progress"]["encoded"], described["progress"]["total"]) == (20, 50)
    live.add([*corpus(5, start=50), *corpus(1)])
    live.delete(["p3", "p45"])  # one that was encoded, one that was not
    encoded: list[str] = []
    resumed = Build.encode

    def counting(self, texts):
        encoded.extend(texts)
        return resumed(self, texts)

    monkeypatch.setattr(Build, "encode", counting)
    live.swap(live.build(other))
    assert len(encoded) == 29  # 50 - 20 committed - 1 deleted; the 5 new ones came after, in the swap
    assert_complete(live, 53)


@pytest.mark.parametrize("moment", ["finished", "renamed"])
def test_a_build_killed_at_its_end_is_recognised(
    live: LiveIndex, other, moment: str, quick_builds, monkeypatch
) -> None:
    live.add(corpus(5))
    generation = entry(live, other)
    with monkeypatch.context() as patch:
        if moment == "finished":
            patch.setattr(source, "sync_tree", raise_killed)
            with pytest.raises(Killed):
                Build(live.path, generation, "cpu").run(False)
        else:
            Build(live.path, generation, "cpu").run(False)
    assert live.generation(generation).state == "building"
    monkeypatch.setattr(Build, "encode", raise_killed)
    assert live.build(other).id == generation.id
    live.swap(generation.id)
    assert_complete(live, 5)


def raise_killed(*args: object) -> None:
    raise Killed


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_swap_cut_off_on_either_side_of_the_flip_leaves_one_live(
    live: LiveIndex, other, moment: str, quick_builds, monkeypatch
) -> None:
    live.add(corpus(5))
    new = live.build(other)
    live.add(corpus(7))
    catalog = live._core.catalog
    flip = catalog.flip

    def cut(*args: object) -> None:
        if moment == "after":
            flip(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "flip", cut)
    if moment == "before":
        with pytest.raises(KeyboardInterrupt):
            live.swap(new)
    else:
        live.swap(new)  # the pointer is exchanged already: it is carried through
    assert live.status()["live"]["id"] == live._core.live.generation.id == (1 if moment == "before" else 2)
    live.add(corpus(8))
    assert_complete(live, 8)
    live.close()
    with LiveIndex.open(live.path) as again:
        assert again.status()["live"]["id"] == (1 if moment == "before" else 2)
        assert_complete(again, 8)


#: An engine that cannot write cannot close either; its lock goes with the process.
ends_with_the_process = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


@ends_with_the_process
def test_a_disk_that_is_full_during_a_build_leaves_the_live_generation_alone(
    live: LiveIndex, other, quick_builds, monkeypatch, capsys
) -> None:
    live.add(corpus(8))
    generation = entry(live, other)
    live._core.flush()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "replacing", full)
        patch.setattr(builder, "_behave", lambda threads: None)
        assert builder.main([str(live.path), str(generation.id)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "ResourceError"
    assert "No space left" in told["message"]
    assert live.status()["live"]["id"] == 1
    assert_complete(live, 8)
    files_left = sorted(path.name for path in (live.path / "generations").iterdir())
    assert files_left == ["1", "2.tmp"]


@ends_with_the_process
def test_a_disk_that_is_full_during_a_swap_leaves_the_old_pair_live(
    live: LiveIndex, other, quick_builds, monkeypatch
) -> None:
    live.add(corpus(8))
    new = live.build(other)
    live.add(corpus(9))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "replacing", full)
        with pytest.raises(IndexStateError, match="No space left"):
            live.swap(new)
        assert len(live.search(text_of(3), heads=["dense"])) == 9
    assert live.status()["live"]["id"] == 1
    live.add(corpus(10))
    assert_complete(live, 10)
    live.swap(new)
    assert_complete(live, 10)


def test_ctrl_c_ends_a_build_that_can_be_taken_up(live: LiveIndex, other) -> None:
    live.add(corpus(4))
    pids: list[int] = []

    def interrupt() -> None:
        while live._core.builder is None:
            time.sleep(0.01)
        pids.append(live._core.builder.pid)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        live.build(other)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert live.generation(2).state == "building"
    assert len(live.search(text_of(3), heads=["dense"])) == 4
    live.close()
    assert read_status(live.path)["generations"][1]["state"] == "building"


@pytest.mark.skipif(sys.platform != "linux", reason="the builder follows its parent by a Linux system call")
def test_a_builder_ends_with_its_parent(live: LiveIndex, other, tmp_path: Path) -> None:
    live.add(corpus(4))
    other.save(tmp_path / "other")
    root = live.path
    live.close()
    code = (
        "import os, sys, threading, time\n"
        "from ultrarag.retrieve import LiveIndex\n"
        "live = LiveIndex.open(sys.argv[1])\n"
        "def priority():\n"
        "    return open(f'/proc/{live._core.builder.pid}/stat').read().split()[18]\n"
        "def die():\n"
        "    while live._core.builder is None: time.sleep(0.01)\n"
        "    while priority() == str(os.nice(0)): time.sleep(0.01)\n"
        "    print(live._core.builder.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "threading.Thread(target=die).start()\n"
        "live.build(sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root), str(tmp_path / "other")], stdout=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{pid}").exists()
    with LiveIndex.open(root) as again:
        assert again.generation(2).state == "building"
        assert_complete(again, 4)


def test_a_store_that_disagrees_with_the_vectors_is_brought_back_by_the_log(live: LiveIndex, tiny) -> None:
    """What a crash between the two commits leaves: the store is ahead."""
    live.add(corpus(6))
    live.close()
    store = Store.open(live.path)
    store.write(records([*corpus(2, start=6)]))
    store.delete(["p0"])
    store.close()
    assert read_status(live.path)["live"]["behind"] == 3
    with LiveIndex.open(live.path, tiny) as again:
        assert again.status()["live"]["behind"] == 0
        assert_complete(again, 7)


def test_an_unsound_previous_generation_does_not_come_back(live: LiveIndex, other, quick_builds) -> None:
    live.add(corpus(5))
    live.swap(live.build(other))
    vectors = live.path / "generations" / "1" / "vectors"
    backend = open_backend(vectors)
    backend.delete(["p2"])
    backend.close()
    with pytest.raises(GateError, match="p2"):
        live.rollback()
    assert live.status()["live"]["id"] == 2
    assert_complete(live, 5)


def test_a_repair_that_was_cut_off_is_noticed(live: LiveIndex, tiny, monkeypatch) -> None:
    live.add(corpus(6))
    live.close()
    shutil.rmtree(live.path / "generations" / "1" / "vectors")
    shutil.rmtree(live.path / "bm25")
    with monkeypatch.context() as patch:
        patch.setattr(GenerationVectors, "put", raise_killed)
        with pytest.raises(Killed):
            LiveIndex.open(live.path, tiny, repair=True)
    with pytest.raises(IndexStateError, match=r"vectors of 0 passages out of 6: .*repair=True"):
        LiveIndex.open(live.path, tiny)
    with LiveIndex.open(live.path, tiny, repair=True) as again:
        assert_complete(again, 6)
