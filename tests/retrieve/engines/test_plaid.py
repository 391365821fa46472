"""The engine `plaid` where it does what others do not: codes, lists, rows written anew, kills while it writes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.engines import kill_while_writing
from tests.retrieve.engines.test_engines import SCHEMA, embed, langs, names
from ultrarag.errors import DataError, IndexStateError, ResourceError, UsageError
from ultrarag.io import sha256_of
from ultrarag.retrieve.engines import Schema, create, open_backend, read_schema
from ultrarag.retrieve.engines.plaid import engine
from ultrarag.retrieve.engines.plaid.coder import Coder
from ultrarag.types import Embeddings

DIM, TOKENS = 32, 12
TOPICS = np.random.default_rng(99).normal(size=(400, DIM)).astype(np.float32)


def passages(count: int, seed: int = 0) -> Embeddings:
    """Token vectors around the topics that each passage has, as those of a model lie; 4 to 12 of them."""
    rng = np.random.default_rng(seed)
    topics = TOPICS[rng.integers(len(TOPICS), size=(count, 3))]
    tokens = np.take_along_axis(topics, rng.integers(3, size=(count, TOKENS))[..., None], 1)
    tokens = tokens + 0.6 * rng.normal(size=tokens.shape)
    tokens = (tokens / np.linalg.norm(tokens, axis=2, keepdims=True)).astype(np.float32)
    mask = (np.arange(TOKENS) < rng.integers(4, TOKENS + 1, count)[:, None]).astype(np.int64)
    return Embeddings(colbert=tokens * mask[..., None], mask=mask)


def queries(count: int) -> list[np.ndarray]:
    found = passages(count, seed=7)
    return [row[kept == 1] for row, kept in zip(found.colbert, found.mask, strict=True)]


def scores(stored: Embeddings, query: np.ndarray) -> np.ndarray:
    products = np.where(stored.mask[..., None] == 1, stored.colbert @ query.T, -np.inf)
    return products.max(1).mean(1)


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine do with hundreds of passages what it does with many."""
    monkeypatch.setattr(engine, "CODED_TOKENS", 2000)
    monkeypatch.setattr("ultrarag.retrieve.engines.plaid.building.LIST_TOKENS", 16)
    monkeypatch.setattr("ultrarag.retrieve.engines.plaid.tokens.BLOCK_TOKENS", 500)
    monkeypatch.setattr("ultrarag.retrieve.engines.plaid.search.FEW", 20)
    monkeypatch.setattr("ultrarag.retrieve.engines.plaid.search.LEAST_CANDIDATES", 100)
    monkeypatch.setattr("ultrarag.retrieve.engines.plaid.search.LEAST_RESCORED", 16)
    monkeypatch.setattr("ultrarag.retrieve.engines.ivf.lookup.TAIL_ROWS", 100)


def filled(folder: Path, count: int, name: str = "plaid"):
    stored, backend = passages(count), create(folder, Schema(colbert=DIM), name)
    for start in range(0, count, 250):
        part = slice(start, start + 250)
        backend.upsert(names(count)[part], stored[part], langs(count)[part])
    return stored, backend


def best(found: np.ndarray, k: int) -> set[str]:
    return {f"p{row}" for row in np.argsort(-found, kind="stable")[:k]}


@pytest.mark.parametrize(
    ("name", "size", "rest", "overlap"),
    [
        ("plaid?bits=2&rest=0", 11, 0, 0.85),
        ("plaid?bits=3&rest=0", 17, 0, 0.9),
        ("plaid?bits=4&rest=0", 19, 0, 0.93),
        ("plaid", 11, 34, 0.985),
        ("plaid?bits=3", 17, 37, 0.985),
        ("plaid?bits=4", 19, 34, 0.985),
    ],
)
def test_codes_are_small_and_near(name: str, size: int, rest: int, overlap: float, tmp_path: Path) -> None:
    stored, backend = filled(tmp_path / "index", 1500, name)
    backend.optimize()
    tokens = int(stored.mask.sum())
    (file,) = (tmp_path / "index").glob("tokenvectors-*")
    assert file.stat().st_size == size * tokens  # of 128 bytes as float32
    assert [file.stat().st_size for file in (tmp_path / "index").glob("tokenrests-*")] == [rest * tokens] * (rest > 0)
    near = [backend.search_tokens(query, 10) for query in queries(40)]
    exact = [backend.search_tokens(query, 10, exact=True) for query in queries(40)]
    found = [{id for id, _ in hits} for hits in near]
    truth = [best(scores(stored, query), 10) for query in queries(40)]
    recall = lambda left, right: np.mean([len(a & b) / 10 for a, b in zip(left, right, strict=True)])  # noqa: E731
    assert recall(found, [{id for id, _ in hits} for hits in exact]) > 0.97, "candidates are missing"
    assert recall(found, truth) > overlap, "codes are far from vectors"
    for query, hits in zip(queries(40), near, strict=True):
        assert [score for _, score in hits] == backend.maxsim(query, [id for id, _ in hits]).astype(np.float32).tolist()
    backend.close()


