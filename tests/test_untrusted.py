"""Model folders from elsewhere: what points outside, would run code, or asks for an impossible model is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ultrarag import Encoder
from ultrarag.checkpoint import read_manifest
from ultrarag.errors import CheckpointError
from ultrarag.finetune import finetune
from ultrarag.retrieve.generation.source import Source
from ultrarag.testing.tiny import tiny_bert, tiny_masked_lm

OUTSIDE = ["../secret.json", "a/../../secret.json", "{folder}/../secret.json", "..\\secret.json", "C:\\secret.json"]


@pytest.fixture
def saved(m3_encoder, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    return m3_encoder.save(tmp_path / "saved")


@pytest.fixture
def bert(tmp_path):
    tiny_bert(tmp_path / "bert")
    return tmp_path / "bert"


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# ---- names that lead out


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_only_files_of_its_folder(saved, name, tmp_path):
    edit(saved / "ultrarag.json", lambda v: v["files"].update({name.format(folder=saved): {"size": 2, "sha256": "0"}}))
    for read in (read_manifest, Encoder.load, Source):
        with pytest.raises(CheckpointError, match=r"ultrarag\.json names '.*secret\.json', which is no file of it"):
            read(saved)
    assert not list(tmp_path.parent.glob("*secret*"))


@pytest.mark.parametrize("link", ["/etc/hostname", "../secret.json"])
def test_a_listed_link_does_not_lead_out(saved, link):
    (saved / "linked.json").symlink_to(link)
    size = os.path.getsize(saved / "linked.json")
    edit(saved / "ultrarag.json", lambda v: v["files"].update({"linked.json": {"size": size, "sha256": "0"}}))
    with pytest.raises(CheckpointError, match=r"linked\.json is a link to .*, outside of the model's folder"):
        read_manifest(saved)


def test_links_inside_and_those_of_the_hubs_cache_are_followed(saved, tmp_path):
    """A folder that is itself a link, a link within it, and the cache's snapshots of links to blobs."""
    (saved / "config.json").rename(saved / "real.json")
    (saved / "config.json").symlink_to("real.json")
    (tmp_path / "elsewhere").symlink_to(saved, target_is_directory=True)
    assert read_manifest(tmp_path / "elsewhere").adapter == "bgem3"
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    shutil.copytree(saved, snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert Encoder.load(snapshot).heads == ("dense", "sparse", "colbert")


@pytest.mark.parametrize("adapter", ["bge", "sentence-transformers", "icl"])
@pytest.mark.parametrize("name", [*OUTSIDE, "linked"])
def test_modules_lie_in_the_models_folder(bert, adapter, name, tmp_path):
    shutil.copytree(bert, tmp_path / "secret.json")  # a folder that would load
    if name == "linked":
        (bert / "linked").symlink_to(tmp_path / "secret.json", target_is_directory=True)
    edit(bert / "modules.json", lambda rows: rows[0].update(path=name.format(folder=bert)))
    with pytest.raises(CheckpointError, match=r"modules\.json names|linked is a link to"):
        Encoder.load(bert, adapter)


@pytest.mark.parametrize("name", OUTSIDE)
def test_weight_files_lie_in_the_models_folder(bert, name, tmp_path):
    names = list(load_file(bert / "model.safetensors"))
    (bert / "model.safetensors").rename(tmp_path / "secret.json")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name.format(folder=bert))}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json names '"):
        Encoder.load(bert, "bge")


# ---- files that would run code


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))


def evil(path):
    torch.save({"weight": Evil()}, path)


@pytest.mark.parametrize("write", [evil, plain_pickle])
@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt", "pytorch_model.bin"])
def test_pickles_with_more_than_tensors_are_refused_in_our_words(tiny_m3, tmp_path, capfd, name, write):
    folder = shutil.copytree(tiny_m3, tmp_path / "model")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    write(folder / name)
    with pytest.raises(CheckpointError, match="holds Python objects besides tensors") as raised:
        Encoder.load(folder, "bgem3")
    assert name in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert raised.value.__suppress_context__
    assert "never be printed" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_the_state_of_a_stopped_run_is_refused_in_our_words(tmp_path, name):
    old = Path(__file__).parent / "fixtures" / "dee4ec6"
    options = json.loads((old / "expected.json").read_text(encoding="utf-8"))["options"]
    training = shutil.copytree(old / "training", tmp_path / "training")
    evil(training / "checkpoint-2" / name)
    options["training"] |= {"num_train_epochs": 2, "save_steps": 2, "allow_seen_data": True}
    with pytest.raises(CheckpointError, match=rf"{name}.* holds Python objects besides tensors"):
        finetune(old / "checkpoint", options["rows"], training, resume_from_checkpoint=True, **options["training"])


# ---- sizes that no file can have


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size", "max_position_embeddings"])
def test_sizes_that_the_weights_cannot_have_are_refused_at_once(bert, name, kind):
    if kind == "bin":
        torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
        (bert / "model.safetensors").unlink()
    edit(bert / "config.json", lambda values: values.update({name: 10**8}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {name} is 100,000,000, and the weights beside it hold"):
        Encoder.load(bert, "bge")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", -1), ("num_attention_heads", 0), ("hidden_size", 0), ("vocab_size", -5)],
)
def test_sizes_that_no_model_has_are_refused(bert, name, value):
    edit(bert / "config.json", lambda values: values.update({name: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {name} is {value}, which no model has"):
        Encoder.load(bert, "bge")


def test_sizes_inside_a_configuration_and_in_a_modules_folder_are_looked_at(bert):
    (bert / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (bert / name).rename(bert / "0_Transformer" / name)
    edit(bert / "modules.json", lambda rows: rows[0].update(path="0_Transformer"))
    assert Encoder.load(bert, "bge").dim == 32
    edit(bert / "0_Transformer" / "config.json", lambda v: v.update(text_config={"num_hidden_layers": 10**8}))
    with pytest.raises(CheckpointError, match=r"0_Transformer/config\.json: num_hidden_layers is 100,000,000"):
        Encoder.load(bert, "sentence-transformers")


def test_a_folder_without_modules_is_looked_at_too(tmp_path):
    tiny_masked_lm(tmp_path / "model")
    edit(tmp_path / "model" / "config.json", lambda values: values.update(num_hidden_layers=10**8))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 100,000,000"):
        Encoder.load(tmp_path / "model", "bge")
