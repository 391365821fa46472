"""Engines: the same vectors as torch's for every head, or torch; made once, and never of weights that have changed."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ultrarag import Encoder
from ultrarag.encoder import engines
from ultrarag.encoder.engines import choice, files
from ultrarag.encoder.engines.setting import VARIABLE
from ultrarag.encoder.tokens import tokenized_chunks
from ultrarag.errors import UsageError
from ultrarag.hookspecs import LoadOptions, hookimpl
from ultrarag.plugins import registry
from ultrarag.testing.tiny import (
    TEXTS,
    tiny_bert,
    tiny_cross_encoder,
    tiny_decoder,
    tiny_layerwise,
    tiny_m3,
    tiny_minicpm,
    tiny_static,
)
from ultrarag.types import Tokens

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
MODELS = [
    ("bge", tiny_bert),
    ("bgem3", tiny_m3),
    ("icl", tiny_decoder),
    ("minicpm-embedding", tiny_minicpm),
    ("bge-reranker", tiny_cross_encoder),
    ("bge-reranker-minicpm-layerwise", tiny_layerwise),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_told", set())
    return tmp_path / "cache"


@pytest.fixture
def bert(tmp_path) -> Path:
    tiny_bert(tmp_path / "bert")
    return tmp_path / "bert"


def load(folder: Path, adapter: str = "bge", engine: str | None = "openvino", **more) -> Encoder:
    return Encoder.load(folder, adapter, device="cpu", engine=engine, **more)


@needs_openvino
@pytest.mark.parametrize(("adapter", "make"), MODELS, ids=[name for name, _ in MODELS])
def test_every_head_is_as_torch_computes_it(adapter, make, tmp_path):
    make(tmp_path / "model")
    plain, fast = load(tmp_path / "model", adapter, "torch"), load(tmp_path / "model", adapter)
    assert (plain.engine, fast.engine) == ("torch", "openvino")
    texts = [*TEXTS, TEXTS[0] * 3, "a"]
    if plain.adapter.declared.pair_input:
        pairs = [(TEXTS[0], text) for text in texts]
        assert np.allclose(plain.score(pairs), fast.score(pairs), atol=1e-4)
        return
    one, other = (encoder.encode(texts, "query", progress=False) for encoder in (plain, fast))
    assert np.allclose(one.dense, other.dense, atol=1e-5)
    if one.sparse is not None:
        assert np.array_equal(one.sparse.ids, other.sparse.ids)
        assert np.allclose(one.sparse.weights, other.sparse.weights, atol=1e-4)
    if one.colbert is not None:
        assert np.array_equal(one.mask, other.mask)
        assert np.allclose(one.colbert, other.colbert, atol=1e-4)


@needs_openvino
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token", "weighted_mean"])
def test_queries_have_dense_vectors_in_one_piece(pooling, tmp_path):
    """By the compiled head: alone and together, in any thread."""
    tiny_bert(tmp_path / "model")
    options = LoadOptions(pooling=pooling)
    plain, fast = (load(tmp_path / "model", engine=name, options=options) for name in ("torch", "openvino"))
    texts = [*TEXTS, TEXTS[0] * 3, "a"]
    assert fast._dense("query", ("dense",), None)
    expected = plain.encode(texts, "query", progress=False).dense
    assert np.allclose(expected, fast.encode(texts, "query", progress=False).dense, atol=1e-5)
    for place in (*range(len(texts)), *reversed(range(len(texts)))):
        assert np.allclose(expected[place], fast.encode(texts[place], "query").dense, atol=1e-5)
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: fast.encode(texts[n], "query")})) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.allclose(expected[n], found[n].dense, atol=1e-5) for n in (0, 1))


@needs_openvino
def test_a_query_of_a_model_of_several_heads_may_be_dense_alone(tmp_path):
    tiny_m3(tmp_path / "model")
    plain, fast = load(tmp_path / "model", "bgem3", "torch"), load(tmp_path / "model", "bgem3")
    assert fast._dense("query", ("dense",), None)
    one, other = (encoder.encode(TEXTS[0], "query", heads=["dense"]) for encoder in (plain, fast))
    assert other.heads == ("dense",)
    assert np.allclose(one.dense, other.dense, atol=1e-5)


class _Doubling:
    """An extension that is around every encode."""

    @hookimpl(wrapper=True)
    def encode(self, model, features):
        found = yield
        found.dense = found.dense * 2
        return found


@needs_openvino
def test_who_changes_what_a_head_was_compiled_for_has_the_adapters_own(bert):
    encoder, plain = load(bert), load(bert, engine="torch")
    whole = encoder.encode(TEXTS[0], "query").dense
    for each in (encoder, plain):
        each.settings.truncate_dim = 8
    assert encoder.encode(TEXTS[0], "query").dense.shape == (1, 8)
    assert np.allclose(*(each.encode(TEXTS[0], "query").dense for each in (encoder, plain)), atol=1e-5)
    encoder.settings.truncate_dim = None
    registry().register(_Doubling(), "doubling", "extension")
    try:
        assert np.allclose(encoder.encode(TEXTS[0], "query").dense, 2 * whole, atol=1e-5)
    finally:
        registry().unregister("doubling", "extension")
    assert np.allclose(encoder.encode(TEXTS[0], "query").dense, whole, atol=1e-5)


@needs_openvino
def test_padding_on_the_left_counts_from_the_first_token(tmp_path):
    """The compiled backbone has its rows padded on the right, whatever the tokenizer says."""
    tiny_bert(tmp_path / "model")
    plain, fast = load(tmp_path / "model", engine="torch"), load(tmp_path / "model")
    for encoder in (plain, fast):
        encoder.tokenizer.padding_side = "left"
    vectors = [encoder.encode(list(TEXTS), progress=False).dense for encoder in (plain, fast)]
    assert fast.engine == "openvino"
    assert np.allclose(*vectors, atol=1e-5)


@needs_openvino
def test_the_package_reports_to_nobody(bert):
    load(bert)
    assert "openvino_telemetry" not in sys.modules


@needs_openvino
def test_a_model_that_cannot_be_compiled_is_torchs_and_told_once(tmp_path, caplog):
    tiny_static(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "ultrarag"):
        names = [load(tmp_path / "model", "static").engine for _ in range(2)]
    told = [record.getMessage() for record in caplog.records if "cannot run" in record.getMessage()]
    assert names == ["torch", "torch"]
    assert len(told) == 1
    assert "StaticEmbedder" in told[0]


@needs_openvino
def test_a_model_with_other_vectors_is_torchs(bert, monkeypatch, caplog):
    """The comparison decides, not that the conversion went through."""
    right = choice.compiled
    monkeypatch.setattr(choice, "compiled", lambda *args: lambda inputs: right(*args)(inputs)[:, ::-1].copy())
    assert load(bert).engine == "torch"
    assert "its dense vectors are not torch's" in caplog.text


@needs_openvino
def test_converted_once_and_anew_where_damaged(bert, cache, monkeypatch, caplog):
    import openvino

    made = []
    convert = openvino.convert_model
    monkeypatch.setattr(openvino, "convert_model", lambda *args, **more: made.append(1) or convert(*args, **more))
    expected = load(bert).encode(TEXTS[0], progress=False).dense
    assert load(bert).engine == "openvino"
    assert len(made) == 2  # the backbone, and the head
    weights = next(cache.rglob("model.bin"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert np.array_equal(load(bert).encode(TEXTS[0], progress=False).dense, expected)
    assert len(made) == 4
    assert "damaged converted model: " in caplog.text


@needs_openvino
def test_a_cache_that_cannot_be_written_to_is_told_of(bert, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(bert).engine == "openvino"
    assert "not kept" in caplog.text


@needs_openvino
def test_changed_weights_are_torchs(bert, caplog):
    encoder = load(bert)
    before = encoder.encode(TEXTS[0], progress=False).dense
    with torch.no_grad():
        next(iter(encoder.model.backbone.encoder.parameters())).mul_(3)
    after = encoder.encode(TEXTS[0], progress=False).dense
    assert encoder.engine == "torch"
    assert not np.allclose(before, after, atol=1e-3)
    assert "the model has changed" in caplog.text


@needs_openvino
def test_copies_run_on_torch(bert):
    encoder = load(bert)
    for other in (copy.deepcopy(encoder._engine), pickle.loads(pickle.dumps(encoder._engine))):
        assert other.of(encoder.model) is encoder.model


@needs_openvino
@pytest.mark.parametrize("faster", ["torch", "openvino"])
def test_auto_takes_the_faster_and_remembers_it(bert, faster, monkeypatch):
    raced = []

    def race(key, seconds):
        raced.append(seconds)
        seconds[faster] = 0.0
        write(key, seconds)

    write = files.write_race
    monkeypatch.setattr(choice, "RACE", 0.01)
    monkeypatch.setattr(choice, "write_race", race)
    assert [load(bert, engine="auto").engine for _ in range(2)] == [faster, faster]
    assert len(raced) == 1
    assert set(raced[0]) == {"torch", "openvino"}


def test_a_missing_package_is_named_with_its_version(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install openvino==\d"):
        load(bert)


def test_auto_needs_no_package(bert, monkeypatch):
    monkeypatch.setattr(choice, "installed", lambda: None)
    assert load(bert, engine="auto").engine == "torch"


def test_engine_and_precision_must_fit(bert):
    with pytest.raises(UsageError, match=r"float32 on a CPU.*bf16"):
        load(bert, precision="bf16")
    assert load(bert, engine="auto", precision="bf16").engine == "torch"


def test_unknown_engines_are_named_with_their_place(bert, monkeypatch):
    with pytest.raises(UsageError, match=r"engine 'opnvino' is unknown.*openvino"):
        load(bert, engine="opnvino")
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UsageError, match=f"{VARIABLE} 'fast'"):
        load(bert, engine=None)


@pytest.mark.parametrize("command", ["index", "encode", "mine"])
def test_a_commands_flag_holds_for_the_process(command, monkeypatch):
    from ultrarag.data import commands
    from ultrarag.retrieve.command import parser

    monkeypatch.setenv(VARIABLE, "torch")  # restored after the test
    if command == "index":
        parser._parse(["search", "folder", "words", "--engine", "auto"])
    elif command == "encode":
        words = ["--model_name_or_path", "m", "--input_file", "i", "--output", "o", "--engine", "auto"]
        commands._encode_parser().parse_args(words)
    else:
        parser_of_models = commands.Parser("mine", "")
        commands.add_machine(parser_of_models)
        parser_of_models.read(["--engine", "auto"])
    assert os.environ[VARIABLE] == "auto"
    assert engines.asked_engine(None) == "auto"


def test_training_is_torchs(bert, monkeypatch):
    monkeypatch.setenv(VARIABLE, "openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert Encoder.load(bert, "bge", device="cpu", options=LoadOptions(training=True)).engine == "torch"


def test_one_window_is_tokenized_where_it_is_waited_for():
    """A query needs no thread, whose start takes longer than its tokens."""
    seen = []

    def tokenize(items: list[str]) -> Tokens:
        seen.append(threading.get_ident())
        return Tokens([[1] for _ in items])

    assert [len(chunk) for chunk in tokenized_chunks(["a", "b"], tokenize, 2)] == [2]
    assert seen == [threading.get_ident()]
    assert list(tokenized_chunks([], tokenize, 2)) == []
    assert [len(chunk) for chunk in tokenized_chunks(["a", "b", "c"], tokenize, 2)] == [2, 1]
    assert seen[1] != seen[0]
