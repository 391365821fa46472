"""One suite for every vector engine: what `Backend` promises, and what happens to files and owners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from ultrarag.errors import DataError, FingerprintError, IndexStateError, UsageError
from ultrarag.retrieve.engines.registry import BACKENDS, Backend, Schema, create, default_backend, open_backend
from ultrarag.types import Embeddings, Sparse

DIM, TOKEN_DIM, VOCABULARY = 16, 8, 50
#: what an engine is imported from, where a platform may lack it
LIBRARIES = {"qdrant-edge": "qdrant_edge", "ivf": "faiss"}
SCHEMA = Schema(dense=DIM, sparse=True, colbert=TOKEN_DIM, fingerprint="f1")


def embed(count: int, seed: int = 0) -> Embeddings:
    """Random vectors of every head; row 1 has neither lexical weights nor tokens."""
    rng = np.random.default_rng(seed)
    ids = np.sort(np.argsort(rng.random((count, VOCABULARY)), axis=1)[:, :6], axis=1)
    weights = rng.random((count, 6)).astype(np.float32) + 0.1
    mask = (np.arange(5) < rng.integers(1, 6, count)[:, None]).astype(np.int64)
    if count > 1:
        ids[1], weights[1], mask[1] = Sparse.PAD_ID, 0, 0
    return Embeddings(
        dense=rng.normal(size=(count, DIM)).astype(np.float32),
        sparse=Sparse(ids, weights),
        colbert=rng.normal(size=(count, 5, TOKEN_DIM)).astype(np.float32) * mask[..., None],
        mask=mask,
    )


def names(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def langs(count: int) -> list[dict]:
    return [{"lang": "en" if i % 10 else "zh", "n": i} for i in range(count)]


@pytest.fixture(params=list(BACKENDS))
def name(request: pytest.FixtureRequest) -> str:
    if request.param in LIBRARIES:
        pytest.importorskip(LIBRARIES[request.param])
    return request.param


@pytest.fixture
def empty(name: str, tmp_path: Path):
    backend = create(tmp_path / "index", SCHEMA, name)
    yield backend
    backend.close()


@pytest.fixture
def filled(empty: Backend) -> Backend:
    empty.upsert(names(60), embed(60), langs(60))
    return empty


def sparse_matrix(embeddings: Embeddings) -> np.ndarray:
    rows = np.zeros((len(embeddings), VOCABULARY))
    for row, held in enumerate(embeddings.sparse.to_dicts()):
        rows[row, list(held)] = list(held.values())
    return rows


def order(scores: np.ndarray, k: int) -> list[str]:
    return [f"p{i}" for i in np.argsort(-scores, kind="stable")[:k]]


def test_exact_dense_search_is_the_inner_product(filled: Backend) -> None:
    query = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
    scores = embed(60).dense @ query
    hits = filled.search_dense(query, 7, exact=True)
    assert [id for id, _ in hits] == order(scores, 7)
    np.testing.assert_allclose([score for _, score in hits], np.sort(scores)[::-1][:7], rtol=1e-5)


def test_sparse_search_is_the_dot_product_of_all_that_share_a_token(filled: Backend) -> None:
    rng = np.random.default_rng(2)
    tokens, weights = np.array([30, 4, 17, 9]), rng.random(4).astype(np.float32) + 0.1
    scores = sparse_matrix(embed(60))[:, tokens] @ weights
    hits = dict(filled.search_sparse(tokens, weights, 60))
    assert hits.keys() == {f"p{i}" for i in np.flatnonzero(scores)}
    np.testing.assert_allclose([hits[id] for id in hits], [scores[int(id[1:])] for id in hits], rtol=1e-5)
    assert [id for id, _ in filled.search_sparse(tokens, weights, 3)] == order(scores, 3)


def test_maxsim_is_the_mean_of_the_best_products(filled: Backend) -> None:
    query, stored = np.random.default_rng(3).normal(size=(4, TOKEN_DIM)).astype(np.float32), embed(60)
    found = filled.maxsim(query, [*names(60), "unknown", "p3"])
    for row in range(60):
        held = stored.colbert[row][stored.mask[row] == 1]
        expected = (query @ held.T).max(1).mean() if len(held) else 0.0
        assert found[row] == pytest.approx(expected, rel=1e-5), row
    assert np.isnan(found[60])
    assert found[61] == found[3]
    assert filled.maxsim(query[:0], ["p0"]).tolist() == [0.0]


def test_scores_of_given_passages_are_those_of_the_search(filled: Backend) -> None:
    query, tokens, weights = embed(1, seed=9).dense[0], [4, 17], [0.5, 2.0]
    asked = ["p7", "unknown", "p1", "p7"]
    dense, sparse = embed(60).dense @ query, sparse_matrix(embed(60))[:, tokens] @ weights
    found = filled.score_dense(query, asked)
    np.testing.assert_allclose(found, [dense[7], np.nan, dense[1], dense[7]], rtol=1e-5)
    found = filled.score_sparse(tokens, weights, asked)
    np.testing.assert_allclose(found, [sparse[7], np.nan, 0.0, sparse[7]], rtol=1e-5)
    assert filled.score_sparse([], [], ["p7", "unknown"]).tolist() == pytest.approx([0, np.nan], nan_ok=True)
    assert len(filled.score_dense(query, [])) == 0


def test_filter_is_applied_before_top_k(filled: Backend) -> None:
    query = embed(1, seed=4).dense[0]
    scores = embed(60).dense @ query
    expected = [id for id in order(scores, 60) if int(id[1:]) % 10 == 0]
    assert [id for id, _ in filled.search_dense(query, 6, {"lang": "zh"})] == expected
    assert filled.search_dense(query, 6, {"lang": "xx"}) == []
    in_range = filled.search_dense(query, 60, {"n": {"gte": 20, "lt": 24}})
    assert {id for id, _ in in_range} == {"p20", "p21", "p22", "p23"}
    lexical = filled.search_sparse(range(VOCABULARY), np.ones(VOCABULARY), 60, {"not": {"lang": "en"}})
    assert {id for id, _ in lexical} == {f"p{i}" for i in range(0, 60, 10)}


def test_of_an_id_twice_in_one_call_the_last_wins(empty: Backend) -> None:
    batch = embed(4)
    empty.upsert(["a", "b", "a", "c"], batch, [{"v": 1}, {}, {"v": 2}, {}])
    assert empty.count() == 3
    np.testing.assert_allclose(empty.vectors(["a"]).dense, batch.dense[2:3])
    assert empty.search_dense(batch.dense[0], 5, {"v": 1}) == []
    assert [id for id, _ in empty.search_dense(batch.dense[0], 5, {"v": 2})] == ["a"]


def test_upsert_replaces_every_head_and_the_metadata(filled: Backend) -> None:
    new = embed(3, seed=7)
    filled.upsert(["p5", "p6", "p5000"], new, [{"lang": "fr"}] * 3)
    assert filled.count() == 61
    held = filled.vectors(["p5", "p6", "p5000"])
    np.testing.assert_allclose(held.dense, new.dense)
    assert held.sparse.to_dicts() == [pytest.approx(row) for row in new.sparse.to_dicts()]
    assert held.sparse.to_dicts()[1] == {}
    assert held.mask.sum(1).tolist() == new.mask.sum(1).tolist()
    found = filled.search_dense(new.dense[0], 61, {"lang": "fr"})
    assert {id for id, _ in found} == {"p5", "p6", "p5000"}


def test_deleted_passages_are_gone_everywhere(filled: Backend) -> None:
    filled.delete([*names(55), "p3", "unknown"])
    filled.delete([])
    rest = {f"p{i}" for i in range(55, 60)}
    assert filled.count() == 5
    assert set(filled.ids()) == rest
    assert {id for id, _ in filled.search_dense(np.ones(DIM), 60)} == rest
    assert {id for id, _ in filled.search_sparse(range(VOCABULARY), np.ones(VOCABULARY), 60)} == rest
    assert np.isnan(filled.maxsim(np.ones((1, TOKEN_DIM)), ["p0"])).all()
    with pytest.raises(UsageError, match="'p0'"):
        filled.vectors(["p0"])


def test_replacing_everything_many_times(empty: Backend) -> None:
    for seed in range(6):
        batch = embed(400, seed)
        empty.upsert(names(400), batch, langs(400))
    query = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
    assert empty.count() == 400
    assert [id for id, _ in empty.search_dense(query, 9, exact=True)] == order(batch.dense @ query, 9)
    assert len(empty.search_sparse(range(VOCABULARY), np.ones(VOCABULARY), 500, {"lang": "zh"})) == 40


def test_ids_lists_all(empty: Backend) -> None:
    empty.upsert(names(2500), embed(2500), [{}] * 2500)
    assert sorted(empty.ids()) == sorted(names(2500))
    empty.delete(names(2400))
    assert sorted(empty.ids()) == sorted(set(names(2500)) - set(names(2400)))


def test_vectors_come_back_as_given_in_the_order_asked(filled: Backend) -> None:
    held, stored = filled.vectors(["p9", "p1", "p2"]), embed(60)[np.array([9, 1, 2])]
    np.testing.assert_allclose(held.dense, stored.dense)
    assert held.sparse.to_dicts() == [pytest.approx(row) for row in stored.sparse.to_dicts()]
    for row in range(3):
        kept, expected = held.mask[row] == 1, stored.mask[row] == 1
        np.testing.assert_allclose(held.colbert[row][kept], stored.colbert[row][expected])


def test_odd_ids_are_kept_apart(empty: Backend) -> None:
    odd = ["a/b", "../a", " ", "中文", "é", "e\u0301", "\x00", "a\x00", "\ud800", '"', "x" * 5000, "1", "01", "\n"]
    batch = embed(len(odd))
    empty.upsert(odd, batch, [{}] * len(odd))
    assert sorted(empty.ids()) == sorted(odd)
    for row, id in enumerate(odd):
        np.testing.assert_allclose(empty.vectors([id]).dense[0], batch.dense[row])
    empty.delete(["\ud800", "a\x00"])
    assert empty.count() == len(odd) - 2


def test_empty_index_and_large_k(empty: Backend) -> None:
    assert empty.count() == 0
    assert list(empty.ids()) == []
    assert empty.search_dense(np.ones(DIM), 10) == []
    assert empty.search_sparse([1], [1.0], 10, {"lang": "en"}) == []
    empty.upsert([], embed(0), [])
    empty.upsert(names(3), embed(3), [{}] * 3)
    assert len(empty.search_dense(np.ones(DIM), 1000)) == 3
    assert empty.search_sparse([], [], 10) == []
    empty.optimize()
    assert empty.count() == 3


def tied(count: int) -> tuple[list[str], Embeddings]:
    """Passages with the same vectors, in no order of their ids, and one that is better by each head."""
    batch = embed(1)[np.zeros(count, int)]
    batch.dense, batch.sparse.weights = batch.dense.copy(), batch.sparse.weights.copy()
    batch.dense[count // 2] *= 2
    batch.sparse.weights[count // 2] *= 2
    return [f"p{(7 * row) % count:03}" for row in range(count)], batch


@pytest.mark.parametrize("count", [23, 300])
def test_ties_come_in_the_order_of_ids_for_every_k(empty: Backend, count: int) -> None:
    """Also after everything was written again in another order; 300 are more than one beam of a graph, or a request."""
    ids, batch = tied(count)
    best, query = ids[count // 2], embed(1)
    wanted = [best, *sorted(set(ids) - {best})]
    for order in (np.arange(count), np.arange(count)[::-1]):
        empty.delete(ids)
        empty.upsert([ids[row] for row in order], batch[order], [{"n": 1}] * count)
        for k in (*range(1, 25), count - 1, count, count + 1) if count < 100 else (1, 30, 150):
            searches = [
                empty.search_dense(query.dense[0], k),
                empty.search_dense(query.dense[0], k, {"n": 1}, exact=True),
                empty.search_sparse(query.sparse.ids[0], query.sparse.weights[0], k),
            ]
            assert [[id for id, _ in hits] for hits in searches] == [wanted[:k]] * 3, k
        dense, sparse = (dict(hits) for hits in (searches[0], searches[2]))
        asked = list(dense)
        assert empty.score_dense(query.dense[0], asked).astype(np.float32).tolist() == list(dense.values())
        scores = empty.score_sparse(query.sparse.ids[0], query.sparse.weights[0], asked)
        assert scores.astype(np.float32).tolist() == [sparse[id] for id in asked]
        assert len(set(empty.maxsim(query.colbert[0], asked).tolist())) == 1


def test_a_bad_batch_is_refused_and_nothing_of_it_is_stored(empty: Backend) -> None:
    def refused(error: type[Exception], message: str, ids: list, batch: Embeddings, payloads: list) -> None:
        with pytest.raises(error, match=message):
            empty.upsert(ids, batch, payloads)
        assert empty.count() == 0

    infinite, negative, twice = embed(2), embed(2), embed(2)
    infinite.dense[1, 3] = np.inf
    negative.sparse.weights[0, 0] = -1
    twice.sparse.ids[0, 1] = twice.sparse.ids[0, 0]
    refused(DataError, "non-empty string", ["", "b"], embed(2), [{}] * 2)
    refused(DataError, "non-empty string", [1, "b"], embed(2), [{}] * 2)
    refused(UsageError, "2 ids, 3 embeddings", ["a", "b"], embed(3), [{}] * 2)
    refused(DataError, "'b' has a vector that is not finite", ["a", "b"], infinite, [{}] * 2)
    refused(DataError, "'a' has a lexical weight that is negative", ["a", "b"], negative, [{}] * 2)
    refused(DataError, "'a' names a token id twice", ["a", "b"], twice, [{}] * 2)
    refused(UsageError, "the index stores dense, sparse, colbert", ["a"], Embeddings(dense=embed(1).dense), [{}])
    refused(UsageError, "8 wide", ["a", "b"], embed(2).map(lambda a: a[..., :8]), [{}] * 2)
    refused(DataError, "'when'", ["a", "b"], embed(2), [{"when": object()}, {}])


def test_a_bad_query_is_refused(filled: Backend) -> None:
    for vector in (np.ones(3), np.ones((1, DIM)), np.full(DIM, np.nan)):
        with pytest.raises(UsageError, match="dense query"):
            filled.search_dense(vector, 3)
    for k in (0, -1, 2.5, True):
        with pytest.raises(UsageError, match="positive integer"):
            filled.search_dense(np.ones(DIM), k)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="twice"):
        filled.search_sparse([3, 3], [1, 1], 5)
    with pytest.raises(UsageError, match="colbert query"):
        filled.maxsim(np.ones(TOKEN_DIM), ["p0"])
    with pytest.raises(UsageError, match="unknown bound"):
        filled.search_dense(np.ones(DIM), 3, {"n": {"above": 3}})


@pytest.mark.parametrize("head", ["dense", "sparse", "colbert"])
def test_one_head_alone(name: str, tmp_path: Path, head: str) -> None:
    everything = embed(5)
    batch = Embeddings(**{head: getattr(everything, head)}, mask=everything.mask if head == "colbert" else None)
    backend = create(tmp_path / "index", Schema.of(batch), name)
    backend.upsert(names(5), batch, [{}] * 5)
    assert backend.vectors(names(5)).heads == (head,)
    searches = {
        "dense": lambda: backend.search_dense(np.ones(DIM), 5),
        "sparse": lambda: backend.search_sparse([1], [1.0], 5),
        "colbert": lambda: backend.maxsim(np.ones((1, TOKEN_DIM)), names(5)),
    }
    searches.pop(head)()
    for search in searches.values():
        with pytest.raises(UsageError, match="stores no"):
            search()
    backend.close()


def test_search_by_tokens_compares_with_all(filled: Backend) -> None:
    tokens = embed(61).colbert[60]
    if filled.__class__.__name__.startswith("Milvus"):
        with pytest.raises(UsageError, match="Milvus server gives late interaction"):
            filled.search_tokens(tokens, 5)
        return
    scores = filled.maxsim(tokens, names(60))
    wanted = [(names(60)[place], scores[place]) for place in np.argsort(-scores, kind="stable")]
    hits = filled.search_tokens(tokens, 60)
    assert [id for id, _ in hits] == [id for id, _ in wanted if id in dict(hits)]
    np.testing.assert_allclose([score for _, score in hits], [dict(wanted)[id] for id, _ in hits], rtol=1e-5)
    assert filled.search_tokens(tokens, 7) == hits[:7]
    assert filled.search_tokens(tokens[:0], 5) == []
    only = {"lang": langs(60)[0]["lang"]}
    assert {id for id, _ in filled.search_tokens(tokens, 60, only)} <= {
        id for id, held in zip(names(60), langs(60), strict=True) if held["lang"] == only["lang"]
    }


def test_everything_is_there_after_closing(filled: Backend) -> None:
    filled.delete(["p0"])
    filled.close()
    filled.close()
    with pytest.raises(IndexStateError, match="was closed"):
        filled.count()
    again = open_backend(filled.directory, fingerprint="f1")
    assert again.schema == SCHEMA
    assert set(again.ids()) == set(names(60)) - {"p0"}
    np.testing.assert_allclose(again.vectors(names(60)[1:]).dense, embed(60).dense[1:])
    assert len(again.search_dense(np.ones(DIM), 60, {"lang": "zh"})) == 5
    again.upsert(["new"], embed(1), [{}])
    again.close()
    with_new = open_backend(filled.directory)
    assert with_new.count() == 60
    with_new.close()
    unchanged = open_backend(filled.directory)
    assert unchanged.count() == 60
    unchanged.close()


def test_what_was_flushed_survives_a_crash(name: str, tmp_path: Path) -> None:
    script = """
        import os, sys
        sys.path.insert(0, sys.argv[3])
        from tests.retrieve.engines.test_engines import *
        backend = create(sys.argv[1], SCHEMA, sys.argv[2])
        backend.upsert(names(40), embed(60)[:40], langs(40))
        backend.flush()
        backend.upsert(names(60), embed(60), langs(60))
        backend.delete(["p0"])
        os.kill(os.getpid(), 9)
    """
    arguments = [str(tmp_path / "index"), name, str(Path(__file__).parents[3])]
    crashed = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *arguments], check=False)
    assert crashed.returncode == -9
    backend = open_backend(tmp_path / "index")
    held = set(backend.ids())
    assert held >= set(names(40)) - {"p0"}
    assert backend.count() == len(held)
    rows = sorted(int(id[1:]) for id in held)
    np.testing.assert_allclose(backend.vectors([f"p{i}" for i in rows]).dense, embed(60).dense[rows])
    backend.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize(
    ("engine", "stride"),
    [
        ("numpy", 20),
        ("bm25", 12),
        ("ivf", 20),
        ("plaid", 20),
        ("qdrant-edge", 12),
        pytest.param("qdrant-edge", 4, marks=pytest.mark.long),
    ],
)
def test_an_owner_killed_while_it_opens_leaves_an_index_that_opens(engine: str, stride: int, tmp_path: Path) -> None:
    if engine in LIBRARIES:
        pytest.importorskip(LIBRARIES[engine])
    command = [sys.executable, str(Path(__file__).with_name("kill_while_opening.py")), str(tmp_path), engine]
    done = subprocess.run([*command, str(stride)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3 * stride, "the script no longer sees the steps of opening"


def test_a_second_owner_is_refused_and_told_who_holds_it(filled: Backend) -> None:
    with pytest.raises(IndexStateError, match="in use by this process"):
        open_backend(filled.directory)
    script = "import sys; from ultrarag.retrieve.engines import open_backend; open_backend(sys.argv[1])"
    command = [sys.executable, "-c", script, str(filled.directory)]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"in use by process {os.getpid()}" in other.stderr
    filled.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_another_encoder_is_refused(filled: Backend) -> None:
    filled.close()
    with pytest.raises(FingerprintError, match="encoder f1, not of f2"):
        open_backend(filled.directory, fingerprint="f2")
    open_backend(filled.directory, fingerprint="f1").close()


def _large_files(directory: Path) -> list[Path]:
    sums = json.loads((directory / "checksums.json").read_bytes())
    return [directory / name for name, entry in sums.items() if entry["size"] > 0]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_file_is_found_and_named(filled: Backend, damage: str) -> None:
    filled.close()
    paths = _large_files(filled.directory)
    assert any("vectors" in path.as_posix() for path in paths)
    for path in paths if damage == "flip" else paths[-3:]:
        content = path.read_bytes()
        if damage == "truncate":
            os.truncate(path, len(content) - 1)
        elif damage == "remove":
            path.unlink()
        else:
            with open(path, "r+b") as file:
                file.seek(len(content) // 2)
                file.write(bytes([content[len(content) // 2] ^ 1]))
        with pytest.raises(IndexStateError) as caught:
            open_backend(filled.directory)
        assert str(path) in str(caught.value) or path.name == "schema.json"
        path.write_bytes(content)  # holes are filled now, which must not matter
    open_backend(filled.directory).close()


def test_a_directory_that_holds_no_index(tmp_path: Path, name: str) -> None:
    with pytest.raises(IndexStateError, match=r"'schema.json' is missing"):
        open_backend(tmp_path)
    (tmp_path / "note").write_text("")
    with pytest.raises(IndexStateError, match="not empty"):
        create(tmp_path, SCHEMA, name)
    with pytest.raises(UsageError, match="at least one head"):
        create(tmp_path / "x", Schema(), name)
    with pytest.raises(UsageError, match="did you mean 'numpy'"):
        create(tmp_path / "x", SCHEMA, "nunpy")
    assert default_backend() in BACKENDS


def test_optimized_search_finds_nearly_what_exact_search_finds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "qdrant-edge":
        monkeypatch.setattr("ultrarag.retrieve.engines.qdrant.embedded.HNSW_FROM_KB", 20)
    if name == "ivf":
        small_partitions(monkeypatch)
    backend = create(tmp_path / "index", Schema(dense=DIM), name)
    vectors, queries = embed(3000).dense, embed(20, seed=1).dense
    for start in range(0, 3000, 1000):
        part = slice(start, start + 1000)
        backend.upsert(names(3000)[part], Embeddings(dense=vectors[part]), langs(3000)[part])
    backend.delete(names(100))
    backend.optimize(lambda seconds: None)
    assert backend.count() == 2900
    for filter in (None, {"lang": "zh"}, {"n": {"gte": 1000, "lt": 1300}}):
        found, exact = (
            [{id for id, _ in backend.search_dense(query, 10, filter, exact)} for query in queries]
            for exact in (False, True)
        )
        assert all(len(ids) == 10 for ids in found)
        recall = np.mean([len(a & b) / 10 for a, b in zip(found, exact, strict=True)])
        assert recall > 0.95, filter
    assert len(backend.search_dense(queries[0], 5000)) == 2900, "a graph need not reach every passage"
    assert len(backend.search_dense(queries[0], 10**12, {"lang": "zh"})) == 290
    backend.upsert(["late"], Embeddings(dense=queries[:1] * 100), [{}])
    assert backend.search_dense(queries[0], 1)[0][0] == "late"
    backend.close()
    again = open_backend(backend.directory)
    assert again.count() == 2901
    again.close()


def test_searches_and_writes_in_many_threads(filled: Backend) -> None:
    failures: list[BaseException] = []

    def search() -> None:
        try:
            for _ in range(50):
                assert len(filled.search_dense(np.ones(DIM), 5, {"lang": "en"})) == 5
                filled.search_sparse([1, 2], [1, 1], 5)
                filled.maxsim(np.ones((2, TOKEN_DIM)), names(10))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(100, 200, 10):
        filled.upsert([f"p{i}" for i in range(start, start + 10)], embed(10), langs(10))
        filled.delete([f"p{start}"])
    for thread in threads:
        thread.join()
    assert not failures
    assert filled.count() == 150


def small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine `ivf` do with hundreds of passages what it does with many."""
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.engine.EXACT_ROWS", 300)
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.search.FEW", 20)
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.lexical.FEW", 20)
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.lexical.TAIL_ROWS", 100)
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.codes.LISTS", 1.0)
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.codes.PROBES", 40)
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.lookup.TAIL_ROWS", 100)
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.table.MAPPED_ROWS", 200)


