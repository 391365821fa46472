"""Published files: readable by whom the umask says, and a tokenizer as its source had it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest

from ultrarag import Encoder
from ultrarag.encode.processes import ModelChoice, encode_corpus
from ultrarag.finetune import finetune
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.generation.source import Source
from ultrarag.testing.tiny import tiny_bert, tiny_cross_encoder, tiny_decoder, tiny_layerwise, tiny_m3, tiny_splade
from ultrarag.testing.tiny_colbert import tiny_colbert


@contextmanager
def umask(value: int):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> set[str]:
    found = [folder, *folder.rglob("*")]
    return {f"{'d' if path.is_dir() else 'f'}{stat.S_IMODE(path.stat().st_mode):o}" for path in found}


MODES = {0o022: {"d755", "f644"}, 0o027: {"d750", "f640"}}
each_umask = pytest.mark.parametrize("mask", MODES, ids="{:03o}".format)


@each_umask
@pytest.mark.parametrize(
    ("make", "adapter"), [(tiny_m3, "bgem3"), (tiny_layerwise, "bge-reranker-minicpm-layerwise")], ids=["m3", "layers"]
)
def test_a_checkpoint_follows_the_umask(mask, make, adapter, tmp_path):
    """The second writes one file more by safetensors, which makes its files 0600."""
    make(tmp_path / "model")
    with umask(mask):
        saved = Encoder.load(tmp_path / "model", adapter, device="cpu").save(tmp_path / "saved")
    assert modes(saved) == MODES[mask]


@each_umask
def test_an_encoded_corpus_follows_the_umask(mask, tiny_m3, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "1", "text": "bread"}\n')
    with umask(mask):
        encode_corpus(ModelChoice(tiny_m3, "bgem3"), corpus, tmp_path / "encoded", progress=False)
    assert modes(tmp_path / "encoded") == MODES[mask]


@each_umask
def test_an_indexes_copies_of_checkpoints_follow_the_umask(mask, m3_encoder, tmp_path):
    """That of a loaded encoder, and that of a checkpoint whose files only their owner may read."""
    with umask(0o077):
        private = m3_encoder.save(tmp_path / "private")
    with umask(mask):
        LiveIndex.create(tmp_path / "kb", m3_encoder, backend="numpy").close()
        Source(private).save(tmp_path / "copy")
    assert modes(tmp_path / "kb" / "generations" / "1" / "checkpoint") == MODES[mask]
    assert modes(tmp_path / "copy") == MODES[mask]


TRUNCATION = {"direction": "Left", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": "BatchLongest",
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


@pytest.mark.parametrize("truncation", [None, TRUNCATION], ids=["whole", "cut"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["ragged", "padded"])
@pytest.mark.parametrize(
    ("make", "adapter"),
    [
        (tiny_m3, "bgem3"),
        (tiny_bert, "sentence-transformers"),
        (tiny_decoder, "icl"),
        (tiny_cross_encoder, "bge-reranker"),
        (tiny_layerwise, "bge-reranker-minicpm-layerwise"),
    ],
    ids=["bgem3", "library", "icl", "reranker", "layers"],
)
def test_use_changes_no_limit_in_the_tokenizers_file(make, adapter, truncation, padding, tmp_path):
    """Truncation, padding, and its side, which other tools go by, are those of the source after use and save."""
    source = tmp_path / "model"
    make(source)
    values = {**json.loads((source / "tokenizer.json").read_text()), "truncation": truncation, "padding": padding}
    (source / "tokenizer.json").write_text(json.dumps(values))
    encoder = Encoder.load(source, adapter, device="cpu")
    side = encoder.tokenizer.padding_side
    if encoder.adapter.declared.pair_input:
        encoder.score([("why does bread rise", "steam " * 9)], max_length=100)
    else:
        encoder.encode(["why does bread rise", "steam"], max_length=4)
    saved = encoder.save(tmp_path / "saved")
    written = json.loads((saved / "tokenizer.json").read_text())
    assert written["truncation"] == truncation
    assert written["padding"] == padding
    assert Encoder.load(saved, device="cpu").tokenizer.padding_side == side
    shutil.rmtree(saved)


@pytest.mark.parametrize(
    ("make", "adapter"),
    [
        (tiny_bert, "bge"),
        (tiny_splade, "sentence-transformers"),
        (tiny_m3, "bgem3"),
        (tiny_colbert, "colbert"),
        (tiny_cross_encoder, "bge-reranker"),
    ],
    ids=["bge", "splade", "bgem3", "colbert", "reranker"],
)
def test_a_fine_tune_changes_no_limit_in_the_tokenizers_file(make, adapter, tmp_path):
    """The check of the rows counts tokens without a limit."""
    (source := tmp_path / "model").mkdir()
    make(source)
    values = {**json.loads((source / "tokenizer.json").read_text()), "truncation": TRUNCATION, "padding": PADDING}
    (source / "tokenizer.json").write_text(json.dumps(values))
    rows = [{"query": f"question {n}", "pos": [f"answer {n}"], "neg": [f"something {n + 3}"]} for n in range(8)]
    flags = {"max_steps": 1, "learning_rate": 1e-2, "train_group_size": 2, "report_to": "none", "use_cpu": True}
    lengths = {"query_max_len": 16, "passage_max_len": 32}
    result = finetune(source, rows, tmp_path / "out", adapter=adapter, **flags, **lengths)
    written = json.loads((Path(result.checkpoint) / "tokenizer.json").read_text())
    assert written["truncation"] == TRUNCATION
    assert written["padding"] == PADDING