def test_few_are_kept_as_they_are(tmp_path: Path) -> None:
    stored, backend = filled(tmp_path / "index", 100)
    np.testing.assert_array_equal(backend.vectors(names(100)).colbert, stored.colbert)
    query = queries(1)[0]
    np.testing.assert_allclose(backend.maxsim(query, names(100)), scores(stored, query), rtol=1e-5)
    assert {id for id, _ in backend.search_tokens(query, 10)} == best(scores(stored, query), 10)
    backend.close()


def test_later_passages_are_coded_with_the_same_centroids(tmp_path: Path) -> None:
    _, backend = filled(tmp_path / "index", 500)
    (coder,) = (tmp_path / "index").glob("coder-*")
    before = coder.read_bytes()
    late = passages(40, seed=3)
    backend.upsert([f"late{row}" for row in range(40)], late, [{"lang": "fr"}] * 40)
    assert coder.read_bytes() == before
    for row in (0, 17):
        query = late.colbert[row][late.mask[row] == 1]
        assert backend.search_tokens(query, 1)[0][0] == f"late{row}"
        assert backend.search_tokens(query, 1, {"lang": "fr"})[0][0] == f"late{row}"
    backend.delete(["late0"])
    query = late.colbert[0][late.mask[0] == 1]
    assert "late0" not in dict(backend.search_tokens(query, 500))
    assert {id for id, _ in backend.search_tokens(query, 100, {"lang": "fr"})} == {f"late{row}" for row in range(1, 40)}
    backend.close()


def test_what_is_stored_is_near_float32_and_what_searches_score_by(tmp_path: Path) -> None:
    stored, backend = filled(tmp_path / "index", 600)
    held = backend.vectors(names(600)).colbert
    assert np.abs(held - stored.colbert).max() < 0.01, "codes of 2 bits alone are 0.4 away"
    np.testing.assert_allclose(backend.kept(stored).colbert, held, atol=1e-6)
    for query in queries(10):
        wanted = scores(stored, query)
        for exact in (True, False):
            for id, score in backend.search_tokens(query, 10, exact=exact):
                assert abs(score - wanted[int(id[1:])]) < 2e-3
    backend.close()


def test_an_index_of_before_there_were_refinements_is_searched_as_it_was(tmp_path: Path) -> None:
    """Its name says nothing of them, and its coder's file says the bits alone."""
    stored, backend = filled(tmp_path / "index", 600, "plaid?bits=4&rest=0")
    backend.optimize()
    backend.close()
    folder = tmp_path / "index"
    _name(folder, "plaid?bits=4")
    (file,) = folder.glob("coder-*")
    with open(file, "wb") as coder:
        np.save(coder, np.array([4], np.int64))
        np.save(coder, backend._tokens.coder.centroids)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "coder": sha256_of(file)}))
    (folder / "checksums.json").unlink()
    again = open_backend(folder)
    np.testing.assert_allclose(again.vectors(names(600)).colbert, _decoded(backend, stored), atol=1e-6)
    again.upsert(names(300), stored[300:600], langs(300))
    again.optimize()
    assert again.count() == 600
    assert not list(folder.glob("tokenrests-*"))
    again.close()
    few = create(tmp_path / "few", Schema(colbert=DIM), "plaid?bits=4&rest=0")
    few.upsert(names(50), stored[:50], [{}] * 50)
    few.close()
    _name(tmp_path / "few", "plaid?bits=4")
    (tmp_path / "few" / "checksums.json").unlink()
    grown = open_backend(tmp_path / "few")
    grown.upsert(names(600), stored, [{}] * 600)
    assert grown._lists is not None
    assert not list((tmp_path / "few").glob("tokenrests-*"))
    grown.close()


def _name(folder: Path, name: str) -> None:
    schema = json.loads((folder / "schema.json").read_text())
    assert schema["backend"].startswith(name)
    (folder / "schema.json").write_text(json.dumps({**schema, "backend": name}))


