"""int8: what was quantised is loaded, or an error says why not; it is never float32 in silence."""

from __future__ import annotations

import copy
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import forked
from tests.quantise.conftest import CALIBRATION, needs_nncf
from ultrarag import Encoder
from ultrarag.encoder import SharedEncoder
from ultrarag.encoder.engines import Quantised, digest_of
from ultrarag.encoder.engines.quantised import FOLDER, MODEL
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.hookspecs import LoadOptions
from ultrarag.quantise import Calibration, calibrated_precision, quantise
from ultrarag.testing.tiny import TEXTS, tiny_cross_encoder, tiny_m3, tiny_static

LIST = [*TEXTS, TEXTS[0] * 3, "a"]


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


@needs_nncf
def test_vectors_in_int8_are_nearly_those_in_float32_and_its_name_says_by_what_calibration(kept: Path, plain: Path):
    encoder, float32 = Encoder.load(kept, precision="int8"), Encoder.load(plain, device="cpu")
    assert encoder.precision == calibrated_precision(float32.fingerprint, CALIBRATION)
    assert (encoder.engine, encoder.fingerprint) == ("openvino", float32.fingerprint)
    one, other = (each.encode(LIST, progress=False).dense for each in (encoder, float32))
    assert cosines(one, other).min() > 0.99
    assert np.abs(one - other).max() > 1e-5
    assert np.array_equal(encoder.encode(LIST, precision="fp32", progress=False).dense, other)
    assert np.allclose(encoder.encode(LIST[0], "query").dense, encoder.encode(LIST, "query").dense[:1], atol=1e-2)
    assert Encoder.load(kept, precision=encoder.precision).quantised == encoder.quantised


@needs_nncf
def test_many_threads_share_one_encoder(kept: Path, two_threads):
    encoder = Encoder.load(kept, precision="int8")
    expected = encoder.encode(LIST, progress=False).dense
    assert np.allclose(encoder.encode(LIST, progress=False, batch_tokens=16).dense, expected, atol=1e-2)
    with SharedEncoder(encoder, precisions={"passage": "fp32"}) as shared:
        float32 = encoder.encode(LIST, precision="fp32", progress=False).dense
        assert np.allclose(shared.encode(LIST).dense, float32, atol=1e-6)
        assert np.abs(shared.encode(LIST, "query").dense - float32).max() > 1e-5


def test_a_checkpoint_that_is_not_quantised_is_refused_with_the_command(plain: Path):
    with pytest.raises(UsageError, match=r"is not quantised, .* ultrarag checkpoint quantise"):
        Encoder.load(plain, precision="int8")
    encoder = Encoder.load(plain, device="cpu")
    with pytest.raises(UsageError, match=r"nothing that is quantised: load a quantised checkpoint"):
        encoder.encode(LIST, precision="int8", progress=False)


@needs_nncf
def test_what_is_damaged_or_of_another_model_or_calibration_is_refused(quantised: Path):
    with pytest.raises(UsageError, match="another calibration: int8:0123 is asked for"):
        Encoder.load(quantised, precision="int8:0123")
    model = quantised / FOLDER / MODEL
    content = model.read_bytes()
    model.write_bytes(content + b" ")
    with pytest.raises(CheckpointError, match=r"^damaged int8 model: .*model.xml.*; quantise the checkpoint again"):
        Encoder.load(quantised, precision="int8")
    model.write_bytes(content)
    with pytest.raises(UsageError, match="quantised when its model was another one"):
        Encoder.load(quantised, precision="int8", query_instruction="find: ")


@needs_nncf
def test_a_model_that_changes_or_is_copied_is_not_in_int8_any_more_and_says_so(kept: Path):
    encoder = Encoder.load(kept, precision="int8")
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(encoder)
    with torch.no_grad():
        next(encoder.model.parameters()).add_(0.1)
    with pytest.raises(UsageError, match="changed since it was quantised"):
        encoder.encode(LIST, progress=False)
    assert encoder.encode(LIST, precision="fp32", progress=False).dense.shape[0] == len(LIST)


def test_int8_is_for_encoding_on_a_cpu(plain: Path):
    for match, more in (
        ("on a CPU", {"device": "meta"}),
        ("trained in its own numbers", {"options": LoadOptions(training=True)}),
        ("not by engine 'torch'", {"engine": "torch"}),
    ):
        with pytest.raises(UsageError, match=match):
            Encoder.load(plain, precision="int8", **more)


