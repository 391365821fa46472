"""The compiler of the loops over lexical weights: its cache, damaged or full, and where it does not compile at all."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ultrarag.errors import UsageError
from ultrarag.retrieve.engines import Schema, create, open_backend
from ultrarag.types import Embeddings, Sparse

pytest.importorskip("faiss")
pytest.importorskip("numba")

ROOT = Path(__file__).parents[3]
#: Searches a heap's kernel alone, which is compiled in a moment; the argument is how large a file may be.
HEAP = """
import sys, numpy as np
from ultrarag.retrieve.engines.ivf import kernels
if len(sys.argv) > 1:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
heap = np.array([1, 2, 3], np.float32)
kernels.replace_least(heap, np.float32(9))
assert heap.tolist() == [2, 9, 3], heap
print("hits", sum(kernels.replace_least.stats.cache_hits.values()))
"""
SEARCHES = """
import sys
from pathlib import Path
import numpy as np
from ultrarag.retrieve.engines import Schema, create
from ultrarag.retrieve.engines.ivf import lexical
from ultrarag.types import Embeddings, Sparse

lexical.TAIL_ROWS, lexical.FEW, rng = 100, 5, np.random.default_rng(0)
tokens = np.sort(np.argsort(rng.random((300, 40)), axis=1)[:, :6], axis=1)
batch = Embeddings(sparse=Sparse(tokens, rng.random((300, 6)).astype(np.float32)))
engines = [create(Path(sys.argv[1]) / name, Schema(sparse=True), name) for name in ("ivf", "numpy")]
for engine in engines:
    engine.upsert([f"p{row}" for row in range(300)], batch, [{"n": row % 3} for row in range(300)])
assert engines[0]._table.postings
for filter in (None, {"n": 1}):
    found, wanted = ([id for id, _ in one.search_sparse([3, 9, 30], [1, 0.5, 2], 7, filter)] for one in engines)
    assert found == wanted, (found, wanted)
for engine in engines:
    engine.close()
"""


def run(script: str, *arguments: object, **environment: object) -> str:
    given = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("kind", "content"), [("nbi", b""), ("nbi", b"\x80\x04half"), ("nbc", b"rubbish"), ("nbc", b"")]
)
def test_a_damaged_file_of_the_compilers_cache_is_written_anew(kind: str, content: bytes, tmp_path: Path) -> None:
    assert run(HEAP, NUMBA_CACHE_DIR=tmp_path) == "hits 0"
    assert run(HEAP, NUMBA_CACHE_DIR=tmp_path) == "hits 1"
    (path,) = tmp_path.glob(f"*/*.{kind}")
    path.write_bytes(content)
    assert run(HEAP, NUMBA_CACHE_DIR=tmp_path) == "hits 0"
    assert run(HEAP, NUMBA_CACHE_DIR=tmp_path) == "hits 1"


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
@pytest.mark.parametrize("most", [0, 1000])
def test_a_search_outlives_a_full_disk_under_the_compilers_cache(most: int, tmp_path: Path) -> None:
    assert run(HEAP, most, NUMBA_CACHE_DIR=tmp_path) == "hits 0"
    assert run(HEAP, NUMBA_CACHE_DIR=tmp_path) == "hits 0"
    assert run(HEAP, NUMBA_CACHE_DIR=tmp_path) == "hits 1"


def test_loops_that_are_not_compiled_find_the_same(tmp_path: Path) -> None:
    """As under a debugger, or where lines are counted."""
    run(SEARCHES, tmp_path, NUMBA_DISABLE_JIT=1)


def test_a_compiler_that_cannot_be_imported_is_as_one_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = Embeddings(sparse=Sparse(np.array([[3, 5]]), np.ones((1, 2), np.float32)))
    create(tmp_path / "before", Schema(sparse=True), "ivf").close()
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    with closing(create(tmp_path / "index", Schema(sparse=True), "ivf")) as backend:
        assert "Numba needs NumPy 2.3 or less" in caplog.text
        backend.upsert(["one"], batch, [{}])
        assert backend.search_sparse([5], [2.0], 1) == [("one", 2.0)]
        assert backend._heads is not None
    with pytest.raises(UsageError, match=r"Numba needs NumPy 2.3 or less\): pip install numba=="):
        open_backend(tmp_path / "before")