def _decoded(backend, stored: Embeddings) -> np.ndarray:
    coder = backend._tokens.coder
    held = coder.decode(coder.encode(stored.colbert.reshape(-1, DIM))).reshape(stored.colbert.shape)
    return held * stored.mask[..., None].astype(np.float32)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
@pytest.mark.parametrize("read_only", [True, False])
def test_a_damaged_file_of_refinements_is_named(damage: str, read_only: bool, tmp_path: Path) -> None:
    filled(tmp_path / "index", 600)[1].close()
    (file,) = (tmp_path / "index").glob("tokenrests-*")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IndexStateError, match="tokenrests-"):
        open_backend(tmp_path / "index", read_only=read_only)
    if damage != "changed":  # which checksums alone tell
        with pytest.raises(IndexStateError, match="tokenrests-"):
            open_backend(tmp_path / "index", verify=False, read_only=read_only)


def test_searches_for_reading_alone_score_by_refinements(tmp_path: Path) -> None:
    _, backend = filled(tmp_path / "index", 600)
    backend.optimize()
    found = [backend.search_tokens(query, 10) for query in queries(10)]
    backend.close()
    readers = [open_backend(tmp_path / "index", read_only=True) for _ in range(2)]
    for reader in readers:
        assert [reader.search_tokens(query, 10) for query in queries(10)] == found
    for reader in readers:
        reader.close()


def test_new_metadata_leaves_the_codes_as_they_are(tmp_path: Path) -> None:
    """Else each change of metadata would move the vectors a little."""
    _, backend = filled(tmp_path / "index", 500, "plaid?bits=4")
    held = backend.vectors(names(500))
    for round in range(3):
        backend.upsert(names(500), backend.vectors(names(500)), [{"round": round}] * 500)
    np.testing.assert_array_equal(backend.vectors(names(500)).colbert, held.colbert)
    assert len(backend.search_tokens(queries(1)[0], 500, {"round": 2})) == 500
    backend.close()


def test_equal_passages_have_equal_scores_in_the_order_of_their_ids(tmp_path: Path) -> None:
    stored, backend = filled(tmp_path / "index", 600)
    same = stored[np.full(9, 5)]
    backend.upsert([f"same{row}" for row in (3, 1, 8, 2, 7, 4, 0, 6, 5)], same, [{}] * 9)
    query = stored.colbert[5][stored.mask[5] == 1]
    hits = backend.search_tokens(query, 10)
    assert [id for id, _ in hits] == ["p5", *(f"same{row}" for row in range(9))]
    assert len({score for _, score in hits}) == 1
    for k in range(1, 10):
        assert backend.search_tokens(query, k) == hits[:k]
    backend.close()


def test_lists_that_were_not_written_are_made_again(tmp_path: Path) -> None:
    _, backend = filled(tmp_path / "index", 600)
    backend.optimize()
    late = passages(30, seed=5)
    backend.upsert([f"late{row}" for row in range(30)], late, [{}] * 30)
    found = [backend.search_tokens(query, 10) for query in queries(10)]
    backend.close()
    again = open_backend(tmp_path / "index")
    assert [again.search_tokens(query, 10) for query in queries(10)] == found
    again.close()
    (coder,) = (tmp_path / "index").glob("coder-*")
    coder.write_bytes(coder.read_bytes()[:-4] + b"\0\0\0\0")
    for verify in (True, False):
        with pytest.raises(IndexStateError, match="coder-"):
            open_backend(tmp_path / "index", verify=verify)


def test_rows_are_written_anew_with_the_codes_that_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEAD_ROWS", 100)
    _, backend = filled(tmp_path / "index", 600)
    kept = names(600)[:150]
    held, hits = backend.vectors(kept), backend.search_tokens(queries(1)[0], 150, {"n": {"lt": 150}})
    backend.delete(names(600)[150:])
    assert len(list((tmp_path / "index").glob("tokenvectors-*"))) == 1
    assert not (tmp_path / "index" / "tokenvectors-2").exists(), "the first table has vectors, the second is coded"
    np.testing.assert_array_equal(backend.vectors(kept).colbert, held.colbert)
    assert backend.search_tokens(queries(1)[0], 200) == hits
    backend.close()


def test_all_deleted_and_others_in_their_place(tmp_path: Path) -> None:
    _, backend = filled(tmp_path / "index", 500)
    backend.delete(names(500))
    backend.optimize()
    assert backend.search_tokens(queries(1)[0], 5) == []
    backend.close()
    again = open_backend(tmp_path / "index")
    few = passages(30, seed=5)
    again.upsert(names(30), few, [{}] * 30)
    assert again.search_tokens(few.colbert[3][few.mask[3] == 1], 1)[0][0] == "p3"
    for start in range(30, 530, 250):
        again.upsert([f"p{row}" for row in range(start, start + 250)], passages(250, seed=start), [{}] * 250)
    assert again._lists is not None
    assert len(again.search_tokens(queries(1)[0], 1000)) == 530
    again.close()


