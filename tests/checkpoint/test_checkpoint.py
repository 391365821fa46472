"""Checkpoints: identity by content, nothing half-written, and every tool loads them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import forked
from ultrarag import Encoder, hookimpl
from ultrarag.adapters.embedders import BGEM3Adapter
from ultrarag.checkpoint.manifest import changed_files, read_manifest
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.io.durable import publish_directory, remove_stale_stages, staged_directory
from ultrarag.plugins import registry

TEXTS = ["Why does bread need a hot oven?", "怎样防止自行车链条生锈？", "seals " * 20]


@pytest.fixture
def saved(m3_encoder, tmp_path):
    return m3_encoder.save(tmp_path / "saved")


def test_round_trip_gives_the_same_vectors_and_identity(m3_encoder, saved):
    again = Encoder.load(saved)  # no adapter named: the manifest knows it
    ours, theirs = m3_encoder.encode(TEXTS), again.encode(TEXTS)
    assert again.adapter.name == "bgem3"
    assert again.fingerprint == m3_encoder.fingerprint == again.manifest.fingerprint
    for mine, other in zip(ours.arrays(), theirs.arrays(), strict=True):
        assert np.abs(mine - other).max() < 1e-6


def test_identity_is_content_not_name(saved, tmp_path):
    moved = saved.rename(tmp_path / "another name")
    (moved / "config.json").write_text(json.dumps({**json.loads((moved / "config.json").read_text()), "_name": "x"}))
    manifest = json.loads((moved / "ultrarag.json").read_text())
    manifest["files"].pop("config.json")
    (moved / "ultrarag.json").write_text(json.dumps(manifest))
    assert Encoder.load(moved).fingerprint == manifest["fingerprint"]


def test_one_changed_weight_is_another_model(saved, caplog):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-6
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    changed = Encoder.load(saved)
    assert changed.fingerprint != changed.manifest.fingerprint
    assert "changed since its manifest was written" in caplog.text
    assert changed_files(saved, changed.manifest) == ["model.safetensors"]


@pytest.mark.parametrize(
    "setting", [{"query_instruction": "find: "}, {"passage_max_length": 17}, {"passage_format": "{}\n{}"}]
)
def test_settings_are_part_of_the_identity(tiny_m3, m3_encoder, setting):
    assert Encoder.load(tiny_m3, adapter="bgem3", **setting).fingerprint != m3_encoder.fingerprint


def test_a_setting_of_a_later_release_changes_no_identity_while_it_is_unset(m3_encoder):
    """Only what differs from the default is hashed."""
    from ultrarag.checkpoint.manifest import _declared

    assert "query_format" not in _declared(m3_encoder.settings)
    assert _declared(m3_encoder.settings)["pooling"] == "cls"


def test_identity_ignores_earlier_calls(m3_encoder):
    before = m3_encoder.fingerprint
    m3_encoder.encode(TEXTS, max_length=8)  # sets truncation and padding inside the tokenizer
    del m3_encoder.fingerprint
    assert m3_encoder.fingerprint == before


def test_settings_survive(tiny_m3, tmp_path):
    encoder = Encoder.load(tiny_m3, adapter="bgem3", query_instruction="find: ", passage_max_length=40)
    again = Encoder.load(encoder.save(tmp_path / "x"))
    assert again.settings == encoder.settings


def test_sentence_transformers_gives_the_same_dense_vectors(m3_encoder, saved):
    """m3 pools CLS; without modules.json sentence-transformers would take the mean."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(saved), device="cpu").encode(TEXTS)
    assert np.abs(theirs - m3_encoder.encode(TEXTS).dense).max() < 1e-5


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token", "weighted_mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_agrees_for_every_pooling(tiny_m3, tmp_path, pooling, normalize):
    from sentence_transformers import SentenceTransformer

    from ultrarag.hookspecs import LoadOptions

    options = LoadOptions(pooling=pooling, normalize=normalize)
    encoder = Encoder.load(tiny_m3, adapter="bge", options=options, query_instruction="find: ")
    path = encoder.save(tmp_path / "x")
    theirs = SentenceTransformer(str(path), device="cpu")
    assert np.abs(theirs.encode(TEXTS) - encoder.encode(TEXTS).dense).max() < 1e-5
    queries = theirs.encode(TEXTS, prompt_name="query")
    assert np.abs(queries - encoder.encode(TEXTS, "query").dense).max() < 1e-5
    assert Encoder.load(path).fingerprint == encoder.fingerprint