@needs_nncf
@pytest.mark.parametrize(("adapter", "make"), [("bge-reranker", tiny_cross_encoder), ("static", tiny_static)])
def test_a_model_that_cannot_be_quantised_says_why_and_nothing_is_written(adapter, make, tmp_path: Path):
    make(tmp_path / "model")
    with pytest.raises(UsageError, match=r"cannot run in int8|cannot be quantised"):
        quantise(tmp_path / "model", CALIBRATION, adapter=adapter)
    assert not (tmp_path / "model" / FOLDER).exists()


_KILLED = """
import os, signal, sys
from ultrarag.quantise import quantising
from tests import forked
from tests.quantise.conftest import CALIBRATION
quantising._check_alike = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
quantising.quantise(sys.argv[1], CALIBRATION, output=sys.argv[2] if len(sys.argv) > 2 else None)
"""


@needs_nncf
@pytest.mark.parametrize("copied", [False, True])
def test_what_a_killed_process_left_is_removed_by_the_next(copied: bool, plain: Path, tmp_path: Path):
    own = Path(shutil.copytree(plain, tmp_path / "models" / "own"))
    output = tmp_path / "models" / "copy" if copied else None
    assert forked.run(["-c", _KILLED, str(own), *([str(output)] if output else [])]).returncode == -signal.SIGKILL
    left = [path for path in own.parent.rglob(".*.tmp") if path.is_dir()]
    assert len(left) == 1
    assert not list(Path(tempfile.gettempdir()).glob("ultrarag-int8-*"))
    quantise(own, CALIBRATION, output=output)
    assert not list(own.parent.rglob(".*.tmp"))
    assert Encoder.load(output or own, precision="int8").quantised


def test_a_model_of_two_sides_is_refused_in_words(plain: Path):
    one, other = (Encoder.load(plain, device="cpu") for _ in range(2))
    with torch.no_grad():
        next(other.model.parameters()).add_(0.1)
    with pytest.raises(UsageError, match="a model of two sides is not quantised"):
        Encoder.of_sides(one, other).in_int8(plain)


@needs_nncf
def test_every_head_of_m3_is_quantised(tmp_path: Path):
    tiny_m3(tmp_path / "model")
    quantise(tmp_path / "model", CALIBRATION, adapter="bgem3")
    float32, int8 = (Encoder.load(tmp_path / "model", "bgem3", device="cpu", precision=p) for p in ("fp32", "int8"))
    one, other = (encoder.encode(LIST, progress=False) for encoder in (float32, int8))
    assert cosines(one.dense, other.dense).min() > 0.95
    assert one.colbert is not None
    assert one.mask is not None
    assert cosines(one.colbert[one.mask > 0], other.colbert[one.mask > 0]).mean() > 0.95
    assert np.array_equal(one.sparse.ids, other.sparse.ids)


@pytest.mark.long
@needs_nncf
def test_the_real_model_keeps_its_vectors(minilm: str, tmp_path: Path):
    record = quantise(minilm, CALIBRATION, adapter="bge", output=tmp_path / "checkpoint")
    assert record == Quantised.read(tmp_path / "checkpoint")
    float32, int8 = (Encoder.load(tmp_path / "checkpoint", device="cpu", precision=p) for p in ("fp32", "int8"))
    one, other = (encoder.encode(LIST, progress=False).dense for encoder in (float32, int8))
    assert cosines(one, other).mean() > 0.98


def test_calibration_texts_are_spread_and_read_from_passages_and_training_rows(texts: Path, tmp_path: Path):
    many: list = [("passage", str(number)) for number in range(1000)]
    chosen = [text for _, text in Calibration.of(many, "numbers", 4).texts]
    assert chosen == ["0", "250", "500", "750"]
    assert Calibration.read(texts).texts == CALIBRATION.texts
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "pos": ["one", "two"]}\n', encoding="utf-8")
    found = Calibration.read(rows)
    assert found.texts == (("query", "q"), ("passage", "one"), ("passage", "two"))
    assert found.digest == digest_of(found.texts)
    found.write(tmp_path / "kept.json")
    assert Calibration.kept(tmp_path / "kept.json") == found
