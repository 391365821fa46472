"""A late encoder: queries without torch, from what an engine left behind; the model itself for everything else."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ultrarag import Encoder
from ultrarag.encoder import LateEncoder, late_encoder
from ultrarag.encoder.engines.setting import VARIABLE
from ultrarag.errors import CheckpointError, DataError
from ultrarag.hookspecs import hookimpl
from ultrarag.plugins import registry
from ultrarag.retrieve import LiveIndex
from ultrarag.testing.tiny import TEXTS, tiny_bert, tiny_m3

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
PASSAGES = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and the engine for all that is loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, "openvino")
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that was loaded by the engine, which left something behind."""
    tiny_bert(tmp_path / "model")
    found = Encoder.load(tmp_path / "model", "bge", device="cpu", query_instruction="find: ").save(tmp_path / "saved")
    Encoder.load(found, device="cpu")
    return found


def begun(folder: Path, load=lambda: pytest.fail("the model was loaded"), fingerprint: str = "") -> LateEncoder | None:
    content = json.loads((folder / "ultrarag.json").read_text())
    return late_encoder(folder, fingerprint or content["fingerprint"], "fp32", load)


SEARCH = """
import sys
from ultrarag.cli import main
status = main(["index", "search", sys.argv[1], sys.argv[2], "--json", "--k", "3"])
assert not {"torch", "transformers"} & set(sys.modules), "torch was imported"
sys.exit(status)
"""


def test_a_search_from_the_shell_finds_the_same_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    query = "a long query " * 200
    with LiveIndex.create(tmp_path / "index", Encoder.load(checkpoint, device="cpu")) as live:
        live.add(PASSAGES)
        expected = live.search(query, k=3)
    words = [sys.executable, "-c", SEARCH, str(tmp_path / "index"), query]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    hits = json.loads(found.stdout)["hits"]
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert np.allclose([hit["score"] for hit in hits], [hit.score for hit in expected], atol=1e-5)
    assert "1 of 1 texts were longer than" in found.stderr


def test_an_index_that_began_late_can_be_written_to(checkpoint: Path, tmp_path: Path) -> None:
    LiveIndex.create(tmp_path / "index", Encoder.load(checkpoint, device="cpu")).close()
    with LiveIndex.open(tmp_path / "index", late=True) as live:
        assert isinstance(live.encoder, LateEncoder)
        assert live.search(TEXTS[0]) == []
        live.add(PASSAGES)
        found = [hit.id for hit in live.search(TEXTS[1])]
        assert live.encoder.loaded().engine == "openvino"
        assert live.encoder.dim == live.encoder.loaded().dim
    with LiveIndex.open(tmp_path / "index") as live:
        assert found == [hit.id for hit in live.search(TEXTS[1])]


def test_the_vectors_are_the_encoders(checkpoint: Path) -> None:
    encoder, late = Encoder.load(checkpoint, device="cpu"), begun(checkpoint)
    assert late is not None
    assert (late.fingerprint, late.heads) == (encoder.fingerprint, ("dense",))
    from ultrarag.encoder import Cuts, LateShared

    texts, cuts = [*TEXTS, "", "Čau 世界 👍🏽", TEXTS[0] * 500], Cuts()
    found = LateShared(late, lambda: 0.0, None).encode(texts, "query", heads=("dense",), cuts=cuts)
    assert np.allclose(found.dense, encoder.encode(texts, "query", progress=False).dense, atol=1e-5)
    assert list(cuts.take().values()) == [(1, len(texts))]


def test_the_model_itself_tells_what_is_wrong_with_a_text(checkpoint: Path, tmp_path: Path) -> None:
    LiveIndex.create(tmp_path / "index", Encoder.load(checkpoint, device="cpu")).close()
    with LiveIndex.open(tmp_path / "index", late=True) as live:
        live.add(PASSAGES)
    with LiveIndex.open(tmp_path / "index", late=True) as live, pytest.raises(DataError, match="lone surrogate"):
        live.search("\ud800")


@pytest.mark.parametrize("name", ["ready.json", "tokenizer.json", "checksums.json"])
def test_what_is_damaged_is_told_of_once_and_made_anew(
    checkpoint: Path, cache: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    next((cache / "ultrarag" / "engines" / "ready").rglob(name)).write_bytes(b"{")
    assert begun(checkpoint) is None
    Encoder.load(checkpoint, device="cpu")
    assert len([record for record in caplog.records if "it is made anew" in record.message]) == 1
    assert begun(checkpoint) is not None


def test_another_format_is_replaced(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultrarag.encoder.engines.ready.FORMAT", 2)
    assert begun(checkpoint) is None
    Encoder.load(checkpoint, device="cpu")
    assert begun(checkpoint) is not None


class _Around:
    @hookimpl(wrapper=True)
    def encode(self, model, features):
        return (yield)


def test_it_does_not_begin_with_what_may_be_anothers(
    checkpoint: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert begun(checkpoint, fingerprint="0" * 64) is None
    monkeypatch.setenv(VARIABLE, "torch")
    assert begun(checkpoint) is None
    monkeypatch.setenv(VARIABLE, "auto")  # no race was run
    assert begun(checkpoint) is None
    monkeypatch.setenv(VARIABLE, "openvino")
    assert begun(checkpoint) is not None
    registry().register(_Around(), "around", "extension")
    try:
        assert begun(checkpoint) is None
    finally:
        registry().unregister("around", "extension")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert begun(checkpoint) is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv(VARIABLE, "openvino")
    tokenizer = next(cache.rglob("tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text().replace("a", "b", 1))
    assert begun(checkpoint) is None
    shutil.rmtree(cache)
    assert begun(checkpoint) is None
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors has 0 bytes"):
        begun(checkpoint)


def test_what_it_cannot_give_is_the_models(tmp_path: Path) -> None:
    tiny_m3(tmp_path / "model")
    encoder = Encoder.load(tmp_path / "model", "bgem3", device="cpu")
    LiveIndex.create(tmp_path / "index", encoder).close()
    with LiveIndex.open(tmp_path / "index", late=True) as live:
        live.add(PASSAGES)
    with LiveIndex.open(tmp_path / "index", late=True) as live:
        late = live.encoder
        assert len(live.search(TEXTS[1], k=1, weights={"dense": 1})) == 1
        assert late.__dict__["_loaded"] is None
        assert len(live.search(TEXTS[1], k=1, weights={"sparse": 1})) == 1
        assert late.__dict__["_loaded"] is not None
