"""A passage that cannot be encoded stops nothing: it is kept, listed, left out of the vectors, and can be cured."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from tests.retrieve.conftest import POISON
from ultrarag import Encoder, Passage
from ultrarag.cli import main
from ultrarag.encode.blocks import PROBES, encode_apart
from ultrarag.errors import GateError
from ultrarag.retrieve import LiveIndex
from ultrarag.types import Embeddings

pytestmark = pytest.mark.usefixtures("quick_builds")

TEXTS = {"a": "a river of stone", "b": f"the {POISON} harbour", "c": "clouds and marble"}


def passages(*texts):
    return [Passage(str(n), text) for n, text in enumerate(texts)]


def vectors(texts):
    return Embeddings(dense=np.array([[float(len(text)), 1.0] for text in texts], np.float32))


def raising(error):
    def encode(texts):
        if any(POISON in text for text in texts):
            raise error
        return vectors(texts)

    return encode


def not_finite(texts):
    found = vectors(texts)
    found.dense[[POISON in text for text in texts], 0] = np.nan
    return found


@pytest.mark.parametrize(
    "encode",
    [
        raising(ValueError("a plugin's own")),
        raising(IndexError("index out of range in self")),
        raising(MemoryError("no memory")),
        raising(RuntimeError("overflow")),
        not_finite,
    ],
)
@pytest.mark.parametrize("texts", [(POISON,), ("x", POISON), (POISON, "x", "yy", POISON), ("x", "yy", "zzz", POISON)])
def test_the_others_are_encoded(encode, texts):
    found = encode_apart(passages(*texts), encode)
    sound = [n for n, text in enumerate(texts) if text != POISON]
    assert [p.id for p in found.passages] == [str(n) for n in sound]
    assert set(found.failed) == {str(n) for n, text in enumerate(texts) if text == POISON}
    if sound:
        assert found.embeddings.dense[:, 0].tolist() == [len(texts[n]) for n in sound]
    else:
        assert found.embeddings is None


def test_an_encoder_that_can_encode_nothing_is_at_fault_itself():
    asked = []

    def broken(texts):
        asked.append(texts)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        encode_apart(passages(*"abcdefghijklmnop"), broken)
    assert len(asked) <= 5 + len(PROBES)  # the halves down to one passage, and the probes
    with pytest.raises(ValueError, match="whatever the text"):
        encode_apart(passages("x"), lambda texts: Embeddings(dense=np.full((len(texts), 2), np.inf, np.float32)))


def test_ctrl_c_is_no_failure():
    with pytest.raises(KeyboardInterrupt):
        encode_apart(passages(POISON), raising(KeyboardInterrupt()))


@pytest.fixture(params=["numpy", "qdrant-edge"])
def kb(request, poisoned, tmp_path):
    with LiveIndex.create(tmp_path / "kb", Encoder.load(poisoned / "first"), backend=request.param) as live:
        live.add([Passage(id, text) for id, text in TEXTS.items()])
    return tmp_path / "kb"


def test_the_journey_of_an_index_with_such_a_passage(kb, poisoned, caplog):
    caplog.set_level(logging.WARNING, "ultrarag")
    with LiveIndex.open(kb) as live:
        assert len(live) == 3
        assert live.status()["live"]["unencoded"] == {"b": "its vector is not finite"}
        assert {hit.id for hit in live.search("river", k=3, heads=["dense"])} == {"a", "c"}
        assert live.search(POISON, k=3, heads=["bm25"])[0].id == "b"
        assert {hit.id for hit in live.search("river", k=3, heads=["colbert"])} <= {"a", "c"}
        live.add([{"id": "d", "text": "copper lanterns"}, {"id": "b", "text": TEXTS["b"], "metadata": {"n": 1}}])
        new = live.build(poisoned / "second", progress=False)
        assert live.status()["generations"][-1]["unencoded"] == {"b": "its vector is not finite"}
        live.swap(new)
        live.delete(["a"])
        live.rollback()
        assert live.get("b").metadata == {"n": 1}
        assert live.retry() == {"b": "its vector is not finite"}
    with LiveIndex.open(kb, repair=True) as live:
        assert {hit.id for hit in live.search("river", k=9, heads=["dense"])} == {"c", "d"}
        live.swap(live.build(poisoned / "sound", progress=False))  # a model that can encode it
        assert live.status()["live"]["unencoded"] == {}
        assert "b" in {hit.id for hit in live.search("river", k=9, heads=["dense"])}


@pytest.mark.parametrize(
    "cure", [lambda live: live.add([{"id": "b", "text": "well"}]), lambda live: live.delete(["b"])]
)
def test_a_change_or_a_delete_cures_it(kb, cure):
    with LiveIndex.open(kb) as live:
        cure(live)
        assert live.status()["live"]["unencoded"] == {}
    with LiveIndex.open(kb) as live:
        assert live._core.live.backend.count() == len(live)


def test_a_new_text_that_cannot_be_encoded_leaves_no_old_vector(kb):
    with LiveIndex.open(kb) as live:
        live.add([{"id": "a", "text": POISON}])
        assert set(live.status()["live"]["unencoded"]) == {"a", "b"}
        assert [hit.id for hit in live.search("river", k=3, heads=["dense"])] == ["c"]


def test_a_retry_that_was_killed_before_it_was_noted(kb, poisoned):
    """What it stored is in the vectors and on the list."""
    with LiveIndex.open(kb) as live:
        backend = live._core.live.backend
        backend.upsert(["b"], backend.vectors(["a"]), [{}])
        backend.flush()
    with LiveIndex.open(kb) as live:
        assert live.status()["live"]["unencoded"] == {}


def test_a_model_that_fails_on_many_passages_does_not_go_live_unseen(tmp_path, poisoned):
    with LiveIndex.create(tmp_path / "kb", Encoder.load(poisoned / "sound"), backend="numpy") as live:
        live.add([Passage(id, text) for id, text in TEXTS.items()])
        new = live.build(poisoned / "first", progress=False)
        with pytest.raises(GateError, match=r"no vectors of 1 passages out of 3 .* 'b'"):
            live.swap(new)
        assert live.swap(new, force=True).new.forced


@pytest.mark.parametrize("written", [{"b"}, {"b", "e"}, {"a", "b", "c"}])
def test_a_rollback_is_not_stopped_by_what_was_written_since(tmp_path, poisoned, caplog, written):
    """It is the way out of a generation that does harm, and takes no `force`."""
    with LiveIndex.create(tmp_path / "kb", Encoder.load(poisoned / "first"), backend="numpy") as live:
        live.add([Passage(id, TEXTS[id]) for id in "ac"])
        live.swap(live.build(poisoned / "sound", progress=False))
        live.add([Passage(id, f"{id} {POISON}") for id in sorted(written)])
        assert live.status()["live"]["unencoded"] == {}
        live.rollback()
        assert set(live.status()["live"]["unencoded"]) == written
        assert f"generation 1 has no vectors of {len(written)} passages" in caplog.text
        live.add([Passage("d", "copper lanterns")])
    with LiveIndex.open(tmp_path / "kb") as live:
        left = {"a", "c", "d"} - written
        assert {hit.id for hit in live.search("river", k=9, heads=["dense"])} == left
        live.rollback()
        assert live.status()["live"]["unencoded"] == {}
        assert {hit.id for hit in live.search("river", k=9, heads=["dense"])} == left | written


def test_the_commands_show_it(kb, capsys):
    assert main(["index", "status", str(kb)]) == 0
    assert "1 passages cannot be encoded" in capsys.readouterr().out
    assert main(["index", "retry", str(kb)]) == 0
    assert "0 passages encoded\n1 passages cannot be encoded" in capsys.readouterr().out