@pytest.fixture
def edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("qdrant_edge")
    monkeypatch.setattr("ultrarag.retrieve.engines.qdrant.embedded.HNSW_FROM_KB", 20)
    backend = create(tmp_path / "index", Schema(dense=DIM), "qdrant-edge")
    backend.upsert(names(1000), Embeddings(dense=embed(1000).dense), [{}] * 1000)
    yield backend
    backend.close()


def test_a_tie_is_followed_beyond_the_beam_of_a_graph(edge: Backend) -> None:
    ids, same = [f"t{row:03}" for row in range(300)], embed(1, seed=5).dense
    edge.upsert(ids[::-1], Embeddings(dense=same.repeat(300, 0) * 9), [{}] * 300)
    edge.optimize()
    found = [edge.search_dense(same[0], k) for k in (1, 2, 90, 200)]
    assert [[id for id, _ in hits] for hits in found] == [ids[:k] for k in (1, 2, 90, 200)]


def test_a_failing_optimizer_leaves_the_index_searchable(edge: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(IndexStateError, match=r"optimising .* failed .*exit status 1"):
            edge.optimize()
    assert len(edge.search_dense(np.ones(DIM), 10)) == 10
    edge.optimize()
    assert edge.count() == 1000


def test_a_search_during_the_optimisation_is_told_so(edge: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def run(*arguments: object) -> None:
        with pytest.raises(IndexStateError) as caught:
            edge.search_dense(np.ones(DIM), 1)
        told.append(str(caught.value))

    monkeypatch.setattr("ultrarag.retrieve.engines.qdrant.embedded.optimize_in_child", run)
    edge.optimize()
    assert "is being optimised" in told[0]


def test_an_owner_killed_while_optimizing_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge")
    script = """
        import sys, threading
        sys.path.insert(0, sys.argv[2])
        from tests.retrieve.engines.test_engines import *
        import ultrarag.retrieve.engines.qdrant.embedded as points
        points.HNSW_FROM_KB = 20
        backend = create(sys.argv[1], Schema(dense=64), "qdrant-edge")
        vectors = np.random.default_rng(0).normal(size=(8000, 64)).astype(np.float32)
        backend.upsert(names(8000), Embeddings(dense=vectors), [{}] * 8000)
        run = subprocess.Popen.communicate
        def killed(self, *args, **kwargs):
            print("optimising", flush=True)
            return run(self, *args, **kwargs)
        subprocess.Popen.communicate = killed
        backend.optimize()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "index"), str(Path(__file__).parents[3])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"optimising\n"
        threading.Event().wait(0.4)  # let the child load the shard; a kill before that must be survived as well
        owner.kill()
    backend = open_backend(tmp_path / "index")
    assert backend.count() == 8000
    assert len(backend.search_dense(np.ones(64), 10)) == 10
    backend.close()
