"""The engine `ivf` where it does what others do not: partitions, runs, tables written anew, kills while it writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.engines import kill_while_writing
from tests.retrieve.engines.test_engines import DIM, SCHEMA, embed, langs, names, small_partitions
from ultrarag.errors import IndexStateError, ResourceError, UsageError
from ultrarag.retrieve.engines import Schema, create, open_backend
from ultrarag.retrieve.engines.ivf import engine, lexical, lookup
from ultrarag.types import Embeddings

pytest.importorskip("faiss")


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    small_partitions(monkeypatch)


def filled(folder: Path, count: int) -> tuple[np.ndarray, object]:
    backend, vectors = create(folder, Schema(dense=DIM), "ivf"), embed(count).dense
    for start in range(0, count, 500):
        part = slice(start, start + 500)
        backend.upsert(names(count)[part], Embeddings(dense=vectors[part]), langs(count)[part])
    return vectors, backend


def best(vectors: np.ndarray, query: np.ndarray, k: int) -> list[str]:
    return [f"p{row}" for row in np.argsort(-(vectors @ query), kind="stable")[:k]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.long)])
def test_a_killed_writer_loses_nothing_that_was_acknowledged(rounds: int, tmp_path: Path) -> None:
    kill_while_writing.loses_nothing("tests.retrieve.engines.kill_while_writing", tmp_path / "index", rounds)


def test_codes_that_were_not_written_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, backend = filled(tmp_path / "index", 1000)
    backend.optimize()
    late = embed(50, seed=5).dense
    backend.upsert([f"late{row}" for row in range(50)], Embeddings(dense=late * 9), [{}] * 50)
    backend.close()
    again = open_backend(tmp_path / "index")
    assert again.search_dense(late[7], 1)[0][0] == max(
        (f"late{row}" for row in range(50)), key=lambda id: late[int(id[4:])] @ late[7]
    )
    again.close()
    for path in (tmp_path / "index").glob("lists-*"):
        path.write_bytes(b"no codes")
    with pytest.raises(IndexStateError, match="lists-"):
        open_backend(tmp_path / "index")


def test_codes_are_written_as_they_grow_so_that_a_kill_costs_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LEAST_SAVED", 400)
    monkeypatch.setattr(engine, "EXACT_ROWS", 500)
    vectors, backend = filled(tmp_path / "index", 1000)
    backend.flush()
    held = [path.name for path in (tmp_path / "index").glob("lists-*")]
    assert len(held) == 1
    backend.upsert(["one more"], Embeddings(dense=vectors[:1]), [{}])
    backend.flush()
    assert [path.name for path in (tmp_path / "index").glob("lists-*")] == held
    copy = shutil.copytree(tmp_path / "index", tmp_path / "killed", ignore=shutil.ignore_patterns("*.lock"))
    wanted = backend.search_dense(vectors[0], 5)
    backend.close()
    monkeypatch.setattr(engine, "_coded", lambda table: pytest.fail("all codes are made again"))
    again = open_backend(copy)
    assert again.search_dense(vectors[0], 5) == wanted
    again.close()


def test_long_runs_are_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "TAIL_ROWS", 100)
    monkeypatch.setattr(lookup, "MOST_ROWS", 400)
    vectors, backend = filled(tmp_path / "index", 2000)
    runs = [run.last - run.first for run in backend._table.lookup.runs]
    assert sum(runs) > 1900
    assert len(runs) >= 4
    assert max(runs) <= 500  # what one call wrote is one run
    assert backend._table.find(names(2000)) == list(range(2000))
    assert len(backend.search_dense(vectors[0], 2000, {"lang": "zh"})) == 200
    backend.close()


def test_codes_of_an_older_engine_are_made_anew(tmp_path: Path) -> None:
    vectors, backend = filled(tmp_path / "index", 400)
    backend.optimize()
    backend.close()
    (tmp_path / "index" / "lists-1-400").rename(tmp_path / "index" / "codes-1-400")
    state = json.loads((tmp_path / "index" / "manifest.json").read_text())
    state["codes"] = state.pop("lists")
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(state))
    (tmp_path / "index" / "checksums.json").unlink()
    for _ in range(2):
        again = open_backend(tmp_path / "index")
        assert again._codes is not None
        assert [id for id, _ in again.search_dense(vectors[7] * 9, 400)] == best(vectors, vectors[7], 400)
        again.optimize()
        again.close()
    assert not list((tmp_path / "index").glob("codes-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_vectors_that_were_read_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, backend = filled(tmp_path / "index", 2000)
    query = embed(1, seed=3).dense[0]
    hits = backend.search_dense(query, 200)
    assert held(tmp_path / "index" / "vectors-1") == 0
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.table.MAPPED_ROWS", 10_000)
    assert backend.search_dense(query, 200) == hits
    assert held(tmp_path / "index" / "vectors-1") > 0
    backend.close()


def held(path: Path) -> int:
    """KiB of a mapped file that count as this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        int(next(line for line in lines if line.startswith("Rss:")).split()[1]) for at in lines if str(path) in at
    )


