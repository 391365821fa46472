"""The lexical weights of the engine `ivf`: postings, what has none yet, and the files of both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.engines import kill_while_writing
from tests.retrieve.engines.test_engines import SCHEMA, embed, langs, names
from tests.retrieve.engines.test_ivf import FullDisk
from ultrarag.errors import DataError, IndexStateError, ResourceError, UsageError
from ultrarag.retrieve.engines import Backend, Schema, create, open_backend
from ultrarag.retrieve.engines.ivf import engine, lexical, postings
from ultrarag.types import Embeddings, Sparse

pytest.importorskip("faiss")
pytest.importorskip("numba")
kernels = pytest.importorskip("ultrarag.retrieve.engines.ivf.kernels")

VOCABULARY, TOKENS = 300, 20
ONLY = Schema(sparse=True)


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "TAIL_ROWS", 100)
    monkeypatch.setattr(lexical, "FEW", 20)


def weights(count: int, seed: int, vocabulary: int = VOCABULARY) -> Embeddings:
    """Few are large, and some tokens are in most passages."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((count, VOCABULARY)) * np.linspace(0.2, 1, VOCABULARY), axis=1)
    ids = np.sort(order[:, :TOKENS], axis=1) * (vocabulary // VOCABULARY)
    return Embeddings(sparse=Sparse(ids, rng.random((count, TOKENS)).astype(np.float32) ** 3))


def query(seed: int, vocabulary: int = VOCABULARY, tokens: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.choice(VOCABULARY, tokens, replace=False) * (vocabulary // VOCABULARY)
    return ids, rng.random(tokens).astype(np.float32)


def filled(folder: Path, count: int, schema: Schema = ONLY) -> Backend:
    backend, batch = create(folder, schema, "ivf"), weights(count, 0)
    for start in range(0, count, 130):
        part = np.arange(start, min(start + 130, count))
        backend.upsert([f"p{row}" for row in part], batch[part], [{"n": int(row)} for row in part])
    return backend


def same(found: list, wanted: list) -> None:
    assert [id for id, _ in found] == [id for id, _ in wanted]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY * 100_000])
def test_any_order_of_writes_is_searched_as_the_reference_does(tmp_path: Path, vocabulary: int) -> None:
    rng = np.random.default_rng(1)
    engines = create(tmp_path / "ivf", ONLY, "ivf"), create(tmp_path / "numpy", ONLY, "numpy")
    for step in range(16):
        ids = [f"p{row}" for row in rng.integers(2000, size=150)]
        for one in engines:
            one.upsert(ids, weights(150, step, vocabulary), [{"n": number} for number in range(150)])
            if step % 3 == 2:
                one.delete(ids[:70])
            if step % 7 == 6:
                one.optimize()
        for number in range(4):
            asked = query(100 * step + number, vocabulary, (1, 8, 40, 290)[number])
            for k in (1, 7, 60):
                for filter in (None, {"n": {"lt": 60}}, {"n": 3}):
                    found, wanted = (one.search_sparse(*asked, k, filter) for one in engines)
                    same(found, wanted)
    held, wanted = (one.vectors(sorted(one.ids())) for one in engines)
    assert held.sparse.to_dicts() == wanted.sparse.to_dicts()
    assert engines[0]._heads is None
    assert len(engines[0]._table.postings) > 1
    for one in engines:
        one.close()


def test_equal_scores_come_in_the_order_of_ids_wherever_their_rows_lie(tmp_path: Path) -> None:
    backend = create(tmp_path / "index", ONLY, "ivf")
    ids = [f"p{(7 * row) % 330:03}" for row in range(330)]
    for start in range(0, 330, 110):
        one = Embeddings(sparse=Sparse(np.full((110, 2), [4, 17]), np.full((110, 2), [0.3, 1.7], np.float32)))
        backend.upsert(ids[start : start + 110], one, [{}] * 110)
    backend.upsert(["best"], Embeddings(sparse=Sparse(np.array([[17]]), np.array([[5.0]], np.float32))), [{}])
    wanted = ["best", *sorted(ids)]
    for k in (1, 2, 17, 200, 331, 400):
        assert [id for id, _ in backend.search_sparse([4, 17], [0.1, 1.0], k)] == wanted[:k]
    assert len(backend._table.postings) >= 1
    backend.close()


def test_scores_of_float32_at_its_limits_are_those_of_all_rows(tmp_path: Path) -> None:
    backend, large = filled(tmp_path / "index", 300), np.finfo(np.float32).max
    batch = Embeddings(sparse=Sparse(np.array([[1, 2], [1, 3]]), np.array([[large, 1], [1e-38, 1]], np.float32)))
    backend.upsert(["large", "small"], batch, [{}] * 2)
    backend.optimize()
    assert backend.search_sparse([1], [1.0], 1) == [("large", float(large))]
    assert dict(backend.search_sparse([1], [1.0], 400))["small"] == pytest.approx(1e-38, rel=1e-6)
    assert backend.search_sparse([1, 7], [1e-30, 1e-30], 1)[0] == ("large", pytest.approx(3.4028e8, rel=1e-4))
    backend.close()


def test_bounds_that_float32_cannot_hold_hide_no_hit(tmp_path: Path) -> None:
    """Of rows that are alike in bytes, those of one heavy token have bounds beyond float32, better ones have none."""
    large = float(np.finfo(np.float32).max)
    one, two = [0.9963 * large, 0.0], [0.4 * large, 0.598 * large]
    held = np.array([[large, 0], *[one] * 60, *[two] * 5, *[[0.1, 0.1]] * 60], np.float32)
    batch = Embeddings(sparse=Sparse(np.tile([4, 17], (len(held), 1)), held))
    engines = create(tmp_path / "ivf", ONLY, "ivf"), create(tmp_path / "numpy", ONLY, "numpy")
    for one_of_both in engines:
        one_of_both.upsert(names(len(held)), batch, [{}] * len(held))
    assert engines[0]._table.postings
    found, wanted = (one_of_both.search_sparse([4, 17], [1.0, 1.0], 6) for one_of_both in engines)
    same(found, wanted)
    assert {id for id, _ in found} == {"p0", *(f"p{row}" for row in range(61, 66))}
    for one_of_both in engines:
        one_of_both.close()


def test_of_scores_that_are_alike_in_bytes_the_best_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    held = (0.9 + 0.1 * rng.random((600, 8))).astype(np.float32)
    backend = create(tmp_path / "index", ONLY, "ivf")
    backend.upsert(names(600), Embeddings(sparse=Sparse(np.tile(np.arange(8), (600, 1)), held)), [{}] * 600)
    for _ in range(50):
        asked = rng.random(8).astype(np.float32)
        scores = held.astype(np.float64) @ asked
        for k in (1, 3, 20):
            wanted = [f"p{row}" for row in np.argsort(-scores)[:k]]
            assert [id for id, _ in backend.search_sparse(range(8), asked, k)] == wanted
    assert backend._table.postings
    backend.close()


def test_a_byte_is_no_less_than_its_weight() -> None:
    rng = np.random.default_rng(5)
    tokens, held = rng.integers(0, 50, 10_000).astype(np.int32), rng.random(10_000).astype(np.float32) ** 6
    impacts, steps = kernels.quantised(tokens, held, 50)
    bounds = impacts * steps[tokens].astype(np.float64)
    assert (bounds >= held).all()
    assert (bounds <= held + 1.01 * steps[tokens]).all()


def test_token_ids_that_cannot_be_stored_are_refused_and_not_found(tmp_path: Path) -> None:
    backend = filled(tmp_path / "index", 130)
    wide = Embeddings(sparse=Sparse(np.array([[2**32 + 7]]), np.ones((1, 1), np.float32)))
    with pytest.raises(DataError, match="passage 'wide' has the token id 4294967303"):
        backend.upsert(["wide"], wide, [{}])
    assert backend.count() == 130
    assert backend.search_sparse([2**32 + 7], [1.0], 5) == []
    same(backend.search_sparse([7, 2**32 + 7], [1.0, 1.0], 5), backend.search_sparse([7], [1.0], 5))
    assert backend.score_sparse([2**32 + 7], [1.0], ["p0", "nobody"]).tolist() == pytest.approx(
        [0, np.nan], nan_ok=True
    )
    backend.close()


def test_searches_in_many_threads_do_not_meet(tmp_path: Path) -> None:
    backend = filled(tmp_path / "index", 1200)
    wanted, failures = [backend.search_sparse(*query(seed), 10) for seed in range(40)], []

    def search() -> None:
        for _ in range(5):
            for seed in range(40):
                if backend.search_sparse(*query(seed), 10) != wanted[seed]:
                    failures.append(seed)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    backend.close()


def test_what_was_flushed_is_read_again_also_by_many_readers(tmp_path: Path) -> None:
    backend = filled(tmp_path / "index", 1000)
    wanted = [backend.search_sparse(*query(seed), 10) for seed in range(20)]
    assert sum(part.count for part in backend._table.postings) > 900
    backend.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    readers = [open_backend(tmp_path / "index", read_only=True) for _ in range(2)]
    for reader in readers:
        assert [reader.search_sparse(*query(seed), 10) for seed in range(20)] == wanted
        reader.close()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == before
    again = open_backend(tmp_path / "index")
    again.optimize()
    assert [(part.first, part.last) for part in again._table.postings] == [(0, 1000)]
    assert [again.search_sparse(*query(seed), 10) for seed in range(20)] == wanted
    again.close()
    assert len(list((tmp_path / "index").glob("postings-*"))) == 1


def test_a_part_has_so_many_rows_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "MOST_ROWS", 400)
    backend = filled(tmp_path / "index", 1300)
    wanted = backend.search_sparse(*query(3), 50)
    backend.optimize()
    assert [part.count for part in backend._table.postings] == [400, 400, 400, 100]
    same(backend.search_sparse(*query(3), 50), wanted)
    backend.close()