def test_options_are_of_the_engine_and_of_its_folder(tmp_path: Path) -> None:
    for wrong, told in (
        ("plaid?bit=2", "did you mean 'bits'"),
        ("plaid?bits=5", "must be 2 or 3 or 4"),
        ("plaid?rest=4", "must be 8 or 0"),
        ("numpy?bits=2", "has no option"),
        ("plaud", "did you mean 'plaid'"),
    ):
        with pytest.raises(UsageError, match=told):
            create(tmp_path / "wrong", SCHEMA, wrong)
    create(tmp_path / "index", SCHEMA, "plaid?bits=4").close()
    again = open_backend(tmp_path / "index")
    assert (again._bits, again._rest) == (4, 8)
    again.close()
    assert read_schema(tmp_path / "index")[0] == "plaid?bits=4&rest=8", "the name says what made the vectors"


def test_other_heads_agree_after_a_crash(tmp_path: Path) -> None:
    backend = create(tmp_path / "index", SCHEMA, "plaid")
    backend.upsert(names(5), embed(5), langs(5))
    backend.flush()
    one = embed(1)
    backend._heads.upsert(["ahead"], Embeddings(dense=one.dense, sparse=one.sparse), [{}])
    backend._heads.delete(["p0"])
    backend.close()
    (tmp_path / "index" / "checksums.json").unlink()
    again = open_backend(tmp_path / "index")
    assert sorted(again.ids()) == names(5)[1:]
    assert {id for id, _ in again.search_sparse(range(50), np.ones(50), 10)} <= set(names(5)[1:])
    again.close()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_vectors_unlike_all_others_are_coded_as_well(bits: int) -> None:
    """As far off as what the centroids were chosen for, in proportion: their size is kept."""
    rng = np.random.default_rng(0)
    coder = Coder.train(bits, rng.normal(size=(4000, 24)).astype(np.float32) * 0.1)
    for scale in (1.0, 300.0):
        other = (rng.normal(size=(200, 24)) + 5).astype(np.float32) * np.float32(scale)
        off = np.linalg.norm(coder.decode(coder.encode(other)) - other) / np.linalg.norm(other)
        assert off < {2: 0.5, 3: 0.3, 4: 0.14}[bits], scale
    nothing = np.zeros((3, 24), np.float32)
    assert np.isfinite(coder.decode(coder.encode(nothing))).all()
    with pytest.raises(DataError, match="too long"):
        coder.encode(np.full((1, 24), 1e9, np.float32))


@pytest.mark.parametrize("call", range(7))
def test_an_upsert_on_a_full_disk_leaves_no_passage_twice(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls 0 to 2 are the codes, where they end and their refinements, 3 to 5 the files of rows, 6 the run of keys
    that is due."""
    stored, backend = filled(tmp_path / "index", 500)
    held, left, write, replace = backend.vectors(names(500)).colbert, [call], os.pwrite, os.replace

    def is_full() -> bool:
        left[0] -= 1
        return left[0] == -1

    def written(handle: int, content: memoryview, place: int) -> int:
        if is_full():
            write(handle, content[: len(content) // 2], place)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content, place)

    def replaced(source: str, target: str) -> None:
        if is_full():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    change = lambda: backend.upsert(names(200), stored[300:500], langs(200))  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", written)
        patched.setattr(os, "replace", replaced)
        with pytest.raises(ResourceError, match="make room"):
            change()
    for again in (lambda: None, change, backend.close, lambda: None):
        again()
        if again == backend.close:
            backend = open_backend(tmp_path / "index")
        assert sorted(backend.ids()) == sorted(names(500))
        assert len({id for id, _ in backend.search_tokens(queries(1)[0], 600)}) == backend.count() == 500
    np.testing.assert_array_equal(backend.vectors(names(500)[250:]).colbert, held[250:])
    np.testing.assert_allclose(backend.vectors(["p7"]).colbert[0], held[307, : stored.mask[307].sum()], atol=1e-6)
    backend.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.long)])
def test_a_killed_writer_loses_nothing_that_was_acknowledged(rounds: int, tmp_path: Path) -> None:
    kill_while_writing.loses_nothing("tests.retrieve.engines.kill_while_writing_tokens", tmp_path / "index", rounds)