def test_dense_projection_of_sentence_transformers(minilm, tmp_path):
    """A model whose modules.json has a Dense layer: read, encoded, saved and read again alike."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    body = Transformer(minilm)
    modules = [body, Pooling(384, "mean"), Dense(384, 32), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "theirs"))
    theirs = SentenceTransformer(str(tmp_path / "theirs"), device="cpu").encode(TEXTS)
    encoder = Encoder.load(tmp_path / "theirs", adapter="bge")
    assert np.abs(encoder.encode(TEXTS).dense - theirs).max() < 1e-6
    encoder.save(tmp_path / "ours")
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu").encode(TEXTS)
    assert np.abs(again - theirs).max() < 1e-6


def test_unsupported_module_is_named(minilm, tmp_path):
    folder = shutil.copytree(minilm, tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_CNN", "type": "sentence_transformers.models.CNN"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UsageError, match=r"models.CNN' is not one .* adapter 'sentence-transformers'"):
        Encoder.load(folder, adapter="bge")


def test_damaged_files_are_named(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors has \d+ bytes, not \d+: it is damaged"):
        Encoder.load(saved)
    path.write_bytes(content)
    (saved / "sparse_linear.pt").unlink()
    with pytest.raises(CheckpointError, match=r"sparse_linear.pt is missing: the checkpoint is incomplete"):
        Encoder.load(saved)
    (saved / "ultrarag.json").write_text("{ half")
    with pytest.raises(CheckpointError, match=r"ultrarag.json cannot be read: JSONDecodeError"):
        Encoder.load(saved)


def test_manifest_of_a_newer_format_is_refused(saved):
    values = json.loads((saved / "ultrarag.json").read_text())
    (saved / "ultrarag.json").write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(CheckpointError, match="written by a newer ultrarag"):
        read_manifest(saved)


class LosesTheSparseHead(BGEM3Adapter):
    @hookimpl
    def save(self, model, path, state_dict):
        bent = dict(state_dict)
        bent["sparse_linear.bias"] = bent["sparse_linear.bias"] + 1
        super().save(model, path, bent)


def test_a_save_hook_that_loses_something_publishes_nothing(tiny_m3, tmp_path):
    registry().register(LosesTheSparseHead(), "lossy")
    try:
        encoder = Encoder.load(tiny_m3, adapter="lossy")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("old")
        with pytest.raises(
            CheckpointError, match=r"head 'sparse' differs by .*hooks 'save' and 'load' of adapter 'lossy'"
        ):
            encoder.save(tmp_path / "out")
    finally:
        registry().unregister("lossy")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_the_whole_directory_in_one_step(m3_encoder, saved):
    (saved / "stale.bin").write_text("of the old model")
    m3_encoder.save(saved)
    assert not (saved / "stale.bin").exists()
    assert Encoder.load(saved).heads == m3_encoder.heads


def test_readers_never_see_a_half_written_checkpoint(m3_encoder, tmp_path):
    """Save over and over in a process that is killed at random moments; what is there always loads whole."""
    target = tmp_path / "checkpoint"
    m3_encoder.save(target)
    code = """
        import sys
        from ultrarag import Encoder
        encoder = Encoder.load(sys.argv[1])
        print("ready", flush=True)
        while True:
            encoder.save(sys.argv[1])
    """
    for wait in (0.0, 0.05, 0.17):
        process = forked.Popen(["-c", textwrap.dedent(code), str(target)])
        assert process.stdout.readline() == "ready\n"
        try:
            process.wait(0.15 + wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        found = Encoder.load(target)
        assert changed_files(target, found.manifest) == []
        assert found.fingerprint == m3_encoder.fingerprint
    m3_encoder.save(target)  # sweeps up what the killed processes left
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_publish_keeps_what_it_is_told_to(tmp_path):
    target = tmp_path / "run"
    (target / "checkpoint-5").mkdir(parents=True)
    (target / "checkpoint-5" / "state").write_text("kept")
    (target / "old.txt").write_text("dropped")
    with staged_directory(target) as stage:
        (stage / "model").write_text("new")
        publish_directory(stage, target, keep=lambda name: name.startswith("checkpoint-"))
    assert sorted(path.name for path in target.iterdir()) == ["checkpoint-5", "model"]
    assert (target / "checkpoint-5" / "state").read_text() == "kept"


def test_stages_of_living_processes_are_left_alone(tmp_path):
    mine = tmp_path / f".x.{os.getpid()}.tmp"
    dead = tmp_path / ".x.999999999.tmp"
    mine.mkdir()
    dead.mkdir()
    remove_stale_stages(tmp_path, "x")
    assert mine.exists()
    assert not dead.exists()


def test_saved_model_card_says_how_to_use_it(saved):
    card = (saved / "README.md").read_text()
    assert "Encoder.load(path)" in card
    assert read_manifest(saved).fingerprint in card


@pytest.mark.skipif(not os.environ.get("ULTRARAG_PEER_PYTHON"), reason="set ULTRARAG_PEER_PYTHON to the peer's python")
def test_peer_gives_the_same_vectors_for_all_three_heads(m3_encoder, saved, tmp_path):
    """FlagEmbedding's BGEM3FlagModel, in its own environment (benchmarks/peer/README.md makes it)."""
    script = Path(__file__).parents[2] / "benchmarks" / "peer" / "load_checkpoint.py"
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    command = [os.environ["ULTRARAG_PEER_PYTHON"], str(script), str(saved), str(tmp_path / "texts.json")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([*command, str(tmp_path / "out.npz")], check=True, env=environment, capture_output=True)
    ours = m3_encoder.encode(TEXTS)
    with np.load(tmp_path / "out.npz") as theirs:
        assert np.abs(theirs["dense"] - ours.dense).max() < 1e-5
        for row, weights in enumerate(ours.sparse.to_dicts()):
            peer = dict(
                zip(theirs[f"sparse/{row}/ids"].tolist(), theirs[f"sparse/{row}/weights"].tolist(), strict=True)
            )
            assert peer == pytest.approx(weights, abs=1e-5)
            tokens = int(ours.mask[row].sum())
            assert np.abs(theirs[f"colbert/{row}"] - ours.colbert[row, :tokens]).max() < 1e-5


def test_weights_are_safetensors_and_heads_load_without_pickle(saved):
    assert (saved / "model.safetensors").is_file()
    for name in ("colbert_linear.pt", "sparse_linear.pt"):
        assert set(torch.load(saved / name, weights_only=True)) == {"weight", "bias"}