@pytest.mark.parametrize("kind", ["postings", "weights", "weightends"])
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    filled(tmp_path / "index", 300).close()
    (path,) = (tmp_path / "index").glob(f"{kind}-*")
    content = path.read_bytes()
    for damaged in (content[:-9], content[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(IndexStateError, match=path.name):
            open_backend(tmp_path / "index")
        with pytest.raises(IndexStateError, match=path.name):
            open_backend(tmp_path / "index", verify=False)
    path.write_bytes(content)
    open_backend(tmp_path / "index").close()


def test_what_was_not_flushed_is_cut_off(tmp_path: Path) -> None:
    filled(tmp_path / "index", 300).close()
    for name in ("weights-1", "weightends-1"):
        with open(tmp_path / "index" / name, "ab") as file:
            file.write(b"half a passage")
    (tmp_path / "index" / "postings-1-0-9999").write_bytes(b"half a part")
    (tmp_path / "index" / "checksums.json").unlink()
    again = open_backend(tmp_path / "index")
    assert not (tmp_path / "index" / "postings-1-0-9999").exists()
    again.upsert(["new"], Embeddings(sparse=Sparse(np.array([[5]]), np.array([[9.0]], np.float32))), [{}])
    assert again.search_sparse([5], [1.0], 1) == [("new", 9.0)]
    again.close()


def test_an_index_of_before_goes_on_in_its_other_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(lexical, "is_here", lambda: False)
        backend = create(tmp_path / "index", SCHEMA, "ivf")
        backend.upsert(names(60), embed(60), langs(60))
        backend.close()
    assert "pairs" not in json.loads((tmp_path / "index" / "manifest.json").read_text())
    reference = create(tmp_path / "numpy", SCHEMA, "numpy")
    reference.upsert(names(60), embed(60), langs(60))
    again = open_backend(tmp_path / "index")
    assert "sparse" in again._heads.schema.heads
    for one in (again, reference):
        one.upsert(["p3"], embed(1, seed=8), [{}])
        one.delete(["p5"])
        one.optimize()
    same(again.search_sparse([3, 9, 30], [1.0, 0.5, 2.0], 60), reference.search_sparse([3, 9, 30], [1.0, 0.5, 2.0], 60))
    assert again.vectors(["p3"]).sparse.to_dicts() == reference.vectors(["p3"]).sparse.to_dicts()
    again.close()
    reference.close()


def test_the_compiler_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "index", 10).close()
    monkeypatch.setattr(lexical, "is_here", lambda: False)
    with pytest.raises(UsageError, match="pip install numba=="):
        open_backend(tmp_path / "index")
    monkeypatch.undo()
    open_backend(tmp_path / "index").close()


@pytest.mark.parametrize("call", range(7))
def test_an_upsert_on_a_full_disk_leaves_no_weights_of_another(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls 0 to 4 are the files of rows that are written, 5 a file of postings, 6 none."""
    backend, other = filled(tmp_path / "index", 95), weights(40, 9)
    disk = FullDisk(monkeypatch)
    before = [backend.search_sparse(*query(seed), 95) for seed in range(5)]
    disk.left = call
    if call < 6:
        with pytest.raises(ResourceError, match="make room"):
            backend.upsert(names(40), other, [{}] * 40)
    disk.left = -1
    if call < 5:
        assert [backend.search_sparse(*query(seed), 95) for seed in range(5)] == before
    backend.upsert(names(40), other, [{}] * 40)
    backend.close()
    backend = open_backend(tmp_path / "index")
    assert backend.vectors(names(40)).sparse.to_dicts() == other.sparse.to_dicts()
    assert backend.count() == 95
    backend.close()


def test_where_there_is_no_room_for_the_compilers_cache_loops_are_compiled_all_the_same(tmp_path: Path) -> None:
    """As in a container whose files and home are read-only: numba finds no folder for its cache."""
    package = tmp_path / "kernels.py"
    shutil.copy(Path(postings.__file__).with_name("kernels.py"), package)
    script = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import sys, numpy as np\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kernels\n"
        "heap = np.array([1, 2, 3], np.float32)\n"
        "kernels.replace_least(heap, np.float32(9))\n"
        "assert heap[0] == 2, heap\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.long)])
def test_a_killed_writer_loses_nothing_that_was_acknowledged(rounds: int, tmp_path: Path) -> None:
    kill_while_writing.loses_nothing("tests.retrieve.engines.kill_while_writing_weights", tmp_path / "index", rounds)


def test_a_table_is_written_anew_while_lexical_searches_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEAD_ROWS", 300)
    backend = filled(tmp_path / "index", 800)
    asked, failures, stop = query(1), [], threading.Event()
    wanted = backend.search_sparse(*asked, 3)

    def search() -> None:
        while not stop.is_set():
            if backend.search_sparse(*asked, 3) != wanted:
                failures.append(1)

    thread = threading.Thread(target=search)
    thread.start()
    others = [f"p{row}" for row in range(800) if f"p{row}" not in dict(wanted)]
    for seed in range(6):
        batch = weights(len(others), seed)
        batch.sparse.weights *= 0.01
        backend.upsert(others, batch, [{}] * len(others))
    stop.set()
    thread.join()
    assert not failures
    assert backend._table.number > 1
    assert backend.count() == 800
    backend.close()
