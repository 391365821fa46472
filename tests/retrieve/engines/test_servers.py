"""The suites of embedded engines over the engines in servers, and what only a server can do: go away, and be full."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve import servers
from tests.retrieve.engines import test_differences, test_engines
from tests.retrieve.engines.test_engines import DIM, SCHEMA, embed, empty, filled, langs, names  # noqa: F401
from tests.retrieve.test_live import corpus, text_of
from ultrarag.errors import IndexStateError, UsageError
from ultrarag.retrieve.engines.address import with_quantise
from ultrarag.retrieve.engines.registry import Backend, Schema, create, open_backend, remove
from ultrarag.retrieve.engines.server import OVERSAMPLING, ServerError
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.search.filters import matches, parse
from ultrarag.types import Embeddings, Passage

#: Engine -> what must be installed, and where it is.
ENGINES = {
    "qdrant-local": "qdrant_client",
    "qdrant-rest": "qdrant_client",
    "milvus-lite": "milvus_lite",
    "qdrant-cluster": "qdrant_client",
    "milvus-cluster": "pymilvus",
}
#: Tests of files and owners, which are those of the embedded engines, and large ones, which are below in small.
NOT_HERE = (
    "damaged_file",
    "beam_of_a_graph",
    "failing_optimizer",
    "during_the_optimisation",
    "killed_while_it_opens",
    "killed_while_optimizing",
    "second_owner",
    "survives_a_crash",
    "optimized_search",
    "replacing_everything",
    "lists_all",
)

for _name, _test in (vars(test_engines) | vars(test_differences)).items():
    if _name.startswith("test_") and not any(part in _name for part in NOT_HERE):
        globals()[_name] = _test


@pytest.fixture(params=list(ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    """The URI of an engine."""
    engine, _, kind = request.param.partition("-")
    if reason := servers.missing(ENGINES[request.param]):
        pytest.skip(reason)
    if kind == "cluster":
        if (uri := servers.cluster(engine)) is None:
            pytest.skip(f"no {engine} cluster is named in the environment")
        return uri
    if kind == "rest":
        return request.getfixturevalue("rest").uri
    if engine == "milvus":
        return request.getfixturevalue("milvus_lite").uri
    return f"qdrant://{request.getfixturevalue('memory')}/qdrant"


@pytest.fixture
def small(name: str, tmp_path: Path):
    """An engine with dense vectors of 600 passages, of which 50 were deleted, in batches of a few requests."""
    backend = create(tmp_path / "small", Schema(dense=DIM), name)
    for start in (0, 300):
        rows = slice(start, start + 300)
        backend.upsert(names(600)[rows], Embeddings(dense=embed(600).dense[rows]), langs(600)[rows])
    backend.delete(names(50))
    yield backend
    backend.close()


def test_recall_with_and_without_a_filter(small: Backend) -> None:
    small.optimize(lambda seconds: None)
    dense, queries = embed(600).dense, embed(5, seed=1).dense
    for filter, kept in ((None, range(50, 600)), ({"n": {"gte": 100, "lt": 230}}, range(100, 230))):
        for query in queries:
            scores = dense[list(kept)] @ query
            expected = {f"p{kept[row]}" for row in np.argsort(-scores)[:10]}
            found = {id for id, _ in small.search_dense(query, 10, filter)}
            assert len(found & expected) >= 9
            assert {id for id, _ in small.search_dense(query, 10, filter, exact=True)} == expected
    assert len(small.search_dense(queries[0], 10**12)) == 550
    assert len(small.search_dense(queries[0], 10**12, {"lang": "zh"})) == 55


def test_ids_are_listed_once_each(small: Backend) -> None:
    assert sorted(small.ids()) == sorted(names(600)[50:])
    assert small.count() == 550


def test_ranges_hold_for_numbers_of_any_kind(empty: Backend) -> None:  # noqa: F811
    values = [-1e300, -3.5, -1, -0.0, 0, 1e-300, 2, 2.5, 1e6, [1, 9], [-7, 2], "2024-05-01", "2", None, True]
    empty.upsert([str(row) for row in range(len(values))], embed(len(values)), [{"v": value} for value in values])
    bounds = [{"gte": 0}, {"gt": 0}, {"lt": 0}, {"gt": 1, "lt": 9}, {"gte": 2, "lte": 2.5}, {"gt": 3, "lt": 2}]
    for filter in [*({"v": bound} for bound in bounds), {"v": {"gte": "2024-05-01"}}]:
        for wanted in (filter, {"not": filter}):
            expected = {str(row) for row, value in enumerate(values) if matches(parse(wanted), {"v": value})}
            assert {id for id, _ in empty.search_dense(np.ones(DIM), 50, wanted)} == expected, wanted


def test_many_batches_replace_each_other(empty: Backend, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("ultrarag.retrieve.engines.server.REQUEST_FLOATS", 500)
    for seed in range(2):
        batch = embed(40, seed)
        empty.upsert(names(40), batch, langs(40))
    assert empty.count() == 40
    held = empty.vectors(names(40))
    np.testing.assert_allclose(held.dense, batch.dense)
    assert held.mask.sum(1).tolist() == batch.mask.sum(1).tolist()


def test_removing_the_directory_removes_the_collection(name: str, tmp_path: Path) -> None:
    backend = create(tmp_path / "index", SCHEMA, name)
    copy = shutil.copytree(backend.directory, tmp_path / "copy")
    backend.close()
    remove(backend.directory)
    assert not backend.directory.exists()
    with pytest.raises(IndexStateError, match="was deleted there"):
        open_backend(copy)
    remove(copy)


# A live index whose vectors are in a server


def test_a_live_index_is_swapped_under_load(name: str, tmp_path: Path, tiny, other, quick_builds) -> None:
    with LiveIndex.create(tmp_path / "kb", tiny, backend=name) as live:
        live.add(corpus(30))
        errors, stop, searches, written = [], threading.Event(), [], []

        def searching() -> None:
            while not stop.is_set():
                searches.append(len(live.search(text_of(7), k=3, weights={"dense": 1, "sparse": 1, "colbert": 1})))

        def writing() -> None:
            while not stop.is_set():
                written.append(f"w{len(written)}")
                live.add([Passage(written[-1], text_of(len(written)), metadata={"n": 1})])

        def guarded(work) -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (searching, writing)]
        for thread in threads:
            thread.start()
        try:
            live.swap(live.build(other))
            live.rollback()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert errors == []
        assert set(searches) == {3}
        assert written
        assert live.fingerprint == tiny.fingerprint
        everything = {f"p{n}" for n in range(30)} | set(written)
        assert set(live._core.live.backend.ids()) == everything
        assert len(live.search("place", k=200, heads=["dense"], filter={"n": {"lte": 1}})) == 2 + len(written)
    with LiveIndex.open(tmp_path / "kb") as live:
        assert live.search(text_of(7), k=1, heads=["bm25"])[0].passage.text == text_of(7)
        live.swap(live.build(other))
        assert live.fingerprint == other.fingerprint


def test_vacuum_deletes_the_collections_of_retired_generations(name: str, tmp_path: Path, tiny, other) -> None:
    with LiveIndex.create(tmp_path / "kb", tiny, backend=name) as live:
        folder = live._core.layout.final(1)
        vectors = shutil.copytree(live._core.layout.vectors(folder), tmp_path / "copy")
        live._core.catalog.add("f", name, ("dense",), "fp32", "retired", 0)
        create(live._core.layout.vectors(live._core.layout.final(2)), Schema(dense=DIM), name).close()
        gone = shutil.copytree(live._core.layout.vectors(live._core.layout.final(2)), tmp_path / "gone")
        live.vacuum()
    open_backend(vectors).close()
    with pytest.raises(IndexStateError, match="was deleted there"):
        open_backend(gone)


def test_an_index_whose_server_is_away_is_not_called_damaged(tmp_path: Path, tiny) -> None:
    uri = f"milvus://127.0.0.1:{servers.free_port()}?timeout=0.5"
    if servers.missing("pymilvus"):
        pytest.skip("pymilvus is not installed")
    LiveIndex.create(tmp_path / "kb", tiny, backend="numpy").close()
    vectors = tmp_path / "kb" / "generations" / "1" / "vectors"
    schema = json.loads((vectors / "schema.json").read_bytes())
    (vectors / "schema.json").write_text(json.dumps({**schema, "backend": uri}))
    (vectors / "collection.json").write_text('{"collection": "c"}')
    for repair in (False, True):
        with pytest.raises(IndexStateError, match="milvus://127") as caught:
            LiveIndex.open(tmp_path / "kb", tiny, repair=repair)
        assert "repair" not in str(caught.value)
    assert (vectors / "collection.json").exists()


# Quantised vectors


@pytest.mark.parametrize("quantise", ["", "int8", "binary"])
def test_a_qdrant_server_is_asked_for_codes_and_to_compare_anew(rest, tmp_path: Path, quantise: str) -> None:
    uri = with_quantise(rest.uri, quantise)
    with closing(create(tmp_path / "index", Schema(dense=DIM, colbert=DIM), uri)) as backend:
        made = rest.made[backend.collection].vectors
        kinds = [made[head].quantization_config for head in ("dense", "colbert")]
        if quantise == "int8":
            assert all(kind.scalar.type == "int8" and kind.scalar.always_ram for kind in kinds)
        elif quantise == "binary":
            assert all(kind.binary.always_ram for kind in kinds)
        assert [kind is None for kind in kinds] == [not quantise] * 2
        assert (made["dense"].on_disk, made["colbert"].on_disk) == (quantise != "" or None, True)
        rest.asked.clear()
        for exact in (False, True):
            backend.search_dense(np.ones(DIM), 3, exact=exact)
            backend.search_tokens(np.ones((2, DIM)), 3, exact=exact)
        backend.search_dense(np.ones(DIM), 9_999)
        anew = [found.params.quantization for found in rest.asked if not found.params.exact]
        if quantise:  # of dense vectors, of tokens, and of 10,000 hits, of which no more are compared
            assert [found.oversampling for found in anew] == [OVERSAMPLING[quantise], OVERSAMPLING[quantise], 1]
            assert all(found.rescore for found in anew)
        else:
            assert anew == [None, None]  # MaxSim is exact
    backend = open_backend(tmp_path / "index")
    assert backend.address.quantise == quantise
    backend.close()


def test_milvus_lite_searches_bytes_and_gives_exact_scores(tmp_path: Path, milvus_lite) -> None:
    uri = f"{milvus_lite.uri}?quantise=int8"
    dense, query = embed(600).dense, embed(1, seed=1).dense[0]
    with closing(create(tmp_path / "index", Schema(dense=DIM), uri)) as backend:
        backend.upsert(names(600), Embeddings(dense=dense), langs(600))
        backend.optimize()
        kind = backend._call(lambda client: client.describe_index(backend.collection, "dense"))
        assert kind["index_type"] == "HNSW_SQ"
        for filter, kept in ((None, range(600)), ({"n": {"gte": 100, "lt": 230}}, range(100, 230))):
            scores = dense[list(kept)] @ query
            best = np.argsort(-scores)[:10]
            for exact in (False, True):
                found = backend.search_dense(query, 10, filter, exact)
                assert [id for id, _ in found] == [f"p{kept[row]}" for row in best]
                np.testing.assert_allclose([score for _, score in found], scores[best], rtol=1e-5)
        assert len(backend.search_dense(query, 10**12, {"n": {"lt": 40}})) == 40


def test_milvus_without_the_index_says_so_and_keeps_nothing(tmp_path: Path, milvus_lite, monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"no index IVF_RABITQ.*2\.6 or later.*quantise=int8"):
        create(tmp_path / "lite", Schema(dense=DIM), f"{milvus_lite.uri}?quantise=binary")
    # what a server of 2.3.5 said
    said = ServerError("<MilvusException: (code=65535, message=invalid index type: HNSW_SQ)>")
    monkeypatch.setattr("pymilvus.MilvusClient.create_index", raising(said))
    with pytest.raises(UsageError, match=r"no index HNSW_SQ.*2\.5 or later, or leave quantise out"):
        create(tmp_path / "old", Schema(dense=DIM), f"{milvus_lite.uri}?quantise=int8")


def test_bits_in_milvus_are_compared_anew(tmp_path: Path, milvus_lite, monkeypatch: pytest.MonkeyPatch) -> None:
    # Milvus Lite keeps float32 under the name of this index: what we ask and do with the answer is run
    monkeypatch.setattr("ultrarag.retrieve.engines.milvus.server.MilvusServer._is_lite", lambda self: False)
    dense, query = embed(300).dense, embed(1, seed=1).dense[0]
    with closing(create(tmp_path / "index", Schema(dense=DIM), f"{milvus_lite.uri}?quantise=binary")) as backend:
        backend.upsert(names(300), Embeddings(dense=dense), langs(300))
        for exact in (False, True):
            best = np.argsort(-(dense @ query))[:10]
            assert [id for id, _ in backend.search_dense(query, 10, exact=exact)] == [f"p{row}" for row in best]


def raising(error: Exception):
    """A function that raises an error, whatever it is called with."""

    def fail(*values: object, **named: object) -> None:
        raise error

    return fail


# What only Milvus Lite can be made to do here


def test_a_server_that_comes_back_is_written_to_and_searched_again(tmp_path: Path, milvus_lite) -> None:
    with closing(create(tmp_path / "index", SCHEMA, milvus_lite.uri)) as backend:
        backend.upsert(names(20), embed(60)[:20], langs(20))
        milvus_lite.kill()
        back = threading.Timer(0.5, milvus_lite.start)
        back.start()
        try:
            backend.upsert(names(60)[20:], embed(60)[20:], langs(60)[20:])  # waits for the server
        finally:
            back.join()
        assert backend.count() == 60
        assert len(backend.search_dense(embed(60).dense[3], 60)) == 60
        held = backend.vectors(names(60))
        np.testing.assert_allclose(held.dense, embed(60).dense)
        assert held.mask.sum(1).tolist() == embed(60).mask.sum(1).tolist()


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    for engine, module in (("qdrant", "qdrant_client"), ("milvus", "pymilvus")):
        if servers.missing(module):
            continue
        uri = f"{engine}://127.0.0.1:{servers.free_port()}?timeout=0.5"
        with pytest.raises(IndexStateError, match=uri.replace("?", r"\?")):
            create(tmp_path / engine, Schema(dense=DIM), uri)


# What only the stand-in for a Qdrant server can be made to do


def test_a_busy_server_is_given_time(rest, tmp_path: Path) -> None:
    with closing(create(tmp_path / "index", SCHEMA, rest.uri)) as backend:
        rest.failures = [(429, {"Retry-After": "1"}), (503, {}), (502, {})]
        started = time.monotonic()
        backend.upsert(names(20), embed(20), langs(20))
        assert time.monotonic() - started > 1
        rest.failures = [(504, {})]
        assert backend.count() == 20


def test_an_error_of_the_server_is_not_tried_again_and_says_what_it_said(rest, tmp_path: Path) -> None:
    with closing(create(tmp_path / "index", SCHEMA, rest.uri)) as backend:
        rest.failures, rest.seen = [(400, {})], []
        with pytest.raises(IndexStateError, match=r"HTTP 400 .*not now"):
            backend.count()
        assert len(rest.seen) == 1


def test_a_busy_server_is_not_given_for_ever(rest, tmp_path: Path) -> None:
    with closing(create(tmp_path / "index", SCHEMA, f"{rest.uri}?timeout=0.5")) as backend:
        rest.failures = [(503, {})] * 100
        with pytest.raises(IndexStateError, match="HTTP 503"):
            backend.count()


def test_the_key_comes_from_the_environment_and_stays_there(
    rest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest.key = "s3cret"
    with pytest.raises(IndexStateError, match="refuses the API key"):
        create(tmp_path / "refused", SCHEMA, rest.uri)
    monkeypatch.setenv("MY_KEY", "s3cret")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's, of a key that travels without TLS
        create(tmp_path / "index", SCHEMA, f"{rest.uri}?key_env=MY_KEY").close()
    assert not any(b"s3cret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_what_filters_test_is_indexed_before_the_points_that_have_it(rest, tmp_path: Path) -> None:
    with closing(create(tmp_path / "index", SCHEMA, rest.uri)) as backend:
        rest.seen.clear()
        backend.upsert(names(3), embed(3), langs(3))
        places = [path.split("?")[0].rpartition("/")[2] for method, path in rest.seen if method == "PUT"]
        assert places == ["index", "points"]
        held = rest.indexes[backend.collection]
        assert held.pop("facts")["data_type"] == "keyword"
        assert [entry["data_type"] for entry in held.values()] == ["float"]


def test_a_client_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    monkeypatch.delitem(sys.modules, "ultrarag.retrieve.engines.milvus.server", raising=False)
    monkeypatch.delitem(sys.modules, "ultrarag.retrieve.engines.milvus.client", raising=False)
    with pytest.raises(UsageError, match=r"needs pymilvus: pip install pymilvus==\d"):
        create(tmp_path / "index", SCHEMA, "milvus://127.0.0.1:1")
