"""Teacher scores: those of the model itself, each text encoded once, and no row lost to a kill."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ultrarag import Encoder
from ultrarag.data import scoring
from ultrarag.data.scoring import Scorer, main, score
from ultrarag.errors import DataError, UsageError
from ultrarag.rows.row import parse_row
from ultrarag.testing.tiny import tiny_cross_encoder

ROWS = [
    {"query": "what is milvus?", "pos": ["a vector database"], "neg": ["seals sleep", "hot oven"], "id": 3},
    {"query": "what is milvus?", "pos": ["a vector database", "seals sleep"], "neg_scores": None},
    {"query": "bread?", "pos": ["hot oven"], "neg": ["a vector database"], "pos_scores": [9.0], "neg_scores": [9.0]},
    {"query": "bread?", "pos": ["hot oven"], "neg": ["seals sleep"], "prompt": "find the oven "},
]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reranker")
    tiny_cross_encoder(folder)
    return Encoder.load(folder, adapter="bge-reranker", device="cpu")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_the_rerankers(rows, reranker, tmp_path):
    report = score(rows, tmp_path / "out.jsonl", Scorer(reranker, normalize=True))
    for row, scored in zip(ROWS, read(tmp_path / "out.jsonl"), strict=True):
        pairs = [(row["query"], text) for text in [*row["pos"], *row.get("neg", [])]]
        wanted = reranker.score(pairs, normalize=True, instruction=row.get("prompt"))
        np.testing.assert_allclose([*scored["pos_scores"], *scored["neg_scores"]], wanted, atol=1e-5)
        assert scored["query"] == row["query"]
        parse_row(scored, teacher=True)
    assert read(tmp_path / "out.jsonl")[0]["id"] == 3
    assert (report.rows, report.positives, report.negatives) == (4, 5, 4)


def test_scores_are_the_weighted_heads_of_an_embedder(rows, m3_encoder, tmp_path, monkeypatch):
    weights = {"dense": 1.0, "sparse": 0.3}
    seen = []
    tokenize = type(m3_encoder).tokenize

    def counted(self, texts, kind, *args, **more):
        seen.extend((kind, text) for text in texts)
        return tokenize(self, texts, kind, *args, **more)

    monkeypatch.setattr(type(m3_encoder), "tokenize", counted)
    score(rows, tmp_path / "out.jsonl", Scorer(m3_encoder, weights))
    monkeypatch.undo()
    assert sorted(text for kind, text in seen if kind == "passage") == ["a vector database", "hot oven", "seals sleep"]
    assert sorted(text for kind, text in seen if kind == "query") == ["bread?", "bread?", "what is milvus?"]
    for row, scored in zip(ROWS, read(tmp_path / "out.jsonl"), strict=True):
        query = m3_encoder.encode(row["query"], "query", instruction=row.get("prompt"))
        passages = m3_encoder.encode([*row["pos"], *row.get("neg", [])])
        wanted = m3_encoder.similarity(query, passages, weights)[0]
        np.testing.assert_allclose([*scored["pos_scores"], *scored["neg_scores"]], wanted, atol=1e-5)


def test_a_stopped_run_goes_on(rows, m3_encoder, tmp_path, monkeypatch):
    scorer, output = Scorer(m3_encoder, {"dense": 1}), tmp_path / "out.jsonl"
    whole = score(rows, tmp_path / "whole.jsonl", scorer, chunk_rows=1)
    kept, calls = scorer.score, []
    monkeypatch.setattr(scorer, "score", lambda rows: kept(rows) if calls.append(rows) or len(calls) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(rows, output, scorer, chunk_rows=1)
    monkeypatch.setattr(scorer, "score", lambda rows: calls.append(rows) or kept(rows))
    assert score(rows, output, scorer, chunk_rows=1) == whole
    assert len(calls) == 3 + 2
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()
    with pytest.raises(DataError, match="exists"):
        score(rows, output, scorer)


def test_rows_whose_negatives_win_are_counted():
    report = scoring.ScoringReport()
    report.add([2.0, 0.5], [1.0])
    report.add([2.0], [1.0])
    report.add([2.0], [])
    assert (report.inverted, report.rows) == (1, 3)
    assert "in 1 rows a negative" in str(report)


def test_a_score_that_is_no_number_names_its_row(rows, m3_encoder, tmp_path, monkeypatch):
    scorer = Scorer(m3_encoder, {"dense": 1})
    monkeypatch.setattr(scorer, "score", lambda rows: [([float("nan")], [])] * len(rows))
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*not a finite number"):
        score(rows, tmp_path / "out.jsonl", scorer)


def test_the_command_line_of_add_reranker_score(rows, tmp_path, capsys):
    tiny_cross_encoder(tmp_path / "reranker")
    flags = (
        f"--input_file {rows} --output_file {tmp_path / 'out.jsonl'} --reranker_name_or_path {tmp_path / 'reranker'}"
    )
    flags += " --reranker_model_class encoder-only-base --use_fp16 True --reranker_query_max_length 16"
    flags += " --reranker_max_length 32 --reranker_batch_size 64 --normalize True --devices cpu --json"
    assert main(flags.split()) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    assert all(0 < row["pos_scores"][0] < 1 for row in read(tmp_path / "out.jsonl"))


def test_the_embedder_is_its_own_teacher(rows, tmp_path, tiny_m3):
    flags = f"--input_file {rows} -o {tmp_path / 'out.jsonl'} --model_name_or_path {tiny_m3} --adapter bgem3"
    with pytest.raises(UsageError, match="several heads"):
        main(flags.split())
    assert main([*flags.split(), "--weights", "dense=1,sparse=0.3,colbert=1"]) == 0
    assert len(read(tmp_path / "out.jsonl")) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "name one teacher"),
        ("--model_name_or_path a --reranker_name_or_path b", "name one teacher"),
        ("--reranker_name_or_path b --cutoff_layers 8 16", "name one"),
        ("--reranker_name_or_path b --compress_ratio 2", "not available"),
        ("--reranker_nam_or_path b", "did you mean '--reranker_name_or_path'"),
    ],
)
def test_wrong_flags_say_what_to_do(flags, message):
    with pytest.raises(UsageError, match=message):
        main(["--input_file", "a", "--output_file", "b", *flags.split()])


def test_weights_and_normalize_belong_to_one_kind_of_teacher(reranker, m3_encoder):
    with pytest.raises(UsageError, match="a cross-encoder gives one score"):
        Scorer(reranker, {"dense": 1})
    with pytest.raises(UsageError, match="normalize"):
        Scorer(m3_encoder, {"dense": 1}, normalize=True)
    with pytest.raises(UsageError, match="did you mean 'sparse'"):
        Scorer(m3_encoder, {"sparce": 1})
