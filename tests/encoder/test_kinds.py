"""What a hook is told of the kind of its texts: right wherever texts are encoded."""

from __future__ import annotations

import json

import pytest

from ultrarag import Encoder, hookimpl
from ultrarag.checkpoint import probe_vectors
from ultrarag.finetune import finetune
from ultrarag.plugins import registry
from ultrarag.retrieve import LiveIndex, mine
from ultrarag.testing import tiny

ROWS = [{"query": f"seals {i}", "pos": [f"brown fox {i}"], "neg": [f"brown dog {i}"]} for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.tiny_bert(folder)
    return str(folder)


@pytest.fixture
def heard():
    """Pairs of what a hook was told and the text's first letter, of every batch that is encoded."""
    found = set()

    class Listener:
        @hookimpl(wrapper=True)
        def encode(self, model, features):
            for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
                text = model.tokenizer.decode(ids[mask > 0], skip_special_tokens=True)
                found.add((features.get("kind"), text[:1]))
            return (yield)

    registry().register(Listener(), "listener", kind="extension")
    yield found
    registry().unregister("listener", kind="extension")


def run(model, tmp_path, rows, **more):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"learning_rate": 1e-2, "max_steps": 2, "train_group_size": 2, "passage_max_len": 32}
    options |= {"query_max_len": 32, "use_cpu": True, "report_to": "none", "adapter": "bge", **more}
    return finetune(model, str(path), str(tmp_path / "out"), **options)


@pytest.mark.parametrize("more", [{}, {"sub_batch_size": 2}], ids=["plain", "gradcache"])
def test_training(model, tmp_path, heard, more):
    run(model, tmp_path, ROWS, per_device_train_batch_size=4, **more)
    words = {pair for pair in heard if pair[1] in ("s", "b")}
    assert words == {("query", "s"), ("passage", "b")}
    assert {kind for kind, _ in heard} == {"query", "passage"}  # the probes of publishing, too


def test_a_symmetric_task_is_of_neither_side(model, tmp_path, heard):
    rows = [{**row, "type": "symmetric_sts"} for row in ROWS]
    run(model, tmp_path, rows, per_device_train_batch_size=4)
    assert {pair for pair in heard if pair[1] in ("s", "b")} == {("text", "s"), ("text", "b")}


def test_encoding_scoring_mining_and_searching(model, tmp_path, heard):
    encoder = Encoder.load(model, "bge", device="cpu")
    encoder.encode(["seals sleep"], "query")
    encoder.encode(["brown fox"], "text")
    assert heard == {("query", "s"), ("text", "b")}
    heard.clear()
    encoder.score([("seals", "b")])
    mine(ROWS, encoder, range=(0, 4), negatives=1)
    with LiveIndex.create(tmp_path / "kb", encoder, backend="numpy", bm25=False) as live:
        live.add([{"id": "1", "text": "brown fox"}])
        live.search("seals sleep")
    assert {pair for pair in heard if pair[1] in ("s", "b")} == {("query", "s"), ("passage", "b")}
    heard.clear()
    probe_vectors(encoder)
    assert {kind for kind, _ in heard} == {"query", "passage"}
