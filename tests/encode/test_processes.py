"""Encoding a corpus to disk: the encoder's own vectors, whatever was killed, and on several processes."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ultrarag import Encoder
from ultrarag.data.cli import main
from ultrarag.encode import processes
from ultrarag.encode.corpus import Compression, EncodedCorpus, Shard, committed_rows
from ultrarag.encode.processes import ModelChoice, encode_corpus
from ultrarag.errors import DataError, FingerprintError, UsageError
from ultrarag.testing.tiny import tiny_bert

TEXTS = [f"passage number {n} " + "and more " * (n % 7) for n in range(50)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"_id": f"p{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    return path


@pytest.fixture
def model(tmp_path) -> ModelChoice:
    tiny_bert(tmp_path / "model")
    return ModelChoice(str(tmp_path / "model"), "bge")


def test_every_head_comes_back(corpus, tiny_m3, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "CHUNK_TEXTS", 16)
    found = encode_corpus(ModelChoice(tiny_m3, "bgem3"), corpus, tmp_path / "out", devices=("cpu",))
    expected = Encoder.load(tiny_m3, "bgem3", device="cpu").encode(TEXTS, "passage", progress=False)
    rows = 0
    for ids, vectors in found.blocks(7):
        part = expected[rows : rows + len(ids)]
        assert ids == [f"p{n}" for n in range(rows, rows + len(ids))]
        assert np.abs(vectors.dense - part.dense).max() < 1e-6
        assert vectors.sparse.to_dicts()[0] == pytest.approx(part.sparse.to_dicts()[0], abs=1e-6)
        length = int(vectors.mask[0].sum())
        assert np.abs(vectors.colbert[0, :length] - part.colbert[0, :length]).max() < 1e-6
        rows += len(ids)
    assert rows == len(TEXTS) == len(found)


def test_blank_passages_are_left_out_and_counted(corpus, model, tmp_path, caplog):
    lines = corpus.read_text().splitlines()[:4]
    blank = [json.dumps({"_id": f"b{n}", "text": text}) for n, text in enumerate(["", " \n", "\u200b"])]
    corpus.write_text("\n".join([blank[0], *lines[:2], *blank[1:], *lines[2:]]))
    found = encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))
    assert (list(found.ids()), len(found)) == (["p0", "p1", "p2", "p3"], 4)
    assert "3 blank passages of" in caplog.text


def test_a_run_that_was_stopped_goes_on(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "CHUNK_TEXTS", 10)
    commit, commits = Shard.commit, []

    def fail(self) -> None:
        commit(self)
        commits.append(self.rows)
        if len(commits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Shard, "commit", fail)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))
    with pytest.raises(DataError, match="not finished"):
        EncodedCorpus(tmp_path / "out")
    found = encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))
    assert commits == [10, 20, 30, 40, 50]
    whole = encode_corpus(model, corpus, tmp_path / "again", devices=("cpu",))
    assert np.abs(found.dense() - whole.dense()).max() < 1e-6


def test_several_processes_give_the_same_after_kill_9_in_the_middle(corpus, model, tmp_path):
    corpus.write_text("".join(json.dumps({"_id": f"p{n}", "text": f"{n} " * 100}) + "\n" for n in range(1_000)))
    out, options = tmp_path / "out", {"devices": ("cpu", "cpu"), "progress": False}
    code = "import sys; from ultrarag.encode import processes; processes.CHUNK_TEXTS = 16\n"
    code += "model = processes.ModelChoice(sys.argv[1], 'bge')\n"
    code += "processes.encode_corpus(model, *sys.argv[2:], devices=('cpu', 'cpu'))"
    parent = psutil.Popen([sys.executable, "-c", code, model.path, str(corpus), str(out)])
    while not committed_rows(out, ["dense"]) and parent.poll() is None:
        time.sleep(0.01)
    children = parent.children()
    parent.kill()
    parent.wait()
    gone, left = psutil.wait_procs(children, timeout=30)
    assert (len(gone), left) == (2, [])  # they end with it
    kept = committed_rows(out, ["dense"])
    assert 0 < kept < 1_000
    two = encode_corpus(model, corpus, out, **options)
    assert [len(ids) for ids, _ in two.blocks(2_000)] == [500, 500]
    assert list(two.ids()) == [f"p{n}" for n in range(1_000)]
    one = encode_corpus(model, corpus, tmp_path / "one", devices=("cpu",), progress=False)
    assert np.abs(one.dense() - two.dense()).max() < 1e-6


def test_a_source_that_changed_in_place_is_refused(corpus, model, tmp_path):
    encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))
    note = tmp_path / "out" / "encoding.json"
    begun = json.loads(note.read_text())
    corpus.write_text(corpus.read_text().replace("number 7 ", "number 8 "))  # as many bytes and passages
    with pytest.raises(DataError, match=r"another corpus.*--overwrite"):
        encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))
    del begun["corpus"]["sha256"]  # of a version that noted no digest: it goes on
    note.write_text(json.dumps({**begun, "finished": False}))
    assert len(encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))) == 50


def test_ids_that_a_kill_cut_short_are_written_again(corpus, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ids.txt").write_text('"p0"\n"p')
    assert list(encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",)).ids())[-1] == "p49"


@pytest.mark.parametrize(("format", "cosine"), [("float16", 0.99999), ("int8", 0.999), ("binary", 0.3)])
def test_compressed(corpus, model, tmp_path, format, cosine):
    full = encode_corpus(model, corpus, tmp_path / "full", devices=("cpu",)).dense()
    small = encode_corpus(model, corpus, tmp_path / "small", devices=("cpu",), compression=Compression(format, 16))
    kept = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    found = small.dense()
    assert found.shape == (50, 16)
    assert ((found * kept).sum(1) / np.linalg.norm(found, axis=1)).min() > cosine


def test_what_does_not_fit_is_refused(corpus, model, tmp_path):
    encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))
    tiny_bert(tmp_path / "other", seed=1)
    with pytest.raises(FingerprintError, match="another model"):
        encode_corpus(ModelChoice(str(tmp_path / "other"), "bge"), corpus, tmp_path / "out", devices=("cpu",))
    with pytest.raises(DataError, match="another compression"):
        encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",), compression=Compression("int8"))
    with pytest.raises(UsageError, match="no head 'sparse'"):
        encode_corpus(model, corpus, tmp_path / "new", devices=("cpu",), heads=["sparse"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        encode_corpus(model, corpus, tmp_path / "full", devices=("cpu",), overwrite=True)
    assert (tmp_path / "full" / "mine.txt").exists()


def test_the_command(corpus, model, tmp_path, capsys):
    words = ["encode", "--model_name_or_path", model.path, "--adapter", "bge", "--input_file", str(corpus)]
    assert main([*words, "--output", str(tmp_path / "out"), "--format", "int8", "--devices", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passages"] == 50
    assert facts["dim"] == 32
    assert main([*words, "--output", str(tmp_path / "out"), "--devices", "cpu"]) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_overwriting_is_killed_and_done_by_the_same_call(corpus, model, tmp_path, monkeypatch):
    encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))

    def killed(path, *args, real=shutil.rmtree, **options):
        if Path(path).name == "out":
            raise KeyboardInterrupt
        real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",), overwrite=True)
    assert len(encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",), overwrite=True)) == 50
    assert len(encode_corpus(model, corpus, tmp_path / "out", devices=("cpu",))) == 50  # done already