def test_vectors_of_few_dimensions_have_more_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for dim in (1, 6, 40, 300):
        vectors = rng.normal(size=(500, dim)).astype(np.float32)
        backend = create(tmp_path / str(dim), Schema(dense=dim), "ivf")
        backend.upsert(names(500), Embeddings(dense=vectors), [{}] * 500)
        backend.optimize()
        found = [
            len(set(best(vectors, query, 10)) & {id for id, _ in backend.search_dense(query, 10)}) for query in vectors
        ]
        assert np.mean(found) > 9.5, dim
        backend.close()


def test_a_table_is_written_anew_while_searches_go_on(tmp_path: Path) -> None:
    vectors, backend = filled(tmp_path / "index", 1000)
    query, failures, stop = embed(1, seed=3).dense[0], [], threading.Event()
    wanted = best(vectors, query, 3)

    def search() -> None:
        while not stop.is_set():
            found = [id for id, _ in backend.search_dense(query, 3, exact=True)]
            if found != wanted:
                failures.append(found)

    thread = threading.Thread(target=search)
    thread.start()
    others = [id for id in names(1000) if id not in wanted]
    for seed in range(4):
        backend.upsert(others, Embeddings(dense=embed(len(others), seed).dense * 0.01), [{}] * len(others))
    stop.set()
    thread.join()
    assert not failures
    assert backend.count() == 1000
    assert len(list((tmp_path / "index").glob("vectors-*"))) == 1
    assert not (tmp_path / "index" / "vectors-1").exists()
    backend.close()


def test_what_was_not_flushed_is_cut_off(tmp_path: Path) -> None:
    _, backend = filled(tmp_path / "index", 400)
    backend.flush()
    backend.close()
    with open(tmp_path / "index" / "passages-1", "ab") as file:
        file.write(b"half a passage")
    (tmp_path / "index" / "checksums.json").unlink()
    again = open_backend(tmp_path / "index")
    again.upsert(["new"], Embeddings(dense=embed(1, seed=9).dense), [{}])
    assert set(again.ids()) == {*names(400), "new"}
    again.close()
    open_backend(tmp_path / "index").close()


def test_heads_of_another_engine_agree_after_a_crash(tmp_path: Path) -> None:
    backend, one = create(tmp_path / "index", SCHEMA, "ivf"), embed(1)
    backend.upsert(names(5), embed(5), langs(5))
    backend.flush()
    ahead = Embeddings(sparse=None if lexical.is_here() else one.sparse, colbert=one.colbert, mask=one.mask)
    backend._heads.upsert(["ahead"], ahead, [{}])
    backend._heads.delete(["p0"])
    backend.close()
    (tmp_path / "index" / "checksums.json").unlink()
    again = open_backend(tmp_path / "index")
    assert sorted(again.ids()) == names(5)[1:]
    assert {id for id, _ in again.search_sparse(range(50), np.ones(50), 10)} <= set(names(5)[1:])
    again.close()


#: Codes are made by two threads, and then in a fork.
FORKED = """
import os, sys, numpy as np, faiss
from ultrarag.retrieve.engines.ivf.codes import Codes
faiss.omp_set_num_threads(2)
vectors = np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32)
def found():
    codes = Codes.train(len(vectors), lambda rows: vectors[rows])
    codes.add(vectors)
    return 7 in codes.search(vectors[7], 10)
assert found()
child = os.fork()
if not child:
    os._exit(int(not found()))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_codes_are_made_in_a_fork(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", FORKED], start_new_session=True) as process:
        try:
            assert process.wait(300) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_the_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match="pip install faiss-cpu=="):
        create(tmp_path / "index", SCHEMA, "ivf")
    assert not (tmp_path / "index").exists()


class FullDisk:
    """Stands for `os.pwrite` and `os.replace`: there is no room at one of their calls, of which half is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, write, replace = -1, os.pwrite, os.replace

        def written(handle: int, content: memoryview, place: int) -> int:
            if self.is_full():
                write(handle, content[: len(content) // 2], place)
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, content, place)

        def replaced(source: str, target: str) -> None:
            if self.is_full():
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "pwrite", written)
        monkeypatch.setattr(os, "replace", replaced)

    def is_full(self) -> bool:
        self.left -= 1
        return self.left == -1


@pytest.mark.parametrize("call", [0, 1, 2, 3, 4])
def test_an_upsert_on_a_full_disk_leaves_no_passage_twice(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls 0 to 3 are the files of rows, 4 the run of keys that is due."""
    vectors, backend = filled(tmp_path / "index", 200)
    disk = FullDisk(monkeypatch)
    write = lambda: backend.upsert(names(100), Embeddings(dense=vectors[100:]), langs(100))  # noqa: E731
    disk.left = call
    with pytest.raises(ResourceError, match="make room"):
        write()
    for again in (lambda: None, write, backend.close, lambda: None):
        again()
        if again == backend.close:
            backend = open_backend(tmp_path / "index")
        assert sorted(backend.ids()) == sorted(names(200))
        assert len({id for id, _ in backend.search_dense(vectors[3], 300)}) == backend.count() == 200
        assert backend.search_dense(vectors[3], 1, {"lang": "none"}) == []
    assert np.allclose(backend.vectors(["p7"]).dense[0], vectors[107])
    backend.close()
