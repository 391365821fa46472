"""`ultrarag checkpoint quantise`: judged and recorded, refused with its numbers, or said to be unjudged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.quantise.conftest import CALIBRATION, COLLECTION, needs_nncf
from ultrarag import Encoder
from ultrarag.cli import main
from ultrarag.encoder.engines import Pair, Quantised
from ultrarag.encoder.engines.quantised import FOLDER
from ultrarag.errors import GateError, UsageError
from ultrarag.evaluation import write_beir
from ultrarag.quantise import quantise
from ultrarag.quantise.judging import Terms, judge


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing would be judged"),
        (["--unjudged"], "--calibration is missing"),
        (["--unjudged", "--tolerance", "-1"], "must be 0 or more"),
    ],
)
def test_it_wants_evaluation_data_or_a_word_that_there_is_none(words, told, plain: Path, capsys):
    assert main(["checkpoint", "quantise", str(plain), *words]) == 2
    assert told in capsys.readouterr().err


@needs_nncf
def test_the_pairs_that_were_measured_are_recorded(plain: Path, tmp_path: Path, capsys):
    write_beir(tmp_path / "beir", list(COLLECTION.corpus.values()), COLLECTION.queries, {"test": COLLECTION.qrels})
    target = tmp_path / "checkpoint"
    words = ["--eval_data", str(tmp_path / "beir"), "--output", str(target), "--json"]
    assert main(["checkpoint", "quantise", str(plain), *words]) == 0
    found, record = json.loads(capsys.readouterr().out), Quantised.read(target)
    assert record is not None
    assert found["precision"] == record.precision
    pairs = [(pair.passages, pair.queries, pair.accepted) for pair in record.measured]
    assert pairs == [("int8", "int8", True), ("fp32", "int8", True), ("int8", "fp32", True)]
    assert record.accepts("int8:0123", "fp32")
    assert not record.accepts("int8:0123", "fp16")


@needs_nncf
def test_without_evaluation_data_it_says_that_nothing_was_judged(plain, texts, tmp_path, capsys, caplog):
    target = tmp_path / "checkpoint"
    words = ["--unjudged", "--calibration", str(texts), "--output", str(target)]
    assert main(["checkpoint", "quantise", str(plain), *words]) == 0
    # nor is a warning of ours held back by what nncf's log is told
    assert "int8 was not judged: nobody knows what it loses here" in caplog.text
    assert "calibrated on" in capsys.readouterr().out
    record = Quantised.read(target)
    assert record is not None
    assert not record.accepts("fp32", "int8")


@needs_nncf
def test_a_significant_loss_is_refused_with_its_numbers_and_nothing_is_written(plain, tmp_path, monkeypatch):
    in_int8 = Encoder.in_int8

    def broken(self, folder):
        found = in_int8(self, folder)
        encode = found.encode

        def shifted(texts, kind="passage", **options):
            given = encode(texts, kind, **options)
            if kind == "query" and len(texts) == len(COLLECTION.queries):
                given.dense = np.roll(given.dense, 1, axis=0)  # each query finds its neighbour's passage
            return given

        found.encode = shifted
        return found

    monkeypatch.setattr(Encoder, "in_int8", broken)
    with pytest.raises(GateError, match=r"int8 loses more .*nDCG@10 1\.0000 -> 0\.\d+.*p = 0\.0"):
        quantise(plain, CALIBRATION, COLLECTION, output=tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / FOLDER).exists()


def test_a_loss_within_the_tolerance_or_by_chance_is_let_be(plain: Path):
    """The same encoder on both sides loses nothing; what decides about a loss is its size and its p-value."""
    encoder = Encoder.load(plain, device="cpu")
    found = judge(encoder, encoder, COLLECTION, Terms())
    assert [pair.found - pair.float32 for pair in found] == [0, 0, 0]
    assert all(pair.accepted for pair in found)


def test_a_pair_is_accepted_when_every_head_of_it_is():
    about = {"head": "dense", "metric": "nDCG@10", "float32": 0.7, "found": 0.6, "low": -0.2, "high": -0.1}
    about |= {"p_value": 0.01, "judged": 100}
    pairs = [Pair("fp32", "int8", accepted=ok, **about) for ok in (True, False)]
    record = Quantised("f", {}, {"digest": "d"}, ("input_ids",), "last_hidden_state", measured=tuple(pairs[:1]))
    assert record.accepts("fp32", "int8:0123456789ab")
    assert not record.accepts("int8", "fp32")
    assert not Quantised(**{**vars(record), "measured": tuple(pairs)}).accepts("fp32", "int8")


def test_a_copy_takes_the_place_of_no_other_files(plain: Path, texts: Path, tmp_path: Path, monkeypatch, capsys):
    """It is said before anything is loaded; `Encoder.save` refuses them as well."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "of_mine.txt").write_text("keep me")
    encoder = Encoder.load(plain, device="cpu")
    for place in (notes, notes / "of_mine.txt"):
        with pytest.raises(UsageError, match=f"'{place}' .* name "):
            encoder.save(place)
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "load", None)
            words = ["--unjudged", "--calibration", str(texts), "--output", str(place)]
            assert main(["checkpoint", "quantise", str(plain), *words]) == 2
        assert f"'{place}' " in capsys.readouterr().err
    assert (notes / "of_mine.txt").read_text() == "keep me"


@needs_nncf
def test_a_checkpoint_that_is_its_own_copy_keeps_what_else_lies_in_it(plain: Path, tmp_path: Path, texts: Path):
    checkpoint = Path(shutil.copytree(plain, tmp_path / "checkpoint"))
    (checkpoint / "report.html").write_text("of its training")
    words = ["--unjudged", "--calibration", str(texts), "--output", str(checkpoint / ".")]
    assert main(["checkpoint", "quantise", str(checkpoint), *words]) == 0
    assert (checkpoint / "report.html").is_file()
    assert Quantised.read(checkpoint)
